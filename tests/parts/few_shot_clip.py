"""A small CLIP with a method that compares images with class names, and data for it."""

from __future__ import annotations

from typing import Any

import torch
from clip_models import IMAGE, TEXT, make
from torch import Tensor
from torch.utils.data import TensorDataset

import zoo

NAMES = ["cat", "dog", "red bird"]


def build(method: str, beside: str = "", **settings: Any) -> zoo.Model:
    """In float64, everything away from its start, with the names of three classes."""
    own = [zoo.adapter(method, **settings)]
    if beside:
        own.insert(
            len(own) if beside == "coop" else 0, zoo.adapter(beside)
        )  # whose words stand in its own head's texts
    return make("plain", *own, text_cfg={**TEXT, "context_length": 40}, tower="both", classes=NAMES)


def small(method: str, names: list[str] | None = NAMES, **settings: Any) -> zoo.Model:
    """In float32, as `zoo.load` gives it, of the same random weights each time."""
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "embed_dim": 24,
        "vision_cfg": IMAGE,
        "text_cfg": {**TEXT, "context_length": 40},
        "pretrained": False,
    }
    return zoo.load("clip-micro", zoo.adapter(method, **settings), classes=names, **options)


def images(model: zoo.Model, count: int = 4) -> Tensor:
    size = model.family.data_config()["input_size"]
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(5), dtype=torch.double)


class Pictures(TensorDataset):
    """Images of three classes; `classes` are their names."""

    classes = NAMES

    def __init__(self, count: int = 12, seed: int = 3) -> None:
        patterns = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(3))
        labels, generator = torch.arange(count) % 3, torch.Generator().manual_seed(seed)
        super().__init__(patterns[labels] + 0.3 * torch.randn(count, 3, 16, 16, generator=generator), labels)


def routed(method: str, train: bool, prepare: Any = None, **settings: Any) -> None:
    """Each row is what the adapter named for it gives alone; in training the gradients are there."""
    model = build(method, **settings)
    for seed, name in enumerate(("a", "b")):
        model.add_adapter(zoo.adapter(method, **settings), name, activate=False)
        model.double()
        if prepare is not None:
            model.set_active(name)
            prepare(model, name)
        with torch.no_grad():
            for p in model.adapters[name].parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    model.add_adapter(zoo.adapter("lora", rank=2), "c", activate=False)
    model.double().set_active("a")
    model.train(train)
    rows, x, alone = ["b", None, "a", "c"], images(model), []
    for i, name in enumerate(rows):
        model.set_active(*([name] if name else []))
        alone.append(model(x)[i : i + 1])
    model.set_active("a")
    torch.testing.assert_close(model(x, adapters=rows), torch.cat(alone))
    assert model.active == ("a",)
    if train and any(p.requires_grad for p in model.adapters["a"].parameters()):
        for name in ("a", "b"):
            model.adapters[name].requires_grad_(True)
        model(x, adapters=rows).square().sum().backward()
        assert all(p.grad is not None for name in "ab" for p in model.adapters[name].parameters())
