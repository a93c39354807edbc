"""Adapters of one line that try a verb, and what they need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo import registry
from zoo.errors import MissingPackageError
from zoo.table import tiny_model as member

FAMILIES = [f for f in registry.families() if registry.family(f).tiny]


def attached(put: Callable[[Any], None], name: str = "trial") -> zoo.Adapter:
    """An adapter that does one thing."""

    @dataclass
    class Trial(zoo.Adapter):
        method = name

        def attach(self, points: Any) -> None:
            put(points)

    Trial.__eq__, Trial.__hash__ = object.__eq__, object.__hash__  # type: ignore[method-assign]
    return Trial()


def of(family: str) -> tuple[Any, Any]:
    try:
        model, batch = member(family)
    except MissingPackageError as error:
        pytest.skip(str(error))
    return model.eval(), batch


def caught(module: nn.Module) -> list[tuple[Any, Any]]:
    """(first input, output) of a module, as it runs."""
    found: list[tuple[Any, Any]] = []

    def hook(m: Any, a: Any, k: Any, y: Any) -> None:
        found.append((a[0] if a else next(iter(k.values())), y[0] if isinstance(y, tuple) else y))

    module.register_forward_hook(hook, with_kwargs=True)
    return found


SEEN = torch.tensor([True, False, True])[None, None, None]


class Extra(nn.Module):
    """T keys and values; some of them masked, or gated."""

    def __init__(self, point: Any, mask: Tensor | None = None, gate: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        shape = (1, point.num_heads, 3, point.head_dim)
        self.keys = nn.Parameter(torch.randn(shape, generator=generator))
        self.values = nn.Parameter(torch.randn(shape, generator=generator))
        self.mask = mask
        self.gate = nn.Parameter(torch.zeros(1, point.num_heads, 1, 1)) if gate else None

    def forward(self, batch: int) -> tuple[Tensor, ...]:
        if self.gate is not None:
            return self.keys, self.values, self.gate
        return (self.keys, self.values) if self.mask is None else (self.keys, self.values, self.mask)


class Tokens(nn.Module):
    """T prompts."""

    def __init__(self, dim: int, seed: int, count: int = 2) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)))

    def forward(self, batch: int) -> Tensor:
        return self.prompt[None]
