"""Small models, batches and settings for the tests of SPT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import zoo

VIT = {"embed_dim": 48, "depth": 2, "num_heads": 3}
SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit-micro", VIT),
    "swin": ("timm:swin_tiny_patch4_window7_224", SWIN),
}
# chooses single entries of matrices and vectors, whole vectors and structured matrices in both families
SETTINGS: dict[str, Any] = {"budget": 0.0025, "rank": 4}
QUIET = {"dropout": 0.0, "drop_path": 0.0}

both = pytest.mark.parametrize("family", list(FAMILIES))


def build(family: str = "vit", seed: int = 0, **options: Any) -> zoo.Model:
    name, sizes = FAMILIES[family]
    torch.manual_seed(0)
    model = zoo.load(name, pretrained=False, num_classes=5, **{**sizes, **options})
    torch.manual_seed(seed)
    model.reset_head(5)
    return model


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 3, 32, 32, generator=generator), torch.arange(4) + i % 2) for i in range(count)]


IMAGES = batches(1)[0][0]


def calibrated(model: zoo.Model, **settings: Any) -> zoo.Adapter:
    adapter = model.add_adapter(zoo.adapter("spt", **{**SETTINGS, **settings}))
    adapter.calibrate(model, batches())
    return adapter


def shake(adapter: torch.nn.Module, std: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(std * torch.randn(p.shape, generator=generator))


def snapshot(model: zoo.Model) -> list[Any]:
    return [
        (n, p.requires_grad, p.grad, m.training) for m in model.modules() for n, p in m.named_parameters(recurse=False)
    ]
