"""Small models with prompts, and their straightforward forms, for the tests of VPT and of prefixes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from straightforward_vpt import StraightSwin, StraightViT
from torch import Tensor, nn

import zoo

SWIN_NAME = "timm:swin_tiny_patch4_window7_224"
VIT: dict[str, Any] = {"depth": 3, "embed_dim": 48, "num_heads": 3}
SWIN: dict[str, Any] = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
BACKBONES: dict[str, dict[str, Any]] = {
    "vit": VIT,
    "vit average": {**VIT, "global_pool": "avg"},
    "vit registers": {**VIT, "reg_tokens": 3, "qk_norm": True, "init_values": 0.3, "scale_attn_norm": True},
    "swin": SWIN,
    # 14 x 14 tokens in windows of 4: padded; merged to 7 x 7: padded too
    "swin padded": {**SWIN, "img_size": 56},
    "swin fused": SWIN,
}
EVERY = pytest.mark.parametrize("kind", list(BACKBONES))
BOTH = pytest.mark.parametrize("kind", ["vit", "swin"])
DEEP = pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])


def make(kind: str, *adapters: Any, **options: Any) -> zoo.Model:
    """A small model in float64 in which tokens differ and prompts matter."""
    torch.manual_seed(0)
    name = SWIN_NAME if kind.startswith("swin") else "vit-micro"
    model = zoo.load(name, list(adapters), pretrained=False, num_classes=5, **{**BACKBONES[kind], **options})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, p in [*model.backbone.named_parameters(), *model.adapters.named_parameters()]:
            scale = 1.0 if key.endswith("prompt") else 0.1
            p.add_(scale * torch.randn(p.shape, generator=generator))
    if kind == "swin fused":
        for block in model.family.blocks():
            block.attn.fused_attn = True  # type: ignore[union-attr]
    return model.double()


def images(kind: str, count: int = 3) -> Tensor:
    size = BACKBONES[kind].get("img_size", 32)
    return torch.randn(count, 3, size, size, dtype=torch.double, generator=torch.Generator().manual_seed(2))


def straightforward(model: zoo.Model, names: tuple[str, ...] = ("vpt",)) -> nn.Module:
    """The paper's form on the same weights; other adapters stay on the backbone, and see prompts as tokens."""
    adapters = [model.adapters[n] for n in names]
    blocks = list(zip(*([p for k, p in a.named_parameters() if k.endswith("prompt")] for a in adapters)))
    prompts = [torch.cat(block) for block in blocks]
    others = copy.deepcopy(model)
    others.set_active(*(n for n in model.active if n not in names))
    form = StraightSwin if "Swin" in type(model.backbone).__name__ else StraightViT
    reference = form(others.backbone, prompts, adapters[0].deep, adapters[0].pool)  # type: ignore[arg-type]
    reference.owner = [others]  # type: ignore[assignment]
    return reference


def loss(features: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, features[0].numel(), dtype=features.dtype)
    return (features.flatten(1) @ weights).square().sum()


def same_gradients(model: zoo.Model, reference: nn.Module, x: Tensor) -> None:
    # what other adapters train stands in for a pass of their model; the reference calls its modules by hand
    features, expected = model.features(x), reference.owner[0].passing(lambda: reference(x), x)  # type: ignore[index,union-attr]
    torch.testing.assert_close(features, expected, rtol=1e-10, atol=1e-10)
    prompts = [p for k, p in model.adapters["vpt"].named_parameters() if k.endswith("prompt")]
    found = torch.autograd.grad(loss(features), prompts)
    wanted = torch.autograd.grad(loss(expected), list(reference.prompts))  # type: ignore[arg-type]
    for a, b in zip(found, wanted):
        assert b.abs().max() > 1e-4  # prompts matter
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * b.abs().max().item())
