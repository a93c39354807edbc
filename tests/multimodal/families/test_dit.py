"""DiT: counts, its blocks written out by hand, labels, and `dit-micro`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("diffusers")

from diffusion_models import make

import zoo


@pytest.mark.parametrize("name", ["dit-xl2", "dit-xl2-512"])
def test_count_of_xl2(name: str) -> None:
    model = zoo.load(name, device="meta")
    assert model.num_parameters() == 749_826_464
    # One pair of embeddings for all blocks, and the position numbers counted, gives the count of the authors' code
    pair = 256 * 1152 + 1152 + 1152 * 1152 + 1152 + 1001 * 1152
    assert 749_826_464 - 27 * pair + 256 * 1152 == 675_129_632
    lora = zoo.load(name, zoo.adapter("lora", rank=8, targets="all-linear"), device="meta")
    assert lora.num_parameters(trainable=True) == 28 * 8 * (4 * (1152 + 1152) + 2 * (1152 + 4608))
    prefix = zoo.load(name, "prefix", device="meta")
    assert prefix.num_parameters(trainable=True) == 28 * 2 * 10 * 1152


def test_points() -> None:
    model = zoo.load("dit-xl2", device="meta")
    points = model.points
    assert points.roles() == (
        *("patch", "time", "class", "modulation", "q", "k", "v", "attn", "o", "up", "down", "mlp", "block", "final"),
    )
    assert points["blocks.27.modulation"].dim_out == 6 * 1152
    assert (points["final"].dim_in, points["final"].dim_out) == (1152, 2 * 2 * 8)
    time, label = points["blocks.3.condition.time"], points["blocks.3.condition.class"]
    assert (time.dim_in, time.dim_out, label.dim_in, label.dim_out) == (256, 1152, 0, 1152)
    assert points["blocks.0.attn.product"].head_dim == 72
    named = {p.path for p in points if p.kind == "linear"}
    linears = {n for n, m in model.backbone.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    assert named == linears  # nothing is out of reach


@pytest.mark.parametrize("source", ["input", "residual", "after"])
def test_a_block_by_hand(source: str) -> None:
    """The equations of `multimodal.families.diffusion.dit`, with an adapter in each sublayer."""
    if source == "after":
        adapter = zoo.adapter("adapter", form="houlsby", rank=3)
    else:
        adapter = zoo.adapter("adapter", form="parallel", rank=3, targets=("attn", "mlp"), source=source)
    model, batch = make("dit", adapter)
    parts = model.adapters["adapter"]
    block: Any = model.backbone.transformer_blocks[0]  # type: ignore[index]
    x = torch.randn(2, 4, 16)
    steps, labels = batch[1:]
    with torch.no_grad():
        ours = block(x, timestep=steps, class_labels=labels)
        with model.disable():
            condition = block.norm1.emb(steps, labels, hidden_dtype=x.dtype)
            a1, b1, g1, a2, b2, g2 = block.norm1.linear(torch.nn.functional.silu(condition))[:, None].chunk(6, dim=-1)

            def branch(name: str, stream: Tensor, inner: Tensor, output: Tensor) -> Tensor:
                part: Any = parts.get_submodule(f"blocks.0.{name}")
                if source == "after":
                    return part(output)
                return output + part(inner if source == "input" else stream)

            z = torch.nn.functional.layer_norm(x, (16,), eps=1e-6) * (1 + b1) + a1
            u = x + g1 * branch("attn", x, z, block.attn1(z))
            z = torch.nn.functional.layer_norm(u, (16,), eps=1e-5) * (1 + b2) + a2
            expected = u + g2 * branch("mlp", u, z, block.ff(z))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_labels() -> None:
    model, (latents, steps, _) = make("dit")
    assert model.family.num_classes == 10  # type: ignore[attr-defined]
    model(latents, steps, torch.tensor([9, 10]))  # 10: no class
    model(latents, steps, [0, 1])
    for wrong in (11, -1):
        with pytest.raises(zoo.errors.DataError, match=rf"class label {wrong} is outside the 10 classes .*0\.\.9"):
            model(latents, steps, torch.tensor([3, wrong]))
    for odd in (torch.tensor([1]), torch.tensor([1.0, 2.0]), torch.tensor([[1, 2]])):
        with pytest.raises(zoo.errors.DataError, match="class_labels are"):
            model(latents, steps, odd)
    with pytest.raises(zoo.errors.DataError, match="4 inputs were given; a DiT takes three"):
        model(latents, steps, torch.tensor([3, 4]), torch.tensor([0, 1]))
    with pytest.raises(zoo.errors.DataError, match="not square"):
        model(torch.cat([latents, latents], dim=-1), steps, torch.tensor([3, 4]))


def test_micro() -> None:
    model = zoo.load("dit-micro", pretrained=False)
    assert 2 * model.num_parameters() < 8e6  # bytes in fp16
    assert model.image_size == (32, 32)
    images = model.preprocess()(Image.new("RGB", (40, 32), (255, 0, 127)))
    assert images.shape == (3, 32, 32)
    torch.testing.assert_close(images[:, 0, 0], torch.tensor([1.0, -1.0, -1 / 255]))
    with torch.no_grad():
        assert model(images[None], 10, [3]).shape == (1, 3, 32, 32)
    from multimodal.families.diffusion.dit import WEIGHTS

    if not (WEIGHTS / "dit-micro.safetensors").is_file():
        with pytest.raises(zoo.errors.ConfigError, match="no pretrained weights of 'dit-micro'"):
            zoo.load("dit-micro")


def test_loading_without_the_network_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(zoo.errors.ConfigError, match=r"could not be loaded.*pretrained=False"):
        zoo.load("dit-xl2")


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(zoo.errors.MissingPackageError, match=r"adapter-zoo\[multimodal\]"):
        zoo.load("dit-micro", pretrained=False)
