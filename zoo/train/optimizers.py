"""The optimizers of torch by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from zoo.errors import ConfigError, nearest

__all__ = ["OPTIMIZERS", "MakeOptimizer", "make_optimizer"]

MakeOptimizer = Callable[[list[dict[str, Any]]], Optimizer]

OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {}),
    "adam": (torch.optim.Adam, {}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "rmsprop": (torch.optim.RMSprop, {}),
}


def make_optimizer(
    wanted: str | MakeOptimizer, groups: list[dict[str, Any]], lr: float, options: Mapping[str, Any]
) -> Optimizer:
    """An optimizer over param groups, by its name (with the name's own options under those given) or by a function.

    Raises:
        ConfigError: no such name, options that it does not take, or a function that makes none.
    """
    if callable(wanted):
        made = wanted(groups)
        if not isinstance(made, Optimizer):
            raise ConfigError(
                f"optimizer gave a {type(made).__name__}; expected a function that returns a torch optimizer."
            )
        return made
    if wanted not in OPTIMIZERS:
        raise ConfigError(f"Unknown optimizer '{wanted}'. {nearest(wanted, OPTIMIZERS)}")
    cls, defaults = OPTIMIZERS[wanted]
    given = {**defaults, **options}
    try:
        return cls(groups, lr=lr, **given)  # type: ignore[call-arg]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"Optimizer '{wanted}' does not take these options: {given} ({error}).") from error
