"""Every method with small settings, on small models of both families: for the tests of what all methods promise.

Nothing is entered here: the methods are those that are registered, and their promises (`identity`, `merges`) and settings
(`trial`, `trial_families`) stand in their own files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor

import zoo
from zoo import Adapter, registry
from zoo.errors import AttachError


def tried() -> dict[str, type[Adapter]]:
    """Every method by name; what it promises and the small settings with which it is tried are attributes of its class."""
    return {name: registry.adapter_class(name) for name in zoo.list_adapters()}


METHODS = tried()
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


def attach(model: zoo.Model, method: str, name: str | None = None, activate: bool = True, **options: Any) -> str:
    """Attach a method with its small settings and `options`, calibrated if it needs that; returns its name.

    A family that is not among the method's own (`trial_families`) must refuse it, and the test is skipped with that reason.
    """
    torch.manual_seed(2)
    config = zoo.adapter(method, **{**METHODS[method].trial, **options})
    if model.family.family not in METHODS[method].trial_families:
        with pytest.raises(AttachError) as refused:
            model.add_adapter(config, name, activate=activate)
        pytest.skip(f"refused: {refused.value}")
    adapter = model.add_adapter(config, name, activate=activate)
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
