"""Weights, images and gradients of small networks that need no random generator: for numbers recorded from authors' code.

Values are sines of a running number, so that they are the same with any version of any library; a gradient is noted as its
first three values, its norm and its sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL: dict[str, Any] = {
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
}  # of a ViT on 32 px: 1 + 4 x 4 tokens


def wave(shape: tuple[int, ...], phase: int, scale: float) -> Tensor:
    """A sine in float64, of a step and a start that belong to `phase`."""
    angle = torch.arange(math.prod(shape), dtype=torch.float64) * 0.7 * (1 + phase % 7) + phase
    return (scale * angle.sin()).view(shape)


@torch.no_grad()
def fill(named: Mapping[str, Tensor]) -> None:
    """Set a backbone's parameters, in the order of their names: of about the sizes that trained ones have."""
    for i, (key, parameter) in enumerate(sorted(named.items())):
        if "norm" in key and key.endswith("weight"):
            parameter.copy_(1 + wave(tuple(parameter.shape), i, 0.2))
        elif key.endswith("bias"):
            parameter.copy_(wave(tuple(parameter.shape), i, 0.1))
        else:
            tokens = "token" in key or "pos" in key
            scale = 1.0 if tokens else 2 / math.sqrt(parameter[0].numel())
            parameter.copy_(wave(tuple(parameter.shape), i, scale))


@torch.no_grad()
def shift(named: Mapping[str, Tensor], scale: float = 0.4) -> None:
    """Set an adapter's parameters, in the order of their names."""
    for i, (_, parameter) in enumerate(sorted(named.items())):
        parameter.copy_(wave(tuple(parameter.shape), i + 1, scale))


@torch.no_grad()
def fill_head(head: nn.Module) -> None:
    """A classifier on 48 features."""
    head.weight.copy_(wave(tuple(head.weight.shape), 2, 0.5))  # type: ignore[union-attr,operator,arg-type]
    head.bias.zero_()  # type: ignore[union-attr,operator]


def pictures() -> Tensor:
    """Two of 32 px."""
    return wave((2, 3, 32, 32), 5, 1.5)


def learn(logits: Tensor) -> None:
    """Backward of the loss for the classes 1 and 3."""
    F.cross_entropy(logits, torch.tensor([1, 3])).backward()


def summary(grad: Tensor | None) -> list[float]:
    """First three values, norm, sum."""
    assert grad is not None
    return [*grad.flatten()[:3].tolist(), grad.norm().item(), grad.sum().item()]


def agree(named: Mapping[str, nn.Parameter], recorded: Mapping[str, list[float]]) -> None:
    """Assert that the gradients of all these parameters are the recorded ones."""
    assert set(named) == set(recorded)
    for key, numbers in recorded.items():
        found = torch.tensor(summary(named[key].grad))
        torch.testing.assert_close(found, torch.tensor(numbers), rtol=1e-5, atol=1e-8, msg=lambda m, k=key: f"{k}: {m}")
