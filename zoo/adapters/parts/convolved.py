"""LoRA at a convolution: A is a convolution like the frozen one with few outputs, B mixes these place by place.

    y = conv(x; W) + s * B conv(x; A)        W (o, i, k, ...), A (r, i, k, ...), B (o, r)

which is the convolution with W + s B A, both read as matrices with i * k * ... columns. In memory: x, which A's gradient
needs, and nothing else; the r channels of A's output are computed again in backward.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.engine.memory import dropped, recomputable

__all__ = ["ConvLowRank"]

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
Shape = tuple[Any, ...]  # what `_convolve` needs to know of the frozen convolution


class ConvLowRank(nn.Module):
    """`x (B, i, ...) -> scale * B A dropout(x) (B, o, ...)`, with stride, padding and dilation of the frozen convolution."""

    convolves = True

    def __init__(
        self, frozen: Any, dim_out: int, rank: int, scale: float, dropout: float = 0.0, learn_scale: bool = False
    ) -> None:
        super().__init__()
        self.kernel = tuple(frozen.weight.shape[1:])
        self.lora_a = nn.Parameter(torch.empty(rank, math.prod(self.kernel)))
        self.lora_b = nn.Parameter(torch.zeros(dim_out, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.lora_scale = nn.Parameter(torch.tensor(float(scale))) if learn_scale else None
        self.scale = 1.0 if learn_scale else scale
        self.drop = nn.Dropout(dropout)
        same = bool(getattr(frozen, "same_pad", False)) or type(frozen).__name__.endswith("Same")
        self.shape: Shape = (
            frozen.stride,
            0 if same else frozen.padding,
            frozen.dilation,
            same,
            frozen.padding_mode,
            frozen._reversed_padding_repeated_twice,
            self.kernel,
        )

    def forward(self, x: Tensor) -> Tensor:
        """The delta alone."""
        x = dropped(x, self.drop)
        hidden = recomputable(_convolve, x, self.lora_a, self.shape)
        b = recomputable(_mixing, self.lora_b, self.lora_scale, self.scale, len(self.kernel))
        function: Any = CONVOLUTIONS[len(self.kernel) - 2]
        return function(hidden, b.to(hidden.dtype))  # type: ignore[no-any-return]

    @staticmethod
    def add_group(parts: tuple[tuple[ConvLowRank, int, int], ...], x: Tensor, y: Tensor) -> Tensor:
        """`y + delta(x)`; a convolution is one point, so there is one part."""
        return y + parts[0][0](x).to(y.dtype)


def _mixing(b: Tensor, learned: Tensor | None, scale: float, axes: int) -> Tensor:
    """s B as the weight of a convolution of one place, (o, r, 1, ...)."""
    b = scale * (b if learned is None else learned * b)
    return b[(..., *(None,) * (axes - 1))]


def _convolve(x: Tensor, a: Tensor, shape: Shape) -> Tensor:
    """x (B, i, ...) -> (B, r, ...)."""
    stride, padding, dilation, same, mode, reversed_padding, kernel = shape
    weight = a.view(len(a), *kernel).to(x.dtype)
    if same:
        x = F.pad(x, _same(tuple(x.shape[2:]), kernel[1:], stride, dilation))
    elif mode != "zeros":
        x, padding = F.pad(x, reversed_padding, mode=mode), 0
    function: Any = CONVOLUTIONS[len(kernel) - 2]
    return function(x, weight, None, stride, padding, dilation)  # type: ignore[no-any-return]


def _same(size: Shape, kernel: Shape, stride: Shape, dilation: Shape) -> list[int]:
    """TensorFlow's padding: as many outputs as inputs by stride, the odd pixel behind. In the order of `F.pad`."""
    found: list[int] = []
    for n, k, s, d in reversed(list(zip(size, kernel, stride, dilation))):
        missing = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        found += [missing // 2, missing - missing // 2]
    return found
