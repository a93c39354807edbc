"""LoRA files of other trainers, and `zoo convert`: kohya's names, alphas, text encoders, every way between the formats.

Seen before: kohya's files and files with parts for text encoders were refused without a way out, and the exchange stood in no
documentation and on no command line.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from diffusers_calls import make as make_class
from diffusion_models import library_answer, make

import zoo
from multimodal.families.diffusion.lora import FILE, load_lora_weights, save_lora_weights
from zoo.cli import app

SETTINGS = {"rank": 3, "alpha": 5.0, "targets": "all-linear"}


def kohya(model: Any, alpha: float | None = 5.0, rank: int = 3) -> dict[str, Tensor]:
    """The model's LoRA as kohya's scripts write it: not scaled, with alpha beside it."""
    found: dict[str, Tensor] = {}
    for point in model.adapters["lora"].selected(model.points):
        part = model.adapters["lora"].module_at(point)
        key = "lora_unet_" + point.path.replace(".", "_")
        found[f"{key}.lora_down.weight"] = part.lora_a.detach().clone()
        found[f"{key}.lora_up.weight"] = part.lora_b.detach().clone() * (1.0 if alpha else 5.0 / rank)
        if alpha:
            found[f"{key}.alpha"] = torch.tensor(alpha)
    return found


@pytest.mark.parametrize("alpha", [5.0, None])
@pytest.mark.parametrize("name", ["sd3", "cogvideox"])
def test_kohyas_files_are_read(name: str, alpha: float | None, tmp_path: Path) -> None:
    model, batch = make(name, zoo.adapter("lora", **SETTINGS))
    save_file(kohya(model, alpha), tmp_path / "style.safetensors")
    again, _ = make(name)
    assert load_lora_weights(again, tmp_path / "style.safetensors", "style") == "style"
    with torch.no_grad():
        torch.testing.assert_close(again(*batch), model(*batch), rtol=1e-5, atol=1e-5)


def test_names_of_the_authors_are_read_by_the_library(tmp_path: Path) -> None:
    """Flux has other names in its authors' code, and fused projections: the pipeline's own reader says what they are."""
    from diffusers import FluxPipeline

    model, batch = make("flux")
    width, rank = 32, 2
    shapes = {
        "double_blocks_0_img_attn_qkv": 3 * width,
        "double_blocks_0_txt_attn_proj": width,
        "double_blocks_0_img_mod_lin": 6 * width,
    }
    torch.manual_seed(7)
    tensors: dict[str, Tensor] = {}
    for key, rows in shapes.items():
        tensors[f"lora_unet_{key}.lora_down.weight"] = torch.randn(rank, width) * 0.2
        tensors[f"lora_unet_{key}.lora_up.weight"] = torch.randn(rows, rank) * 0.2
        tensors[f"lora_unet_{key}.alpha"] = torch.tensor(4.0)
    save_file(tensors, tmp_path / "flux.safetensors")
    load_lora_weights(model, tmp_path / "flux.safetensors")
    module: Any = model.backbone
    twin = type(module).from_config(module.config).eval()
    twin.load_state_dict(module.state_dict())
    state = FluxPipeline.lora_state_dict({k: v.clone() for k, v in tensors.items()})
    twin.load_lora_adapter(state, prefix="transformer")
    with torch.no_grad():
        torch.testing.assert_close(model(*batch), library_answer("flux", twin, batch), rtol=1e-5, atol=1e-5)
        with model.disable():
            assert not torch.allclose(model(*batch), library_answer("flux", twin, batch), atol=1e-3)


@pytest.mark.parametrize(
    "part", ["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "text_encoder.x.lora_A.weight"]
)
def test_text_encoders_are_named_and_left_out_on_request(part: str, tmp_path: Path) -> None:
    model, batch = make("sd3", zoo.adapter("lora", **SETTINGS))
    file = save_lora_weights(model, tmp_path)
    save_file({**load_file(file), part: torch.ones(2, 2)}, file)
    again, _ = make("sd3")
    with pytest.raises(zoo.errors.ConfigError, match=r"also adapts text_encoder;.*leave_out=True"):
        load_lora_weights(again, file)
    assert not again.adapters
    load_lora_weights(again, file, leave_out=True)
    with torch.no_grad():
        torch.testing.assert_close(again(*batch), model(*batch), rtol=1e-5, atol=1e-5)
    save_file({part: torch.ones(2, 2)}, file)
    with pytest.raises(zoo.errors.ConfigError, match="and no 'transformer'"):
        load_lora_weights(make("sd3")[0], file, leave_out=True)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model, _ = make("sd3", zoo.adapter("lora", **SETTINGS))
    tensors = kohya(model)
    first = next(iter(tensors))
    other, _ = make("sd3")
    cases = {
        "of modules that sd3": {**tensors, "lora_unet_no_such.lora_up.weight": torch.ones(2, 2)},
        "lacks lora_A or lora_B": {k: v for k, v in tensors.items() if k != first},
        "finite numbers": {**tensors, first: tensors[first] * float("nan")},
    }
    for words, content in cases.items():
        save_file(content, tmp_path / "bad.safetensors")
        with pytest.raises(
            zoo.ZooError, match=words.replace("of modules that sd3", "adapts modules that sd3-medium does not have")
        ):
            load_lora_weights(other, tmp_path / "bad.safetensors")
        assert not other.adapters
    save_file({"lora_unet_input_blocks_1.lora_down.weight": torch.ones(2, 2)}, tmp_path / "bad.safetensors")
    with pytest.raises(zoo.errors.WeightsError, match="Check that the file is for this network"):
        load_lora_weights(make_class("WanTransformer3DModel")[0], tmp_path / "bad.safetensors")


def test_zoo_convert(tmp_path: Path) -> None:
    """diffusers' folder -> ours -> peft and diffusers -> ours: always the same outputs."""
    model, batch = make("sd3", zoo.adapter("lora", **SETTINGS))
    net = f"diffusers:{tmp_path / 'net'}"
    model.backbone.save_pretrained(tmp_path / "net")  # type: ignore[operator]
    save_file(kohya(model), tmp_path / "style.safetensors")
    run = CliRunner().invoke

    def converted(source: str, to: str, out: str, *more: str) -> dict[str, Any]:
        result = run(
            app, ["convert", str(tmp_path / source), "--to", to, "--out", str(tmp_path / out), "--json", *more]
        )
        assert result.exit_code == 0, result.output
        return json.loads(result.output)

    assert converted("style.safetensors", "zoo", "ours", "--backbone", net)["from"] == "diffusers"
    assert converted("ours", "diffusers", "lib", "--trust-backbone")["out"] == str(tmp_path / "lib" / FILE)
    assert converted("ours", "peft", "peft", "--trust-backbone")["to"] == "peft"
    assert converted("lib", "zoo", "again", "--backbone", net)["adapter"] == "lora"
    assert converted("peft", "zoo", "third", "--backbone", net)["from"] == "peft"
    with torch.no_grad():
        for folder in ("ours", "again", "third"):
            loaded = zoo.load(adapter=tmp_path / folder, trust_backbone=True).eval()
            torch.testing.assert_close(loaded(*batch), model(*batch), rtol=1e-5, atol=1e-5)
    for arguments, words in (
        (["style.safetensors", "--to", "zoo"], "which backbone it is for"),
        (["style.safetensors", "--to", "onnx"], "--to is 'onnx'"),
        (["style.safetensors", "--to", "zoo", "--backbone", "vit-micro"], "no network of diffusers"),
    ):
        result = run(app, ["convert", str(tmp_path / arguments[0]), *arguments[1:], "--out", str(tmp_path / "x")])
        assert result.exit_code == 1 and words in " ".join(result.output.replace("│", " ").split()), result.output
        assert not (tmp_path / "x").exists()
