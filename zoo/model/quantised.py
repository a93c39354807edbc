"""Projections of a frozen backbone whose weights W (o, i) are kept in 8 or 4 bits: int8, int4, nf4.

    int8   W = s_o q                     q in -127 ... 127, s_o = max_i |W_oi| / 127: one scale for each output
    int4   W = s_g (q - z_g)             q, z in 0 ... 15, s_g = (max - min) / 15 over a group of up to 128 inputs and zero
    nf4    W = s_b t_q                   t: 16 quantiles of a normal distribution, s_b = max |W| of 64 entries in a row

Rounding is to the nearest: an entry of int8 and int4 is wrong by half a step at most. Two numbers of 4 bits stand in a byte, the
first in its upper half. The s_b of nf4 are kept in 8 bits, too ("double quantisation"): s_b = m + c_b d_k, m the mean of all,
c_b a whole number, d_k a step for each 256 of them.

Bits for each weight, scales in float32: int8 8 + 32 / i, int4 4.31 in groups of 128, nf4 4.13.

The product is that of the rounded weight, exactly, on any device, and needs no package; backward gives the input's gradient, and
keeps the small numbers rather than a float copy of the weight. All parts are plain tensors, which safetensors holds.

Sources: nf4 and double quantisation are of Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023 (appendix E
has the table). int4 and nf4 are laid out as in torchao (`choose_qparams_affine`, asymmetric; `NF4Tensor`), which rounds the table
to four digits and cannot take sizes that 64 and 256 do not divide, nor rows of zeros; there as in QLoRA's code entries are
rounded by the s_b before those are rounded themselves. QLoRA's code keeps the s_b in floating point of 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.engine.memory import recomputable
from zoo.errors import ConfigError

__all__ = ["FORMATS", "Int4Linear", "Int8Linear", "NF4Linear", "Rounded", "lightened"]

GROUP = 128  # inputs that share a scale in int4, at most
BLOCK, SCALES = 64, 256  # entries that share an s_b in nf4; s_b that share a step
NORMAL = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


class Rounded(nn.Linear):
    """An `nn.Linear` whose `weight` is made of small numbers when it is asked for; it has none to train or to merge into."""

    kept_in: ClassVar[str] = ""
    parts: ClassVar[Sequence[str]] = ()  # buffers of which the weight is made
    table: ClassVar[Sequence[float]] = ()  # of formats with two numbers in a byte: what each of the 16 stands for

    @classmethod
    def of(cls, linear: nn.Linear) -> Rounded:
        """The same projection, rounded."""
        weight = linear.weight.detach()
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        for name, value in zip(cls.parts, cls.rounded(weight.float()), strict=True):
            self.register_buffer(name, value.to(weight.dtype) if value.is_floating_point() else value)
        if cls.table:  # what the halves of each byte stand for, so that both are looked up at once
            table = weight.new_tensor(cls.table)
            both = torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=1)
            self.register_buffer("both", both, persistent=False)
        bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", bias)
        return self

    @classmethod
    def rounded(cls, weight: Tensor) -> tuple[Tensor, ...]:
        """The `parts` of a weight (o, i) of float32."""
        raise NotImplementedError

    @staticmethod
    def wide(shape: tuple[int, int], *parts: Tensor) -> Tensor:
        """W (o, i) of its parts, and of `both`."""
        raise NotImplementedError

    def _made(self) -> tuple[tuple[int, int], list[Tensor]]:
        names = (*self.parts, "both") if self.table else self.parts
        return (self.out_features, self.in_features), [self._buffers[name] for name in names]  # type: ignore[misc]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W (o, i) in the precision of its scales. Backward makes it once more instead of keeping it."""
        shape, parts = self._made()
        return recomputable(type(self).wide, shape, *parts, constant=True)

    def forward(self, input: Tensor) -> Tensor:
        """x (..., i) -> (..., o)."""
        return F.linear(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        """As torch's."""
        return f"{super().extra_repr()}, kept_in={self.kept_in}"


class Int8Linear(Rounded):
    """W (o, i) = scale (o,) * int8 (o, i)."""

    kept_in = "int8"
    parts = ("int8", "scale")
    int8: Tensor
    scale: Tensor

    @classmethod
    def rounded(cls, weight: Tensor) -> tuple[Tensor, ...]:
        """Symmetric, one scale for each output."""
        scale = weight.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        return (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale

    @staticmethod
    def wide(shape: tuple[int, int], *parts: Tensor) -> Tensor:
        """W (o, i)."""
        int8, scale = parts
        return int8.to(scale.dtype) * scale[:, None]


class Int4Linear(Rounded):
    """W (o, i) = scale (o, i / g) * (int4 (o, i) - zero (o, i / g)), two of `int4` in a byte: (o, ceil(i / 2))."""

    kept_in = "int4"
    parts = ("int4", "scale", "zero")
    table = tuple(map(float, range(16)))

    @classmethod
    def rounded(cls, weight: Tensor) -> tuple[Tensor, ...]:
        """Each group from its smallest to its largest number, zero always among them and hit exactly."""
        rows, columns = weight.shape
        grouped = weight.view(rows, -1, group_of(columns))
        low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
        scale = ((high - low) / 15).clamp_min(torch.finfo(torch.float32).eps)
        zero = (0 - (low / scale).round()).clamp(0, 15)
        numbers = ((grouped / scale[..., None]).round() + zero[..., None]).clamp(0, 15)
        return _in_pairs(numbers.view(rows, columns).to(torch.uint8)), scale, zero.to(torch.uint8)

    @staticmethod
    def wide(shape: tuple[int, int], *parts: Tensor) -> Tensor:
        """W (o, i)."""
        int4, scale, zero, both = parts
        numbers = F.embedding(int4.int(), both).view(shape[0], -1)[:, : shape[1]]
        grouped = numbers.unflatten(1, (scale.shape[1], -1)) - zero[..., None].to(scale.dtype)
        return (grouped * scale[..., None]).flatten(1)


class NF4Linear(Rounded):
    """W (o, i), row after row in blocks of 64: scale * NORMAL[nf4], scale = mean + scaler * step; `nf4` two in a byte."""

    kept_in = "nf4"
    parts = ("nf4", "scaler", "step", "mean")
    table = NORMAL

    @classmethod
    def rounded(cls, weight: Tensor) -> tuple[Tensor, ...]:
        """Nearest entries of the table, by scales that are rounded afterwards."""
        table = weight.new_tensor(cls.table)
        flat = F.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
        largest = flat.abs().amax(1)
        scaled = flat / torch.where(largest > 0, largest, 1)[:, None]
        between = (table[1:] + table[:-1]) / 2
        mean = largest.mean()
        rest = F.pad(largest - mean, (0, -len(largest) % SCALES)).view(-1, SCALES)
        step = rest.abs().amax(1) / 128
        scaler = (rest / torch.where(step > 0, step, 1)[:, None]).round().clamp(-128, 127)
        numbers = torch.bucketize(scaled, between).to(torch.uint8)
        return _in_pairs(numbers).flatten(), scaler.flatten()[: len(largest)].to(torch.int8), step, mean

    @staticmethod
    def wide(shape: tuple[int, int], *parts: Tensor) -> Tensor:
        """W (o, i)."""
        nf4, scaler, step, mean, both = parts
        steps = step[:, None].expand(-1, SCALES).flatten()[: len(scaler)]
        scale = scaler.to(step.dtype) * steps + mean
        blocks = F.embedding(nf4.int(), both).view(-1, BLOCK) * scale[:, None]
        return blocks.flatten()[: math.prod(shape)].view(shape)


FORMATS: dict[str, type[Rounded]] = {cls.kept_in: cls for cls in (Int8Linear, Int4Linear, NF4Linear)}


def lightened(linear: nn.Linear, path: str, to: str) -> Rounded:
    """A projection kept in one of `FORMATS`.

    Raises:
        ConfigError: a weight with numbers that are not finite, of which a scale would make all of a group not finite.
    """
    if not linear.weight.is_meta and not bool(linear.weight.isfinite().all()):
        raise ConfigError(
            f"The weight of '{path}' holds NaN or Inf, so it has no scale to be kept in {to} by. Look for them in its file."
        )
    return FORMATS[to].of(linear)


def group_of(columns: int, most: int = GROUP) -> int:
    """How many inputs share a scale: the largest number up to `most` that divides them, all where that is below 16 and `most`."""
    largest = next(n for n in range(min(most, columns), 0, -1) if columns % n == 0)
    return largest if largest >= min(16, most) else columns


def _in_pairs(numbers: Tensor) -> Tensor:
    """(rows, n) of 4 bits -> (rows, ceil(n / 2)) bytes."""
    numbers = F.pad(numbers, (0, numbers.shape[1] % 2))
    return numbers[:, ::2] << 4 | numbers[:, 1::2]
