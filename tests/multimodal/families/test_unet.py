"""Stable Diffusion's UNet: the library's numbers, nothing dead, exact merges, LoRA to and from the formats of others."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

pytest.importorskip("diffusers")

import diffusers
from diffusion_models import prepended

import zoo
from multimodal.families.diffusion.lora import load_lora_weights, save_lora_weights
from multimodal.families.diffusion.unet import UNet
from multimodal.tasks.diffuse import Diffuse

TINY: dict[str, Any] = UNet.tiny[1]  # type: ignore[index]
MORE = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 34,
    "use_linear_projection": True,
    "transformer_layers_per_block": (2, 1),
}
KINDS = {"sd15": TINY, "sdxl": {**TINY, **MORE}}
EVERY = pytest.mark.parametrize("name", KINDS)


def make(name: str, *adapters: Any) -> tuple[Any, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model = zoo.load(name, pretrained=False, **KINDS[name]).eval()
    batch = model.family.tiny_batch()
    torch.manual_seed(1)
    for adapter in adapters:
        model.add_adapter(adapter)
    with torch.no_grad():
        for parameter in model.parameters_to_train().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, batch


def library(module: Any, batch: tuple[Tensor, ...]) -> Tensor:
    latents, steps, text, *pooled = batch
    more: dict[str, Any] = {}
    if pooled:
        more["added_cond_kwargs"] = {"text_embeds": pooled[0], "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}
    return module(latents, steps, text, **more).sample


def twin_of(module: Any) -> Any:
    twin = type(module).from_config(module.config).eval()
    twin.load_state_dict(module.state_dict())
    return twin.requires_grad_(False)  # torch picks its attention kernel by whether a gradient is wanted


@EVERY
def test_it_is_the_library(name: str) -> None:
    model, batch = make(name)
    twin = twin_of(model.backbone)
    assert type(model.backbone) is diffusers.UNet2DConditionModel
    with torch.no_grad():
        assert torch.equal(model(*batch), library(twin, batch))
        model.add_adapter("lora")
        model.add_adapter("prefix")
        with model.disable():
            assert torch.equal(model(*batch), library(twin, batch))


FORMS = [
    zoo.adapter("lora", rank=2, targets="all-linear"),
    zoo.adapter("lora", rank=2, targets=("modulation", "time")),
    zoo.adapter("ia3"),
    zoo.adapter("ssf"),
    zoo.adapter("norm"),
    zoo.adapter("bitfit"),
    zoo.adapter("full"),
    zoo.adapter("adapter", form="houlsby", rank=3),
    zoo.adapter("adapter", form="parallel", rank=3),
    zoo.adapter("prefix", num_tokens=3),
]


@EVERY
def test_nothing_is_dead(name: str) -> None:
    model, batch = make(name)
    frozen = copy.deepcopy(model.backbone.state_dict())
    for adapter in FORMS:
        attached = model.add_adapter(adapter)
        with torch.no_grad():
            for parameter in attached.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        assert model.probe(*batch) == [], adapter
        for parameter in model.parameters_to_train().values():
            parameter.grad = None
        model(*batch).square().sum().backward()
        dead = [k for k, p in model.parameters_to_train().items() if p.grad is None or not p.grad.any()]
        assert dead == [], adapter
        if attached.method in ("lora", "ia3", "norm", "bitfit"):
            with torch.no_grad():
                torch.testing.assert_close(library(model.merge(), batch), model(*batch), rtol=1e-4, atol=1e-5)
        model.remove_adapter(next(iter(model.active)))
    assert all(torch.equal(value, frozen[key]) for key, value in model.backbone.state_dict().items())


@EVERY
def test_every_projection_convolution_and_norm_is_a_point(name: str) -> None:
    model, _ = make(name)
    modules = dict(model.backbone.named_modules())
    linears = {n for n, m in modules.items() if isinstance(m, (nn.Linear, nn.Conv2d))}
    normed = {n for n, m in modules.items() if isinstance(m, (nn.LayerNorm, nn.GroupNorm))}
    assert {p.path for p in model.points if p.kind == "linear"} == linears
    assert {p.path for p in model.points if p.kind == "norm"} == normed


def test_counts() -> None:
    """Those of the released networks, and of the LoRA that diffusers' own training script makes of rank 4."""
    model = zoo.load("sd15", zoo.adapter("lora", rank=4, targets="q,k,v,o"), device="meta")
    assert sum(p.numel() for p in model.backbone.parameters()) == 859_520_964
    assert model.num_parameters(trainable=True) == 797_184
    assert sum(p.numel() for p in zoo.load("sdxl", device="meta").backbone.parameters()) == 2_567_463_684


def test_prefixes_equal_the_straightforward_form() -> None:
    model, batch = make("sd15", zoo.adapter("prefix", num_tokens=3))
    with torch.no_grad():
        output = model(*batch)
        with model.disable():
            for point in model.points.select(kind="attention"):
                own = model.adapters["prefix"].get_submodule(point.name)
                point.module.processor = prepended(point.module.processor, own)
            torch.testing.assert_close(output, library(model.backbone, batch), rtol=1e-5, atol=1e-5)


@EVERY
def test_lora_to_and_from_the_library(name: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model, batch = make(name, zoo.adapter("lora", rank=2, alpha=5.0, targets="q,k,v,o,down"))
    file = save_lora_weights(model, tmp_path, prefix="unet")
    twin = twin_of(model.backbone)
    twin.load_lora_adapter(str(tmp_path), prefix="unet", weight_name=file.name)
    with torch.no_grad():
        expected = model(*batch)
        torch.testing.assert_close(library(twin, batch), expected, rtol=1e-5, atol=1e-5)
        again, _ = make(name)
        again.family.read_lora(again, str(tmp_path))
        torch.testing.assert_close(again(*batch), expected, rtol=1e-5, atol=1e-5)
    kohya: dict[str, Tensor] = {}
    for point in model.adapters["lora"].selected(model.points):
        part, key = model.adapters["lora"].module_at(point), "lora_unet_" + point.path.replace(".", "_")
        kohya |= {f"{key}.lora_down.weight": part.lora_a.detach().clone(), f"{key}.alpha": torch.tensor(5.0)}
        kohya[f"{key}.lora_up.weight"] = part.lora_b.detach().clone()
    save_file(kohya, tmp_path / "style.safetensors")
    third, _ = make(name)
    load_lora_weights(third, tmp_path / "style.safetensors", prefix="unet")
    with torch.no_grad():
        torch.testing.assert_close(third(*batch), expected, rtol=1e-5, atol=1e-5)


@EVERY
def test_folders_training_and_bad_input(name: str, tmp_path: Path) -> None:
    model, batch = make(name, zoo.adapter("lora", rank=2))
    model.backbone.save_pretrained(tmp_path / "pipe" / "unet")
    again = zoo.load(f"diffusers:{tmp_path / 'pipe'}").eval()
    assert again.family.family == "unet"
    with torch.no_grad(), model.disable():
        assert torch.equal(again(*batch), model(*batch))
    latents, steps, text, *pooled = batch
    items = [((latents[i % 2], text[i % 2], *(p[i % 2] for p in pooled)), 0) for i in range(4)]
    for scheduler in (None, diffusers.DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)):
        task = Diffuse(scheduler)
        before = zoo.evaluate(model, items, task=task, batch_size=4)["loss"]
        zoo.fit(model, items, task=task, epochs=10, batch_size=4, lr=1e-2, seed=0)
        assert zoo.evaluate(model, items, task=task, batch_size=4)["loss"] < before
    with pytest.raises(zoo.errors.DataError, match="channels"):
        model(latents[:, :2], steps, text, *pooled)
    with pytest.raises(zoo.errors.DataError, match="text encoder"):
        model(latents, steps, text[..., :2], *pooled)
    with pytest.raises(zoo.errors.DataError, match="pooled"):
        model(latents, steps, text, *([] if pooled else [text[:, 0]]))
