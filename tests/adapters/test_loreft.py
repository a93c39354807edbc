"""LoReFT: rows that stay orthonormal, edits inside of a subspace at chosen tokens, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from zoo.adapters.loreft import FORMS
from zoo.errors import ConfigError, ZooError

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3}
SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}


def build(name: str = "vit-micro", dtype: torch.dtype | None = None, **config: Any) -> Any:
    torch.manual_seed(0)
    sizes = SWIN if name == "swin-t" else SMALL
    adapter = zoo.adapter("loreft", **{"rank": 3, **config})
    return zoo.load(name, adapter, num_classes=5, pretrained=False, dtype=dtype, **sizes).eval()


def behind(model: Any, images: Tensor, block: str = "blocks.0") -> tuple[Tensor, Tensor]:
    """The output of a block without and with the adapter."""
    found = []
    for on in (False, True):
        model.set_active(*(["loreft"] if on else []))
        handle = model.backbone.get_submodule(block).register_forward_hook(lambda m, x, y: found.append(y.detach()))
        model(images)
        handle.remove()
    return found[0], found[1]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_starts_at_nothing_in_any_precision(form: str, dtype: torch.dtype) -> None:
    model = build(dtype=dtype, form=form)
    images = torch.randn(2, 3, 32, 32, dtype=dtype)
    adapted = model(images)
    with model.disable():
        assert torch.equal(model(images), adapted)
    other = build(dtype=dtype, form=form, init="random")
    with other.disable():
        bare = other(images)
    assert not torch.equal(other(images), bare)


def test_cast_after_training_keeps_what_was_trained() -> None:
    model = build()
    part = model.adapters["loreft"].module_at("blocks.0")
    with torch.no_grad():
        part.reft_source.weight.add_(0.1)
    before = part.reft_source.weight.clone()
    assert torch.equal(model.double().adapters["loreft"].module_at("blocks.0").reft_source.weight, before.double())


def test_rows_stay_orthonormal_while_they_move() -> None:
    model = build().train()
    images, targets = torch.randn(4, 3, 32, 32), torch.arange(4)
    parts = [model.adapters["loreft"].module_at(f"blocks.{i}") for i in range(2)]
    before = [p.basis().detach().clone() for p in parts]
    optimizer = torch.optim.AdamW(model.parameters_to_train().values(), lr=0.1, weight_decay=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), targets).backward()
        optimizer.step()
        for part in parts:
            torch.testing.assert_close(part.basis() @ part.basis().T, torch.eye(3), rtol=0, atol=1e-5)
    assert all((p.basis() - b).abs().max() > 0.05 for p, b in zip(parts, before))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = parts[0].basis()
    torch.testing.assert_close(rows @ rows.T, torch.eye(3), rtol=0, atol=1e-5)


def test_edits_stay_in_the_subspace_and_at_the_positions() -> None:
    """The first n tokens move inside of the span of R's rows, by the equation; the others stay, to the bit."""
    model = build(init="random", positions=4)
    part = model.adapters["loreft"].module_at("blocks.0")
    without, with_it = behind(model, torch.randn(2, 3, 32, 32))
    assert torch.equal(without[:, 4:], with_it[:, 4:])
    rows, h = part.basis().detach(), without[:, :4]
    change = with_it[:, :4] - h
    torch.testing.assert_close(change, change @ rows.T @ rows, rtol=1e-4, atol=1e-5)
    expected = h @ part.reft_source.weight.T + part.reft_source.bias
    torch.testing.assert_close(with_it[:, :4] @ rows.T, expected, rtol=1e-4, atol=1e-5)  # R h' = W h + b


def test_places_of_maps_row_by_row() -> None:
    model = build("swin-t", init="random", positions=10, targets="stages.0.blocks.0")
    without, with_it = behind(model, torch.randn(2, 3, 32, 32), "layers.0.blocks.0")
    assert without.shape[1:3] == (8, 8)
    changed = (without != with_it).any(dim=-1).flatten(1)
    assert changed[:, :10].all() and not changed[:, 10:].any()


def test_refused() -> None:
    for config, message in (
        ({"rank": 0}, "rank is 0"),
        ({"positions": 0}, "positions is 0"),
        ({"form": "reft"}, "reft"),
        ({"init": "zero"}, "zero"),
        ({"dropout": -0.1}, "dropout is -0.1"),
    ):
        with pytest.raises(ConfigError, match=message):
            zoo.adapter("loreft", **config)
    with pytest.raises(ConfigError, match=r"rank is 49, and tokens at 'blocks.0' have 48"):
        build(rank=49)
    with pytest.raises(ConfigError, match=r"positions is 99, and behind 'blocks.0' there are 65 tokens"):
        build(positions=99)(torch.randn(1, 3, 32, 32))
    with pytest.raises(ZooError, match="cannot be merged"):
        build().merge()
