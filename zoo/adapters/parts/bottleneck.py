"""The bottleneck `W_up f(W_down x + b_down) + b_up`: its nonlinearities, and as a module with weights of its own."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.engine.memory import dropped, recomputable

# f, and whether its backward keeps its input (so that its output can be recomputed) rather than its output
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor] | None, bool]] = {
    "relu": (torch.relu, False),
    "gelu": (F.gelu, True),
    "gelu_new": (functools.partial(F.gelu, approximate="tanh"), True),  # the name that transformers gave it
    "silu": (F.silu, True),
    "tanh": (torch.tanh, False),
    "none": (None, False),
}


SLOPE = 1.702


def quick_gelu(x: Tensor) -> Tensor:
    """z sigmoid(1.702 z), by one function that keeps one tensor."""
    return F.silu(SLOPE * x) / SLOPE


def width_at(dim: int, rank: int | None, reduction: float | None) -> int:
    """Of a bottleneck at a point of width `dim`: the rank that is given, or the width over the reduction."""
    return rank if rank is not None else max(1, round(dim / (reduction or 1)))


def bend(hidden: Tensor, activation: str) -> Tensor:
    """`f(hidden)`; backward keeps one tensor of its size, whichever it needs."""
    fn, keeps_input = ACTIVATIONS[activation]
    if fn is None:
        return hidden
    return recomputable(fn, hidden) if keeps_input else fn(hidden)


def bottleneck(
    x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, activation: str = "relu"
) -> Tensor:
    """`up f(down x + down_bias) + up_bias`, (..., d) -> (..., d), with weights made elsewhere; down (r, d), up (d, r)."""
    return F.linear(bend(F.linear(x, down, down_bias), activation), up, up_bias)


class Bottleneck(nn.Module):
    """`x (..., d) -> s (W_up f(W_down x + b_down) + b_up)`, plus x itself if `sequential`."""

    def __init__(
        self,
        dim: int,
        rank: int,
        *,
        sequential: bool,
        activation: str = "relu",
        scale: float = 1.0,
        learn_scale: bool = False,
        norm: str = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.adapter_down = nn.Linear(dim, rank)
        self.adapter_up = nn.Linear(rank, dim)
        nn.init.kaiming_uniform_(self.adapter_down.weight, a=math.sqrt(5))
        for zero in (self.adapter_down.bias, self.adapter_up.weight, self.adapter_up.bias):
            nn.init.zeros_(zero)
        self.adapter_norm = nn.LayerNorm(dim) if norm != "none" else None
        self.adapter_scale = nn.Parameter(torch.tensor([scale])) if learn_scale else None
        self.drop = nn.Dropout(dropout)
        self.fixed_scale, self.norm_first, self.sequential = scale, norm == "in", sequential
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        inner = x
        if self.adapter_norm is not None and self.norm_first:
            inner = recomputable(self.adapter_norm, x)
        hidden = self.adapter_down(inner)  # (..., r)
        hidden = dropped(bend(hidden, self.activation), self.drop)
        if self.adapter_scale is None and self.fixed_scale == 1:
            out = self.adapter_up(hidden)
        else:  # s scales (d, r) weights instead of (..., d) outputs, which backward would need if s is learned
            scale = self.fixed_scale if self.adapter_scale is None else self.adapter_scale
            out = F.linear(hidden, recomputable(torch.mul, self.adapter_up.weight, scale), scale * self.adapter_up.bias)
        if self.adapter_norm is not None and not self.norm_first:
            out = self.adapter_norm(out)
        return x + out if self.sequential else out
