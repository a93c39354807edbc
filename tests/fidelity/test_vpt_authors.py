"""VPT against the paper's counts and against numbers recorded from the authors' code.

`vpt.json` holds what KMnP/vpt (commit 4410440) gives in float64 with the weights, prompts and images of `chirp` below: the
first and last three values and the norm of each image's features, and of the gradient of each prompt (of the loss in `check`).
Its networks are a ViT of 3 blocks (width 48, 3 heads, 32 px in patches of 8) and a Swin of 4 stages of 2 blocks (width 12,
windows of 2, 64 px). The authors' shallow form on Swin mixes the images of a batch, so there it is one image.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo

RECORDED: dict[str, dict[str, list[list[float]]]] = json.loads((Path(__file__).parent / "vpt.json").read_text())
VIT: dict[str, Any] = {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
SWIN: dict[str, Any] = {
    "img_size": 64,
    "window_size": 2,
    "embed_dim": 12,
    "depths": (2, 2, 2, 2),
    "num_heads": (1, 2, 3, 4),
}
TOKENS = 3


def chirp(shape: tuple[int, ...], phase: int, scale: float) -> Tensor:
    """Values in (-scale, scale) that are the same on every machine: fractions of quadratic multiples of the golden ratio."""
    n = torch.arange(math.prod(shape), dtype=torch.float64)
    return (scale * (((n + phase) ** 2 * 0.6180339887498949) % 1 * 2 - 1)).view(shape)


@torch.no_grad()
def fill(named: dict[str, Tensor]) -> None:
    for i, (key, parameter) in enumerate(sorted(named.items())):
        shape = tuple(parameter.shape)
        if "norm" in key and key.endswith("weight"):
            parameter.copy_(1 + chirp(shape, i, 0.2))
        elif key.endswith("bias"):
            parameter.copy_(chirp(shape, i, 0.1))
        elif "token" in key or "pos_embed" in key or "table" in key:
            parameter.copy_(chirp(shape, i, 1.0))
        else:
            parameter.copy_(chirp(shape, i, 3 / math.sqrt(parameter[0].numel())))


def summary(values: Tensor) -> Tensor:
    flat = values.detach().flatten()
    return torch.cat([flat[:3], flat[-3:], flat.norm()[None]])


def check(name: str, model: zoo.Model, images: Tensor) -> None:
    features = model.features(images)
    (features * chirp((features.shape[1],), 2, 1.0)).sum(dim=1).square().sum().backward()
    found = {"features": list(features), "prompts": [], "map": []}
    for key, parameter in model.adapters["vpt"].named_parameters():
        assert parameter.grad is not None
        if key.endswith("prompt"):
            found["prompts"].append(parameter.grad)
        elif key.endswith("weight"):
            found["map"].append(parameter.grad)
    for part, expected in RECORDED[name].items():
        torch.testing.assert_close(
            torch.stack([summary(f) for f in found[part]]),
            torch.tensor(expected, dtype=torch.float64),
            rtol=1e-8,
            atol=1e-8,
        )


@pytest.mark.parametrize("project", [None, 8])
@pytest.mark.parametrize("deep", [True, False])
def test_vit_equals_the_authors_code(deep: bool, project: int | None) -> None:
    adapter = zoo.adapter("vpt", num_tokens=TOKENS, deep=deep, project=project)
    model = zoo.load("vit-micro", adapter, num_classes=0, pretrained=False, **VIT).double()
    fill(dict(model.backbone.named_parameters()))
    named = dict(model.adapters["vpt"].named_parameters())
    with torch.no_grad():
        for prompt, values in zip(
            [p for k, p in named.items() if k.endswith("prompt")], chirp((3, TOKENS, project or 48), 11, 0.5)
        ):
            prompt.copy_(values)
        if project:
            named["project_48.weight"].copy_(chirp((48, project), 4, 0.6))
            named["project_48.bias"].copy_(chirp((48,), 6, 0.1))
    name = f"vit {'deep' if deep else 'shallow'}{' projected' if project else ''}"
    check(name, model.train(), chirp((2, 3, 32, 32), 5, 1.5))


@pytest.mark.parametrize("deep", [True, False])
def test_swin_equals_the_authors_code(deep: bool) -> None:
    adapter = zoo.adapter("vpt", num_tokens=TOKENS, deep=deep, pool="all")
    name = "timm:swin_tiny_patch4_window7_224"
    model = zoo.load(name, adapter, num_classes=0, pretrained=False, **SWIN).double()
    fill(dict(model.backbone.named_parameters()))
    with torch.no_grad():
        for i, prompt in enumerate(model.adapters["vpt"].parameters()):
            prompt.copy_(chirp(tuple(prompt.shape), 11 + i, 0.5))
    images = chirp((2, 3, 64, 64), 5, 1.5)
    check(f"swin {'deep' if deep else 'shallow'}", model.train(), images if deep else images[:1])


@cache
def empty(name: str) -> zoo.Model:
    return zoo.load(name, pretrained=False, num_classes=0, device="meta")


def count(name: str, adapter: zoo.Adapter) -> int:
    model = empty(name)
    model.add_adapter(adapter, "counted")
    try:
        return model.num_parameters(trainable=True)
    finally:
        model.remove_adapter("counted")


@pytest.mark.parametrize(
    ("backbone", "tokens", "deep", "expected"),
    [
        ("vit-b16", 50, False, 38_400),
        ("vit-b16", 100, False, 76_800),
        ("vit-b16", 1, True, 9_216),
        ("vit-b16", 10, True, 92_160),
        ("vit-b16", 50, True, 460_800),
        ("vit-b16", 100, True, 921_600),
        ("vit-l16", 1, True, 24_576),
        ("swin-t", 50, False, 4_800),
        ("swin-t", 50, True, 220_800),
        ("swin-b", 50, True, 601_600),
    ],
)
def test_counts(backbone: str, tokens: int, deep: bool, expected: int) -> None:
    assert count(backbone, zoo.adapter("vpt", num_tokens=tokens, deep=deep)) == expected


@pytest.mark.parametrize(
    ("tokens", "targets", "expected"),
    # LAE's five blocks: 76,810 without its two learned scales for each block
    [(10, None, 184_320), (20, None, 368_640), (16, None, 294_912), (10, "blocks.{0..4}.attn.product", 76_800)],
)
def test_counts_of_prefixes(tokens: int, targets: str | None, expected: int) -> None:
    assert count("vit-b16", zoo.adapter("prefix", num_tokens=tokens, targets=targets)) == expected


@pytest.mark.parametrize("backbone, dim, patch", [("vit-b16", 768, 16), ("swin-t", 96, 4)])
def test_initial_range(backbone: str, dim: int, patch: int) -> None:
    """U(-v, v) with v = sqrt(6 / (3 p^2 + d)), d that of the first stage in all stages."""
    tiny = {"depth": 1} if backbone == "vit-b16" else {"depths": (1, 1)}
    torch.manual_seed(0)
    model = zoo.load(backbone, zoo.adapter("vpt", num_tokens=200), pretrained=False, num_classes=0, **tiny)
    bound = math.sqrt(6 / (3 * patch**2 + dim))
    assert empty(backbone).points.select(kind="tokens")[0].dim_in == dim
    for prompt in model.adapters["vpt"].parameters():
        assert 0.99 * bound < prompt.abs().max() <= bound
        assert prompt.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
