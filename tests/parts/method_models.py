"""Every method with small settings, on small models of both families: for the tests of what all methods promise.

A new method is tried there by adding one line to `METHODS`; `test_every_method_is_here` fails until that is done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo
from torch import Tensor

import zoo


class Promise(NamedTuple):
    """What a method promises, and the settings with which it is tried: small, and without dropout."""

    identity: bool  # starts as the pretrained function, to the bit
    merges: bool
    settings: dict[str, Any] = {}


METHODS = {
    "linear": Promise(True, True),
    "full": Promise(True, True),
    "bitfit": Promise(True, True),
    "norm": Promise(True, True),
    "lora": Promise(True, True, {"rank": 2, "targets": "all-linear"}),
    "adapter": Promise(True, False, {"rank": 2, "form": "houlsby"}),
    "ssf": Promise(False, True),
    "ia3": Promise(True, True),
    "prefix": Promise(False, False),
    "vpt": Promise(False, False, {"num_tokens": 3}),
    "spt": Promise(True, True, {"budget": 0.004, "rank": 2, "dropout": 0.0, "drop_path": 0.0}),
    "vqt": Promise(False, False, {"dropout": 0.0}),
}
VIT = {"embed_dim": 48, "depth": 2, "num_heads": 3}
SWIN = {
    "img_size": 32,
    "window_size": 4,
    "embed_dim": 24,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "drop_path_rate": 0.0,  # full fine-tuning puts the backbone in train mode
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit-micro", VIT),
    "swin": ("timm:swin_tiny_patch4_window7_224", SWIN),
}
BATCH, CLASSES = 4, 5

both = pytest.mark.parametrize("family", list(FAMILIES))
each = pytest.mark.parametrize("method", list(METHODS))


def images() -> Tensor:
    return torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def targets() -> Tensor:
    return torch.arange(BATCH) % CLASSES


def bare(family: str, **options: Any) -> zoo.Model:
    torch.manual_seed(0)
    name, sizes = FAMILIES[family]
    return zoo.load(name, pretrained=False, num_classes=CLASSES, **{**sizes, **options})


def attach(model: zoo.Model, method: str, name: str | None = None, activate: bool = True) -> str:
    """Attach a method, calibrated if it needs that; returns its name."""
    torch.manual_seed(2)
    adapter = model.add_adapter(zoo.adapter(method, **METHODS[method].settings), name, activate=activate)
    if adapter.needs_calibration:
        adapter.calibrate(model, [(images(), targets())])
    return name or method


def build(family: str, *methods: str) -> zoo.Model:
    model = bare(family)
    for method in methods:
        attach(model, method)
    return model


def shake(model: zoo.Model, name: str, seed: int = 3) -> None:
    """Move an adapter away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.adapters[name].parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))


def loss_of(model: zoo.Model) -> Tensor:
    return torch.nn.functional.cross_entropy(model(images()), targets())


def gradients(model: zoo.Model, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(6)
    run().backward()
    return {k: p.grad.clone() for k, p in model.parameters_to_train().items() if p.grad is not None}


def state(model: zoo.Model) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.backbone.state_dict().items()}
