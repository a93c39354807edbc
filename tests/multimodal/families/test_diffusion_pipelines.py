"""Sampling diffusion models, by ourselves and through the library's pipelines, and LoRA in the format of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

pytest.importorskip("diffusers")

import diffusers
from diffusion_models import XL, library_answer, make, tiny_vae, tiny_video_vae

import zoo
from multimodal.families.diffusion.lora import FILE, load_lora_weights, save_lora_weights
from multimodal.families.diffusion.pipelines import pipeline
from multimodal.tasks.sampling import generate
from zoo.exchange.peft import from_peft, to_peft

# -- sampling -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_sampling_is_the_pipelines(guidance: float) -> None:
    """`generate` gives what `DiTPipeline` gives from the same noise."""
    torch.manual_seed(0)
    model = zoo.load("dit-xl2", "lora", pretrained=False, **XL)
    vae = tiny_vae()
    pipe = pipeline(model, vae=vae)
    pipe.set_progress_bar_config(disable=True)
    sources = [torch.Generator().manual_seed(7 * 1_000_003 + i) for i in range(2)]
    expected = pipe([3, 999], guidance, sources, 3, output_type="pt").images
    ours = generate(model, [3, 999], steps=3, guidance=guidance, vae=vae, seed=7)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    alone = generate(model, [999], steps=3, guidance=guidance, vae=vae, seed=7)
    assert not torch.allclose(alone[0], ours[1])  # other noise, since it is the first image now
    torch.testing.assert_close(
        generate(model, [3, 999], steps=3, guidance=guidance, vae=vae, seed=7, batch_size=1), ours
    )


def test_sampling_pixels() -> None:
    model, _ = make("dit", "lora")
    for scheduler in (None, diffusers.DDPMScheduler(), diffusers.DPMSolverMultistepScheduler()):
        images = generate(model, [0, 9], steps=3, guidance=2.0, scheduler=scheduler)
        assert images.shape == (2, 3, 8, 8)
        assert 0 <= images.min() <= images.max() <= 1
        assert torch.equal(images, generate(model, [0, 9], steps=3, guidance=2.0, scheduler=scheduler))
    assert generate(model, []).shape == (0, 3, 8, 8)
    with pytest.raises(zoo.errors.ConfigError, match="expected 1 or more"):
        generate(model, [0], steps=0)
    with pytest.raises(zoo.errors.DataError, match="class label 11"):
        generate(model, [11], steps=1)
    with pytest.raises(zoo.errors.ConfigError, match="not class-conditional"):
        generate(make("cogvideox")[0], [0])
    with pytest.raises(zoo.errors.ConfigError, match="pass the autoencoder"):
        generate(zoo.load("dit-xl2", pretrained=False, **XL), [0])
    with pytest.raises(zoo.errors.ConfigError, match="takes the label 1000"):
        pipeline(model, vae=tiny_vae())


def video_pipe(model: zoo.Model, merged: bool = False) -> Any:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(3)
    text = T5EncoderModel(T5Config(d_model=12, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=20))
    pipe = pipeline(model, vae=tiny_video_vae(), text_encoder=text.eval(), tokenizer=None, merged=merged)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(name: str, pipe: Any) -> Tensor:
    if name == "dit":
        images = pipe(
            [3, 999], generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="pt"
        ).images
        return images
    torch.manual_seed(4)
    text = torch.randint(20, (2, 5))
    with torch.no_grad():
        embeddings = pipe.text_encoder(text)[0]
    options: Any = {
        "prompt_embeds": embeddings[:1],
        "negative_prompt_embeds": embeddings[1:],
        "height": 64,
        "width": 64,
    }
    options |= {"num_frames": 9, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    return pipe(**options, output_type="pt").frames


@pytest.mark.parametrize("name", ["dit", "cogvideox"])
def test_pipelines_run_the_adapter(name: str) -> None:
    """It changes what the pipeline gives, follows the model's switches, and equals a merged transformer."""
    if name == "dit":
        torch.manual_seed(0)
        model = zoo.load("dit-xl2", zoo.adapter("lora", targets="all-linear"), pretrained=False, **XL)
        with torch.no_grad():
            for parameter in model.parameters_to_train().values():
                parameter.add_(0.2 * torch.randn_like(parameter))
        vae = tiny_vae()

        def make_pipe(merged: bool = False) -> Any:
            pipe = pipeline(model, vae=vae, merged=merged)
            pipe.set_progress_bar_config(disable=True)
            return pipe
    else:
        model, _ = make("cogvideox", zoo.adapter("lora", targets="all-linear"))

        def make_pipe(merged: bool = False) -> Any:
            return video_pipe(model, merged)

    pipe = make_pipe()
    adapted = sample(name, pipe)
    with model.disable():
        bare = sample(name, pipe)
    assert (adapted - bare).abs().max() > 1e-3
    plain = make_pipe(merged=True)
    assert plain.transformer is not model.backbone
    torch.testing.assert_close(sample(name, plain), adapted, rtol=1e-4, atol=1e-4)
    model.add_adapter(zoo.adapter("prefix", num_tokens=2))
    assert (sample(name, pipe) - adapted).abs().max() > 1e-3


def test_pipelines_from_a_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = zoo.load("dit-xl2", pretrained=False, **XL)
    pipeline(model, vae=tiny_vae()).save_pretrained(tmp_path / "pipe")
    again = zoo.load(f"diffusers:{tmp_path / 'pipe'}", "lora")
    assert again.family.family == "dit"
    pipe = pipeline(again, str(tmp_path / "pipe"))
    assert pipe.transformer is again.backbone
    with pytest.raises(zoo.errors.ConfigError, match="other parts of DiTPipeline"):
        pipeline(model)
    with pytest.raises(zoo.errors.ConfigError, match="cannot be made of these parts"):
        pipeline(model, vae=tiny_vae(), text_encoder=nn.Identity())
    with pytest.raises(zoo.errors.ConfigError, match="no diffusion model"):
        pipeline(zoo.load("vit-micro", num_classes=0))


# -- LoRA in the format of diffusers --------------------------------------------------------------------------------------

LORAS = [
    {"rank": 2, "alpha": 5.0, "targets": "all-linear"},
    {"rank": 2, "alpha": 4.0, "targets": "q,v,modulation", "ranks": {"v": 3}, "alphas": {"blocks.0.**": 1.0}},
    {"rank": 2, "targets": "q,up", "rslora": True, "alpha": 3.0},
    {"rank": 2, "targets": "k,down", "dora": True, "alpha": 3.0},
]


@pytest.mark.parametrize("settings", LORAS, ids=["all", "ranks", "rslora", "dora"])
@pytest.mark.parametrize("name", ["cogvideox", "sd3", "flux"])
def test_diffusers_loads_our_lora(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model, batch = make(name, zoo.adapter("lora", **settings))
    file = save_lora_weights(model, tmp_path)
    assert file == tmp_path / FILE
    module: Any = model.backbone
    twin = type(module).from_config(module.config).eval()
    twin.load_state_dict(module.state_dict())
    twin.load_lora_adapter(str(tmp_path), prefix="transformer", weight_name=FILE)
    with torch.no_grad():
        expected = model(*batch)
        torch.testing.assert_close(library_answer(name, twin, batch), expected, rtol=1e-5, atol=1e-5)
        # and back
        again, _ = make(name)
        assert load_lora_weights(again, tmp_path) == "lora"
        torch.testing.assert_close(again(*batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_peft_loads_our_lora_where_diffusers_cannot(name: str, tmp_path: Path) -> None:
    """The library's DiT and PixArt have no `load_lora_adapter`."""
    peft = pytest.importorskip("peft")
    model, batch = make(name, zoo.adapter("lora", **LORAS[0]))
    with pytest.raises(zoo.errors.ConfigError, match=r"loads no LoRA into a .*Transformer2DModel.*to_peft"):
        save_lora_weights(model, tmp_path)
    module: Any = model.backbone
    twin = type(module).from_config(module.config).eval()
    twin.load_state_dict(module.state_dict())
    wrapped = peft.PeftModel.from_pretrained(twin, str(to_peft(model, tmp_path)))
    with torch.no_grad():
        expected = model(*batch)
        torch.testing.assert_close(library_answer(name, wrapped, batch), expected, rtol=1e-5, atol=1e-5)
        again, _ = make(name)
        from_peft(tmp_path, model=again)
        torch.testing.assert_close(again(*batch), expected, rtol=1e-5, atol=1e-5)


def test_a_pipeline_loads_our_lora(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model, _ = make("cogvideox", zoo.adapter("lora", rank=2, alpha=3.0))
    save_lora_weights(model, tmp_path)
    expected = sample("cogvideox", video_pipe(model))
    bare, _ = make("cogvideox")
    pipe = video_pipe(bare)
    pipe.load_lora_weights(str(tmp_path))
    torch.testing.assert_close(sample("cogvideox", pipe), expected, rtol=1e-4, atol=1e-4)
    pipe.unload_lora_weights()
    assert (sample("cogvideox", pipe) - expected).abs().max() > 1e-3


def test_we_load_what_diffusers_saved(tmp_path: Path) -> None:
    """With settings in the file's metadata: other ranks and scales than the defaults."""
    peft = pytest.importorskip("peft")
    model, batch = make("cogvideox")
    module: Any = model.backbone
    twin = type(module).from_config(module.config).eval()
    twin.load_state_dict(module.state_dict())
    patterns = {"rank_pattern": {"to_v": 4}, "alpha_pattern": {"to_v": 1}}
    twin.add_adapter(peft.LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v", "proj_out"], **patterns))
    with torch.no_grad():
        for key, parameter in twin.named_parameters():
            if "lora_" in key:
                parameter.normal_(std=0.3)
        expected = library_answer("cogvideox", twin, batch)
        twin.save_lora_adapter(str(tmp_path), weight_name=FILE)
        assert load_lora_weights(model, tmp_path / FILE, "theirs") == "theirs"
        torch.testing.assert_close(model(*batch), expected, rtol=1e-5, atol=1e-5)


def test_bad_lora_files(tmp_path: Path) -> None:
    model, _ = make("cogvideox", zoo.adapter("lora", rank=2))
    save_lora_weights(model, tmp_path)
    tensors = load_file(tmp_path / FILE)
    other, _ = make("flux")
    before = list(other.adapters)
    with pytest.raises(zoo.errors.MismatchError):
        load_lora_weights(other, tmp_path)
    assert list(other.adapters) == before

    def damaged(name: str, content: dict[str, Tensor]) -> Path:
        save_file(content, tmp_path / f"{name}.safetensors")
        return tmp_path / f"{name}.safetensors"

    first = next(iter(tensors))
    cases = [
        ("nan", {**tensors, first: tensors[first] * float("nan")}, zoo.errors.WeightsError, "finite"),
        ("half", {first: tensors[first]}, zoo.errors.WeightsError, "lacks lora_A or lora_B"),
        ("text", {**tensors, "text_encoder.x.lora_A.weight": torch.zeros(1, 1)}, zoo.errors.ConfigError, "also adapts"),
        ("kohya", {"transformer.x.lora_down": torch.zeros(1)}, zoo.errors.WeightsError, "no LoRA in the format"),
    ]
    for name, content, error, words in cases:
        with pytest.raises(error, match=words):
            load_lora_weights(model, damaged(name, content))
    with pytest.raises(zoo.errors.ConfigError, match="Name the file"):
        (tmp_path / "empty").mkdir()
        load_lora_weights(model, tmp_path / "empty")
    moved, _ = make("cogvideox")
    with torch.no_grad():
        next(moved.backbone.parameters()).add_(1)
    fresh = zoo.model.Model(moved.family)
    with pytest.raises(zoo.errors.MismatchError, match="other weights"):
        load_lora_weights(fresh, tmp_path)
    conv, _ = make("cogvideox", zoo.adapter("prefix", num_tokens=2))
    with pytest.raises(zoo.errors.ConfigError, match="only 'lora'"):
        save_lora_weights(conv, tmp_path)
