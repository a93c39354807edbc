"""GroupMamba against the paper's counts, the released key layout, and numbers recorded from the authors' code.

`groupmamba.json` holds the keys of the authors' module, and what Amshaker/GroupMamba (commit c1800ed) gives in float64 with the
weights and images of `chirp`: the first and last three values and the norm of each image's features, the logits, and the
gradients of some parameters. Their scan exists for GPUs only, so the recurrence written token by token took its place. The
network has four stages of widths 16 to 64. Features and logits are of 64 x 96 images; the gradients are of square ones, since the
authors' backward of the fourth order of tokens is right on square maps only (finite differences agree with ours on both).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from vision.families.groupmamba.network import GroupMamba

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "groupmamba.json").read_text())
SMALL: dict[str, Any] = {
    "stem_hidden_dim": 8,
    "embed_dims": [16, 32, 48, 64],
    "depths": [1, 2, 1, 1],
    "mlp_ratios": [8, 8, 4, 4],
    "num_classes": 5,
}


def chirp(shape: tuple[int, ...], phase: int, scale: float) -> Tensor:
    """Values in (-scale, scale) that are the same on every machine: fractions of quadratic multiples of the golden ratio."""
    n = torch.arange(math.prod(shape), dtype=torch.float64)
    return (scale * (((n + phase) ** 2 * 0.6180339887498949) % 1 * 2 - 1)).view(shape)


@torch.no_grad()
def fill(state: dict[str, Tensor]) -> None:
    for i, (key, value) in enumerate(sorted(state.items())):
        shape = tuple(value.shape)
        if not value.is_floating_point():
            continue
        if key.endswith(("running_var", "skip_scale", "Ds")) or (key.endswith("weight") and value.dim() == 1):
            value.copy_(1 + chirp(shape, i, 0.3))
        elif key.endswith(("bias", "running_mean")):
            value.copy_(chirp(shape, i, 0.1) - (2 if key.endswith("dt_projs_bias") else 0))
        elif key.endswith("A_logs"):
            value.copy_(chirp(shape, i, 1.0))
        else:
            value.copy_(chirp(shape, i, 2 / math.sqrt(value[0].numel())))


def summary(values: Tensor) -> Tensor:
    flat = values.detach().flatten().double()
    return torch.cat([flat[:3], flat[-3:], flat.norm()[None]])


def check(found: Tensor, expected: list[float], tolerance: float) -> None:
    """In units of the recorded norm, the last of the numbers."""
    wanted = torch.tensor(expected, dtype=torch.float64)
    assert (found - wanted).abs().max() <= tolerance * max(1.0, float(wanted[-1]))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 5e-5)])
def test_outputs_and_gradients(dtype: torch.dtype, tolerance: float) -> None:
    model = GroupMamba(**SMALL).double().eval()
    assert sorted(model.state_dict()) == RECORDED["keys"]
    fill(model.state_dict())
    model.to(dtype)
    images = chirp((2, 3, 64, 96), 7, 2.0).to(dtype)
    with torch.no_grad():
        for found, expected in zip(model.forward_features(images), RECORDED["features"], strict=True):
            check(summary(found), expected, tolerance)
        for found, expected in zip(model(images), RECORDED["logits"], strict=True):
            size = math.hypot(*expected)
            check(torch.cat([found.double(), found.double().norm()[None]]), [*expected, size], tolerance)
    if dtype == torch.float32:
        return  # the gradients of these weights are large sums of both signs

    features = model.forward_features(chirp((2, 3, 64, 64), 11, 2.0).to(dtype))
    (features * chirp((features.shape[1],), 2, 1.0).to(dtype)).sum(dim=1).square().sum().backward()
    for key, expected in RECORDED["gradients"].items():
        gradient = model.get_parameter(key).grad
        assert gradient is not None
        check(summary(gradient), expected, tolerance)


@pytest.mark.parametrize(
    ("name", "both", "features"),
    [
        ("groupmamba-t", 23_361_917, 22_463_917),
        ("groupmamba-s", 34_781_555, 33_755_555),
        ("groupmamba-b", 57_150_838, 56_124_838),
    ],
)
def test_counts(name: str, both: int, features: int) -> None:
    model = zoo.load(name, pretrained=False, device="meta")
    assert model.num_parameters() == both  # with the released classifier, which is two heads
    assert model.num_parameters(head=False) == features


def test_one_head_of_its_own() -> None:
    model = zoo.load("groupmamba-t", "full", pretrained=False, device="meta", num_classes=1000)
    assert model.num_parameters(trainable=True) == 22_912_917


def test_first_block_of_tiny() -> None:
    backbone: Any = zoo.load("groupmamba-t", pretrained=False, device="meta").backbone
    block = backbone.block1[0]
    assert sum(p.numel() for p in block.parameters()) == 80_517
    assert sum(p.numel() for p in block.attn.parameters()) == 9_157
