"""A pruned projection whose remaining entries are tuned by two thin matrices; its zeros stay zeros.

    "mask"    y = M . (W + D + s B A) x + b
    "scale"   y = M . (W + D) . (B A) x + b
    "none"    y = M . (W + D) x + b

M (o, i) is the mask, D the change that came with it (SparseGPT's), A (r, i), B (o, r).

In memory: the weight is formed anew in backward and never kept; of the gradient of the whole weight, that of A and B is
taken at once. Unlike LoRA's, this gradient is a full product of inputs and output gradients: M has no rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.engine.second_order import exact, first_order
from zoo.errors import MismatchError

__all__ = ["UPDATES", "Masked", "folded", "unfolded"]

UPDATES = ("mask", "scale", "none")
Part = tuple["Masked", int, int]


@dataclass(frozen=True)
class _Slice:
    """Rows of a projection, and how they are tuned."""

    start: int
    stop: int
    update: str
    scale: float

    def weight(self, weight: Tensor, mask: Tensor, shift: Tensor | None, a: Tensor | None, b: Tensor | None) -> Tensor:
        """(o, i) -> (o, i), with zeros; in the precision of the frozen one."""
        if shift is not None:
            weight = weight + shift.to(weight.dtype)
        if a is None or b is None:
            return weight * mask
        product = (b @ a).to(weight.dtype)
        return (weight + self.scale * product) * mask if self.update == "mask" else weight * mask * product

    def gradients(self, grad: Tensor, weight: Tensor, held: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
        """Of A and B, from that of the whole weight (o, i)."""
        mask, shift, a, b = held
        assert a is not None and b is not None and mask is not None
        if self.update == "mask":
            grad = grad.mul_(mask).mul_(self.scale)
        else:
            grad = grad.mul_(self.weight(weight, mask, shift, None, None))
        grad = grad.to(a.dtype)
        return b.T @ grad, grad @ a.T


class Masked(nn.Module):
    """W (o, i) -> the pruned and tuned weight (o, i); all slices of a fused projection are computed together."""

    mask: Tensor
    shift: Tensor | None

    def __init__(self, mask: Tensor, shift: Tensor | None, update: str, rank: int, scale: float) -> None:
        super().__init__()
        dim_out, dim_in = mask.shape
        self.register_buffer("mask", mask)
        self.register_buffer("shift", shift)
        self.update, self.scale = update, scale
        self.lora_a = nn.Parameter(torch.empty(rank, dim_in)) if update != "none" else None
        self.lora_b = nn.Parameter(torch.zeros(dim_out, rank)) if update != "none" else None
        if self.lora_a is not None and self.lora_b is not None:
            nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
            if update == "scale":  # B A = 1, to the bit, and the other directions are not alike
                with torch.no_grad():
                    self.lora_a[0], self.lora_b[:, 0] = 1, 1

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that acts."""
        return self._slice(0, len(weight)).weight(weight, *self._held())

    def _slice(self, start: int, stop: int) -> _Slice:
        return _Slice(start, stop, self.update, self.scale)

    def _held(self) -> tuple[Any, ...]:
        return self.mask, self.shift, self.lora_a, self.lora_b

    @staticmethod
    def linear_group(
        parts: tuple[Part, ...], run: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """x (..., i) -> (..., o)."""
        slices = tuple(m._slice(start, stop) for m, start, stop in parts)
        held = [t for m, _, _ in parts for t in m._held()]
        plain = torch.compiler.is_compiling() or x.device.type == "meta" or exact() or weight.requires_grad
        if plain or run is not F.linear:
            return run(x, _whole(weight, slices, held), bias)
        return _MaskedLinear.apply(x, weight, bias, slices, *held)


def _fours(held: Any) -> list[tuple[Any, ...]]:
    """(mask, shift, A, B) of each slice."""
    return [tuple(held[at : at + 4]) for at in range(0, len(held), 4)]


def _whole(weight: Tensor, slices: tuple[_Slice, ...], held: Any) -> Tensor:
    """The weight of the projection, of which some rows may not be pruned."""
    pieces, at = [], 0
    for rows, tensors in zip(slices, _fours(held)):
        if rows.start > at:
            pieces.append(weight[at : rows.start])
        pieces.append(rows.weight(weight[rows.start : rows.stop], *tensors))
        at = rows.stop
    if at < len(weight):
        pieces.append(weight[at:])
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class _MaskedLinear(torch.autograd.Function):
    """`_whole(W) x + b` for a frozen W; the sum is formed again in backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, slices: tuple[_Slice, ...], *held: Tensor
    ) -> Tensor:
        ctx.slices, ctx.learning = slices, any(ctx.needs_input_grad[4:])
        ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(x if ctx.learning else None, weight, *held)
        with torch.autocast(x.device.type, enabled=False):  # as in backward
            whole = _whole(weight, slices, held)
        # .data: else the result may count as a view, and a structured module could not add to it in place
        return F.linear(x, whole, bias).data

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, weight, *held = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        dx = db = None
        if ctx.needs_input_grad[0]:
            dx = (grad @ _whole(weight, ctx.slices, held).to(grad.dtype)).to(ctx.x_dtype)
        if ctx.needs_input_grad[2]:
            db = rows.sum(0, dtype=ctx.bias_dtype)
        found: list[Any] = [None] * len(held)
        if ctx.learning:
            inputs = x.reshape(-1, x.shape[-1]).to(rows.dtype)
            for number, (part, tensors) in enumerate(zip(ctx.slices, _fours(held))):
                if tensors[2] is not None:
                    product = rows[:, part.start : part.stop].T @ inputs
                    own = part.gradients(product, weight[part.start : part.stop], tensors)
                    found[4 * number + 2 : 4 * number + 4] = own
        return dx, None, db, None, *found


# -- on disk --------------------------------------------------------------------------------------------------------------


def folded(tensors: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Masks as bits, with their shape, and changes of the entries that stay alone."""
    found = dict(tensors)
    for name in names:
        if found[f"{name}.mask"].is_meta:
            continue
        mask = found.pop(f"{name}.mask").cpu()
        found[f"{name}.mask_bits"] = torch.from_numpy(np.packbits(mask.numpy()))
        found[f"{name}.mask_shape"] = torch.tensor(mask.shape)
        if (shift := found.get(f"{name}.shift")) is not None:
            found[f"{name}.shift"] = shift.cpu()[mask]
    return found


def unfolded(tensors: dict[str, Tensor], method: str) -> dict[str, Tensor]:
    """The inverse of `folded`.

    Raises:
        MismatchError: bits or changes that do not belong to their shape.
    """
    found = dict(tensors)
    for name in [k.removesuffix(".mask_shape") for k in tensors if k.endswith(".mask_shape")]:
        shape = found.pop(f"{name}.mask_shape").flatten().tolist()
        bits, shift = found.pop(f"{name}.mask_bits", torch.empty(0)), found.get(f"{name}.shift")
        count = shape[0] * shape[1] if len(shape) == 2 and min(shape) >= 1 and bits.dtype == torch.uint8 else -1
        if count < 0 or bits.numel() != -(-count // 8):
            raise MismatchError(f"{method}: the mask of '{name}' is damaged. Take the adapter as it was saved.")
        mask = torch.from_numpy(np.unpackbits(bits.cpu().numpy(), count=count)).bool().view(shape)
        if shift is not None:
            if shift.numel() != int(mask.sum()):
                raise MismatchError(
                    f"{method}: there are {shift.numel():,} changes for the {int(mask.sum()):,} entries of '{name}' that stay. "
                    "Take the adapter as it was saved."
                )
            found[f"{name}.shift"] = torch.zeros(shape).masked_scatter_(mask, shift.cpu().float())
        found[f"{name}.mask"] = mask
    return found
