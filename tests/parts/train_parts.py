"""A tiny model and easy data for the tests of training, also for the scripts that they start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import zoo
from zoo.train import Report

CLASSES = 4


def tiny_model(adapter: Any = "lora", num_classes: int = CLASSES, seed: int = 0, **options: Any) -> zoo.Model:
    """A ViT of 2 blocks, width 24, for images of 8 x 8 pixels; the same weights each time."""
    shape = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(100)
        model = zoo.load("vit-micro", pretrained=False, num_classes=num_classes, **shape, **options)
        torch.manual_seed(seed)
        model.reset_head(num_classes)
        for item in [adapter] if not isinstance(adapter, list) else adapter:
            if item is not None:
                model.add_adapter(item)
    return model


def easy_data(count: int = 40, seed: int = 0, noise: float = 0.5, classes: int = CLASSES) -> TensorDataset:
    """Images (3, 8, 8), each a pattern of its class with noise; labels in turn."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(classes, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(count) % classes
    return TensorDataset(patterns[labels] + noise * torch.randn(count, 3, 8, 8, generator=generator), labels)


def weights(model: zoo.Model) -> dict[str, Tensor]:
    """Copies of what is trained."""
    return {name: p.detach().clone() for name, p in model.parameters_to_train().items()}


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference between two sets of weights."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def fit(model: zoo.Model, train: Any, val: Any = None, **options: Any) -> Report:
    return zoo.fit(model, train, val, **{"epochs": 2, "batch_size": 16, "lr": 3e-3, "progress": False, **options})


class Stop(Exception):
    """Ends a run, as a kill would."""


@dataclass
class StopAt:
    """Raises `Stop` in a hook, at this step or epoch."""

    step: int
    hook: str = "step_end"

    def __getattr__(self, name: str) -> Any:
        if name != self.hook:
            raise AttributeError(name)

        def hook(model: zoo.Model, step: int = -1) -> None:
            if step == self.step:
                raise Stop

        return hook
