"""Classes of diffusers by name: folders, sizes, the options of saved adapters, inputs and backends that are refused."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
from diffusers_calls import FAMILIES, MEMBERS, make

import zoo
from multimodal.families.diffusion.names import FAMILIES as DESCRIBED
from zoo.registry import family

EVERY = pytest.mark.parametrize("made", MEMBERS)


@EVERY
def test_folders_and_saved_adapters(made: str, tmp_path: Path) -> None:
    """`diffusers:<folder>` finds the class in the configuration; a missing tensor is named; an adapter brings its options."""
    from safetensors.torch import load_file, save_file

    model, batch = make(made, zoo.adapter("lora", rank=2))
    sizes = {k: model.backbone_kwargs[k] for k in ("pixels", "frames") if k in model.backbone_kwargs}
    module: Any = model.backbone
    module.save_pretrained(tmp_path / "net")
    again = zoo.load(f"diffusers:{tmp_path / 'net'}", **sizes).eval()
    assert again.family.family == MEMBERS[made] == DESCRIBED[made]
    with torch.no_grad(), model.disable():
        assert torch.equal(again(*batch), model(*batch))
    file = next((tmp_path / "net").glob("*.safetensors"))
    whole = load_file(file)
    key = next(k for k, v in whole.items() if v.ndim == 2 and ("blocks" in k or "layers" in k))
    save_file({k: v for k, v in whole.items() if k != key}, file, {"format": "pt"})
    with pytest.raises(zoo.errors.WeightsError, match="lacks 1"):
        zoo.load(f"diffusers:{tmp_path / 'net'}")
    model.save_adapter(tmp_path / "saved")
    torch.manual_seed(0)
    loaded = zoo.load(adapter=tmp_path / "saved", pretrained=False)
    assert loaded.family._pixels == model.family._pixels  # type: ignore[attr-defined]


@EVERY
def test_options_of_a_saved_adapter_are_a_closed_list(made: str) -> None:
    """Every size of the class's configuration is on it, with its kind; nothing that says what is read, or how."""
    allowed = family(MEMBERS[made]).saved_options
    parameters = inspect.signature(getattr(diffusers, made).__init__).parameters
    free = {"self", "args", "kwargs"}
    assert set(parameters) - free <= set(allowed)
    assert set(family(MEMBERS[made]).members[made].tiny) <= set(allowed)  # type: ignore[attr-defined]
    assert not {"subfolder", "variant", "revision", "use_safetensors", "torch_dtype", "trust_remote_code"} & set(
        allowed
    )


SIZES = {  # parameters in millions, as the repositories' cards have it
    "wan-1.3b": (1_419, 300),
    "wan-14b": (14_289, 1000),
    "qwen-image": (20_430, 1000),
    "flux2-dev": (32_220, 1500),
    "chroma-hd": (8_900, 500),
    "hunyuan-video": (12_821, 1000),
    "z-image-turbo": (6_155, 700),
    "lumina2": (2_610, 300),
    "cogview4": (6_369, 700),
    "sana-1.6b": (1_605, 200),
    "ltx-video": (1_923, 300),
    "auraflow-0.3": (6_800, 500),
    "mochi-1": (10_030, 1000),
}


@pytest.mark.parametrize("alias", SIZES)
def test_sizes_of_what_is_released(alias: str) -> None:
    """Without a network and without memory; the count is the library's, LoRA's that of its modules."""
    model = zoo.load(alias, zoo.adapter("lora", targets="q,v", rank=8), device="meta")
    millions, room = SIZES[alias]
    assert abs(sum(p.numel() for p in model.backbone.parameters()) / 1e6 - millions) < room
    points = model.points.select("q,v", kind="linear")
    assert model.num_parameters(trainable=True) == 8 * sum(p.dim_in + p.dim_out for p in points)
    assert all(0 < p.stop <= p.module.weight.shape[0] for p in points)


@pytest.mark.parametrize("name", FAMILIES)
def test_bad_inputs_are_named(name: str) -> None:
    made = next(m for m, f in MEMBERS.items() if f == name)
    model, batch = make(made)
    latents, steps, text, *rest = batch
    with pytest.raises(zoo.errors.DataError, match=r"have \d+ channels; .* takes \d+"):
        model(torch.cat([latents, latents], dim=1), steps, text, *rest)
    with pytest.raises(zoo.errors.DataError, match="patches"):
        model(latents[..., :-1, :-1], steps, text, *rest)
    with pytest.raises(zoo.errors.DataError, match="latents are"):
        model(latents[0], steps, text, *rest)
    with pytest.raises(zoo.errors.DataError, match="timestep has shape"):
        model(latents, torch.tensor([1, 2, 3]), text, *rest)
    with pytest.raises(zoo.errors.DataError, match="as its text encoder makes them"):
        model(latents, steps, text[..., :-1], *rest)
    with pytest.raises(zoo.errors.DataError, match="inputs were given"):
        model(latents, steps, text, *rest, *rest, text, text)
    with pytest.raises(zoo.ZooError, match="does not take these options"):
        zoo.load(model.backbone_name, pretrained=False, no_such_setting=3)
    with pytest.raises(zoo.errors.ConfigError, match="multiples of"):
        zoo.load(
            model.backbone_name, pretrained=False, device="meta", **{**family(name).members[made].tiny, "pixels": 13}
        )  # type: ignore[attr-defined]


def test_sizes_that_are_asked_for() -> None:
    model, _ = make("OvisImageTransformer2DModel")
    assert model.image_size == (64, 64)
    with pytest.raises(zoo.errors.ConfigError, match="frames= is for videos"):
        zoo.load("qwen-image", device="meta", frames=4)
    video = zoo.load("wan-1.3b", device="meta", pixels=[240, 416], frames=17)
    assert video.family.data_config()["input_size"] == (3, 240, 416)
    assert tuple(video.example_batch(1)[0].shape) == (1, 16, 5, 30, 52)


def test_another_backend_of_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """More keys are put in where the processor calls torch's product; if it does not, that is said and not left out."""
    model, batch = make("WanTransformer3DModel", zoo.adapter("prefix", num_tokens=2))
    from diffusers.models.transformers import transformer_wan

    monkeypatch.setattr(
        transformer_wan, "dispatch_attention_fn", lambda q, k, v, **_: v if len(v[0]) == len(q[0]) else q
    )
    with pytest.raises(zoo.errors.AttachError, match="another backend of attention"):
        model(*batch)
