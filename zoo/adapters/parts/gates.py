"""Coefficients on attention heads and on the neurons of MLPs, which learn what a task can do without.

    x <- c * x      at the input of o, one c for each head, and of down, one for each neuron

That is c times the attention's probabilities, and c times the activation. It starts at 1: nothing is changed, to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.engine.memory import recomputable
from zoo.errors import AttachError
from zoo.points import LinearPoint, Points

__all__ = ["Gates", "add_gates", "block_of", "readers", "taken"]


class Gates(nn.Module):
    """`x (..., dim) -> c x`, each coefficient for dim / count channels that stand side by side."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(count))
        self.each = dim // count

    @property
    def scale(self) -> Tensor:
        """(dim,)"""
        return self.gate if self.each == 1 else self.gate.repeat_interleave(self.each)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim), in the dtype of x; recomputed in backward instead of kept."""
        return recomputable(_gated, x, self.scale)


def _gated(x: Tensor, scale: Tensor) -> Tensor:
    return (x * scale).to(x.dtype)


def taken(share: float, count: int) -> int:
    """How many of `count` heads or neurons a share is, rounded down."""
    return int(share * count + 1e-9)  # 0.3 of 10 are 3


def readers(points: Points, method: str) -> tuple[list[LinearPoint], list[LinearPoint]]:
    """The projections that read heads (o), and those that read neurons (down), of all blocks.

    Raises:
        AttachError: there are none of them, or an input that is not cut evenly by its heads.
    """
    linears = [p for p in points.require("linear", method) if p.block is not None]
    heads = [p for p in linears if p.role == "o" and p.num_heads]
    neurons = [p for p in linears if p.role == "down"]
    if not heads and not neurons:
        raise AttachError(
            f"'{method}' puts coefficients on attention heads and neurons, and {points.backbone} has no projections 'o' and "
            "'down' in its blocks."
        )
    for point in heads:
        if point.dim_in % point.num_heads:
            raise AttachError(
                f"'{method}': the {point.dim_in} channels that '{point.name}' reads are not {point.num_heads} heads of one width."
            )
    return heads, neurons


def add_gates(points: Points, method: str) -> None:
    """Put coefficients on all heads and neurons."""
    heads, neurons = readers(points, method)
    for point in heads:
        point.rescale_input(Gates(point.dim_in, point.num_heads))
    for point in neurons:
        point.rescale_input(Gates(point.dim_in, point.dim_in))


def block_of(points: Points, point: LinearPoint) -> str:
    """The name of the block in which a point stands."""
    inside = [p.name for p in points if p.kind == "block" and point.name.startswith(f"{p.name}.")]
    return max(inside, key=len)
