"""PERP against numbers recorded from the authors' code (ZIB-IOL/PERP), and the counts on ViT-B/16.

`perp.json` holds, in float32: outputs, gradients and merged weights of their MaskLoRA and ScaleLoRA layers; what their pruning
loop leaves of one projection, by every criterion and pattern; and what it makes of the two blocks of a ViT that it prunes 2:4
and reconstructs for 30 steps by biases and norms. Weights and images are those of `waves`, the projection's inputs numpy's. A
tensor is its first three values, its norm and its sum.

Their unstructured masks are recorded at a sparsity of 0.499, where their threshold, which takes one entry more than asked for,
removes the half; at 0.5 it removes one entry more in each weight, SparseGPT's in each group of columns (`free_0.5`). Their
ScaleLoRA layer raises as it is (a dropout that is not defined, here the identity), and from its own start never leaves rank 1.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from waves import SMALL, fill, summary, wave

import zoo
from zoo.adapters.parts.masked import Masked
from zoo.adapters.parts.pruning import largest, pattern_of, sparsegpt

AUTHORS: dict[str, Any] = json.loads((Path(__file__).parent / "perp.json").read_text())


def same(found: Tensor, recorded: list[float], rtol: float = 1e-5, atol: float = 1e-5) -> None:
    torch.testing.assert_close(torch.tensor(summary(found)), torch.tensor(recorded), rtol=rtol, atol=atol)


@pytest.mark.parametrize("update", ["mask", "scale"])
def test_layers(update: str) -> None:
    weight = wave((10, 12), 1, 0.5).float()
    mask = wave((10, 12), 3, 1.0) <= 0.2
    part = Masked(mask, None, update, rank=4, scale=2.0)
    with torch.no_grad():
        part.lora_a.copy_(wave((4, 12), 4, 0.4))  # type: ignore[union-attr]
        part.lora_b.copy_(wave((10, 4), 5, 0.4))  # type: ignore[union-attr]
    x, bias = wave((2, 5, 12), 6, 1.0).float().requires_grad_(True), wave((10,), 2, 0.3).float()
    recorded = AUTHORS[update]
    y = Masked.linear_group(((part, 0, 10),), torch.nn.functional.linear, x, weight, bias)
    (y * wave((2, 5, 10), 3, 1.0).float()).sum().backward()
    same(y.detach(), recorded["output"])
    for found, name in ((x, "x"), (part.lora_a, "a"), (part.lora_b, "b")):
        assert found is not None and found.grad is not None
        same(found.grad, recorded[name])
    merged = part(weight).detach()
    same(merged, recorded["merged"])
    assert int((merged == 0).sum()) == recorded["zeros"] == int((~mask).sum())


def test_scale_lora_leaves_rank_one() -> None:
    """Theirs starts with equal directions, which get equal gradients for good; ours starts as B A = 1, too, and does not."""
    assert AUTHORS["scale_raises_as_shipped"] == "AttributeError"
    value, *spread = AUTHORS["scale_start"]
    assert value == 4**-0.5 and spread == [0, 0]
    first, *others = AUTHORS["scale_singular_values_after_20_steps"]
    assert max(others) < 1e-6 * first
    torch.manual_seed(0)
    part = Masked(torch.ones(10, 12, dtype=torch.bool), None, "scale", rank=4, scale=1.0)
    a, b = part.lora_a, part.lora_b
    assert a is not None and b is not None and torch.equal(b @ a, torch.ones(10, 12))
    optimizer = torch.optim.AdamW([a, b], lr=0.02, weight_decay=0.0)
    weight = wave((10, 12), 1, 0.5).float()
    for step in range(20):
        optimizer.zero_grad()
        y = wave((2, 5, 12), step, 1.0).float() @ part(weight).T
        (y - wave((2, 5, 10), step + 3, 1.0).float()).square().mean().backward()
        optimizer.step()
    values = torch.linalg.svdvals((b @ a).detach())
    assert values[1] > 0.01 * values[0]


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt"])
def test_masks_and_weights(criterion: str) -> None:
    weight = wave((6, 160), 1, 0.5).float() * (1 + wave((6, 160), 3, 0.5).float())
    x = np.random.RandomState(5).standard_normal((3, 80, 160)) * (1 + np.arange(160) % 7)
    tokens = torch.from_numpy(x).reshape(-1, 160)
    for label in ("free", "2:4", "4:8"):
        pattern = None if label == "free" else pattern_of(label)
        left = weight
        if criterion == "sparsegpt":
            mask, change = sparsegpt(weight, tokens.T @ tokens / len(tokens), 0.5, pattern)
            left = weight + change
        else:
            scores = weight.abs() * (tokens.norm(dim=0).float() if criterion == "wanda" else 1)
            mask = largest(scores, 0.5, pattern)
        recorded = AUTHORS["layer"][f"{criterion} {label}"]
        assert int((~mask).sum()) == recorded["gone"] == 480
        assert np.packbits(mask.numpy()).tobytes().hex() == recorded["mask"]
        same(
            left * mask, recorded["weight"], rtol=1e-4 if criterion == "sparsegpt" else 1e-5
        )  # theirs inverts in float32
    assert AUTHORS["layer"][f"{criterion} free_0.5"]["gone"] == 480 + (2 if criterion == "sparsegpt" else 1)


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt"])
def test_blocks_reconstructed(criterion: str) -> None:
    recorded = AUTHORS[f"blocks {criterion}"]
    adapter = zoo.adapter(
        "perp",
        criterion=criterion,
        pattern="2:4",
        update="none",
        reconstruct=30,
        reconstruct_lr=5e-3,
    )
    model = zoo.load("vit-micro", adapter, num_classes=3, pretrained=False, **SMALL).eval()
    perp: Any = model.adapters["perp"]
    fill(dict(model.backbone.named_parameters()))
    model.remove_adapter("perp")  # masks and trained copies are of the weights that are there when it is attached
    perp = model.add_adapter(adapter)
    images = torch.stack([wave((3, 32, 32), i, 1.0) for i in range(6)]).float()
    perp.calibrate(model, [(part, torch.zeros(2, dtype=torch.long)) for part in images.split(2)])
    errors = [e for pair in perp.plan["errors"].values() for e in pair]
    torch.testing.assert_close(torch.tensor(errors), torch.tensor(recorded["errors"]), rtol=1e-3, atol=1e-7)
    merged = model.merge().state_dict()
    same(merged["blocks.1.attn.qkv.weight"], recorded["qkv"], rtol=1e-4)
    same(merged["blocks.1.mlp.fc1.bias"], recorded["fc1_bias"], rtol=1e-4, atol=1e-4)
    same(merged["blocks.0.norm2.weight"], recorded["norm2"], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        same(model.features(images), recorded["features"], rtol=1e-3, atol=1e-3)


def test_counts_on_vit_b16() -> None:
    model = zoo.load("vit-b16", pretrained=False, num_classes=0, device="meta")
    for settings, count in (
        ({"update": "none", "norm": False}, 102_912),
        ({"update": "none"}, 122_112),
        ({"bias": False, "norm": False}, 2_654_208),
        ({"bias": False, "norm": False, "update": "scale"}, 2_654_208),
        ({}, 2_654_208 + 122_112),
    ):
        model.add_adapter(zoo.adapter("perp", **settings), "perp")
        assert model.num_parameters(trainable=True) == count, settings
        model.remove_adapter("perp")
