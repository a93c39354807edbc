"""Weights of whole numbers of 2 to 8 bits, packed without a gap: W (o, i) = scale (o, g) * number (o, i) + shift (o, g).

What learned steps leave (`zoo.adapters.l4q`). Numbers of a row follow each other bit by bit, from each number's lowest; a row is
filled up to whole bytes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.model.quantised import Rounded

__all__ = ["PackedLinear", "pack", "unpack"]


def pack(numbers: Tensor, bits: int) -> Tensor:
    """(o, i) of 0 ... 2^bits - 1 -> (o, ceil(i bits / 8)) bytes."""
    places = torch.arange(bits, device=numbers.device, dtype=torch.uint8)
    stream = (numbers[..., None] >> places & 1).flatten(1)
    stream = nn.functional.pad(stream, (0, -stream.shape[1] % 8)).unflatten(1, (-1, 8))
    weights = torch.tensor([1 << k for k in range(8)], device=numbers.device, dtype=torch.uint8)
    return (stream * weights).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`: (o, columns) of uint8."""
    if bits == 8:
        return packed
    # by a table, products and sums of int32: what graphs of others (ONNX) have operators for
    table = torch.tensor(
        [[byte >> k & 1 for k in range(8)] for byte in range(256)], device=packed.device, dtype=torch.int32
    )
    stream = table.index_select(0, packed.flatten().int()).view(len(packed), -1)
    stream = stream[:, : columns * bits].unflatten(1, (-1, bits))
    weights = torch.tensor([1 << k for k in range(bits)], device=packed.device, dtype=torch.int32)
    return (stream * weights).sum(-1, dtype=torch.int32).to(torch.uint8)


class PackedLinear(Rounded):
    """W (o, i) = scale * number + shift, `packed` (o, ceil(i bits / 8))."""

    kept_in = "whole numbers of few bits"
    parts = ("packed", "scale", "shift")
    bits: int

    @classmethod
    def empty(cls, linear: nn.Linear, bits: int, groups: int) -> PackedLinear:
        """Of a projection's shape, without its numbers.

        Raises:
            ConfigError: bits or groups that cannot be.
        """
        rows, columns = linear.weight.shape
        if type(bits) is not int or not 2 <= bits <= 8 or type(groups) is not int or groups < 1 or columns % groups:
            raise ConfigError(f"a weight ({rows}, {columns}) cannot be {groups!r} groups of {bits!r} bits.")
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.out_features, self.in_features, self.bits = rows, columns, bits
        like = linear.weight.detach()
        self.register_buffer("packed", like.new_zeros(rows, math.ceil(columns * bits / 8), dtype=torch.uint8))
        self.register_buffer("scale", like.new_zeros(rows, groups))
        self.register_buffer("shift", like.new_zeros(rows, groups))
        bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", bias)
        return self

    def _made(self) -> tuple[tuple[int, ...], list[Tensor]]:  # type: ignore[override]
        return (self.out_features, self.in_features, self.bits), [self.packed, self.scale, self.shift]  # type: ignore[list-item]

    @staticmethod
    def wide(shape: tuple[int, ...], *parts: Tensor) -> Tensor:  # type: ignore[override]
        """W (o, i)."""
        packed, scale, shift = parts
        numbers = unpack(packed, shape[2], shape[1]).to(scale.dtype).unflatten(1, (scale.shape[1], -1))
        return torch.addcmul(shift[..., None], numbers, scale[..., None]).flatten(1)
