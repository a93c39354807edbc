"""A projection whose weight is rounded to multiples of learned steps, and the change of low rank that is rounded with it.

    W' = W + c B A,   v = W' / s - z,   q = round(clamp(v, Qn, Qp)),   y = s (q + z) x + b

s and z are of a group of inputs of one output. With G = dy^T x, and M: Qn <= v <= Qp, straight through the rounding:

    dB = c (G . M) A^T,   dA = c B^T (G . M),   ds = sum_group G . (q - v inside, q + z outside),   dz = s sum_group G . (1 - M)

In memory: x, W, A, B, s and z are kept for backward, and the rounded weight is made again, as are v and M. The gradient of the
steps needs all of G, a product that a frozen weight does not need.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.engine.second_order import exact, first_order, straight

__all__ = ["Levels", "Stepped", "first_step"]

# How far outside of Qn ... Qp a number still counts as inside: the first steps put the largest number of a group on its edge,
# from which the precision of s alone could push it, and with it all of its gradient
SLACK = 1e-4


@dataclass(frozen=True)
class Levels:
    """Whole numbers of `bits` bits, Qn = -2^(bits - 1) to Qp = 2^(bits - 1) - 1."""

    bits: int

    @property
    def low(self) -> int:
        """Qn."""
        return -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        """Qp."""
        return 2 ** (self.bits - 1) - 1


def first_step(weight: Tensor, group: int, levels: Levels) -> Tensor:
    """s (o, i / group) of a weight (o, i): the smallest that covers every number of its group."""
    grouped = weight.detach().float().unflatten(1, (-1, group))
    return torch.maximum(grouped.amin(-1) / levels.low, grouped.amax(-1) / levels.high)


class Stepped(nn.Module):
    """W (o, i) -> s (q + z), by the formulas above; what is trained of s is its logarithm, so that it stays positive."""

    def __init__(self, weight: Tensor, rank: int, scale: float, group: int, levels: Levels, offset: bool) -> None:
        super().__init__()
        dim_out, dim_in = weight.shape
        made: dict[str, Any] = {"device": weight.device if weight.is_meta else None}
        self.lora_a = nn.Parameter(torch.empty(rank, dim_in, **made))
        self.lora_b = nn.Parameter(torch.zeros(dim_out, rank, **made))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        step = first_step(weight, group, levels)
        step = torch.where(step > 0, step, 1.0)  # a group of zeros, which any step keeps
        self.log_step = nn.Parameter(step.log().to(self.lora_a.device))
        self.offset = nn.Parameter(torch.zeros_like(self.log_step)) if offset else None
        self.scale, self.levels = scale, levels

    def numbers(self) -> list[Tensor]:
        """A, B, log s, and z if there is one."""
        return [self.lora_a, self.lora_b, self.log_step, *(() if self.offset is None else (self.offset,))]

    @torch.no_grad()
    def stepped_by(self, weight: Tensor) -> float:
        """s by the first s of this weight (o, i), the geometric mean over all groups; those of zeros alone do not count."""
        first = first_step(weight, weight.shape[1] // self.log_step.shape[1], self.levels)
        moved = (self.log_step - first.to(self.log_step).log())[first > 0]
        return float(moved.mean().exp()) if len(moved) else 1.0

    @torch.no_grad()
    def whole_numbers(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """q (o, i), s and z (o, i / group)."""
        _, q, s, z = _divided(self, weight, *self.numbers())
        return q.flatten(1), s, z

    def rounded(self, weight: Tensor) -> Tensor:
        """s (q + z), made of operations of torch that hand the gradient straight through the rounding."""
        if weight.requires_grad or any(p.requires_grad for p in self.numbers()):
            straight("L4Q")
        v, q, s, z = _divided(self, weight, *self.numbers())
        inside = v.clamp(self.levels.low, self.levels.high)
        q = inside + (q - inside).detach()
        return ((q if z is None else q + z[..., None]) * s[..., None]).flatten(1).to(weight.dtype)

    @staticmethod
    def linear_group(
        parts: tuple[tuple[Stepped, int, int], ...],
        run: Callable[..., Tensor],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """x (..., i) -> (..., o), of all slices of a projection together."""
        if run is F.linear and not weight.requires_grad and not exact():
            numbers = [n for part, _, _ in parts for n in part.numbers()]
            return _SteppedLinear.apply(x, weight, bias, parts, *numbers)
        pieces, at = [], 0
        for part, start, stop in parts:
            pieces += [weight[at:start], part.rounded(weight[start:stop])]
            at = stop
        return run(x, torch.cat([*pieces, weight[at:]]), bias)


def _divided(
    part: Stepped, weight: Tensor, a: Tensor, b: Tensor, log_step: Tensor, z: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """v and q (o, i / group, group), s and z (o, i / group)."""
    wide = weight.to(torch.promote_types(weight.dtype, a.dtype))
    with torch.autocast(weight.device.type, enabled=False):  # a narrow product would round to other numbers
        moved = torch.addmm(wide, b.to(wide.dtype), a.to(wide.dtype), alpha=part.scale)
    s = log_step.to(moved.dtype).exp()
    v = moved.unflatten(1, (s.shape[1], -1)) / s[..., None]
    if z is not None:
        v = v - z[..., None]
    return v, v.detach().clamp(part.levels.low, part.levels.high).round_(), s, z


def _made(parts: Sequence[tuple[Stepped, int, int]], weight: Tensor, numbers: Sequence[Tensor]) -> Tensor:
    """The rounded weight of all slices; rows of none stay as they are."""
    pieces, at, rest = [], 0, list(numbers)
    for part, start, stop in parts:
        own = [rest.pop(0) for _ in part.numbers()]
        _, q, s, z = _divided(part, weight[start:stop], *own)
        q = q if z is None else q.add_(z[..., None])
        pieces += [weight[at:start], q.mul_(s[..., None]).flatten(1).to(weight.dtype)]
        at = stop
    pieces = [p for p in (*pieces, weight[at:]) if len(p)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class _SteppedLinear(torch.autograd.Function):
    """The product with the rounded weight, which is made again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, parts: Any, *numbers: Tensor) -> Tensor:
        ctx.parts, ctx.x_dtype = parts, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.straight = True
        learning = any(ctx.needs_input_grad[4:])
        ctx.save_for_backward(x if learning else None, weight, *numbers)
        # .data: else the result may count as a view, and a structured module could not add to it in place
        return F.linear(x, _made(parts, weight, numbers), bias).data

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, weight, *numbers = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        dx = db = None
        if ctx.needs_input_grad[0]:
            dx = (grad @ _made(ctx.parts, weight, numbers).to(grad.dtype)).to(ctx.x_dtype)
        if ctx.needs_input_grad[2]:
            db = rows.sum(0, dtype=ctx.bias_dtype)
        found: list[Tensor | None] = [None] * len(numbers)
        if x is not None:
            inputs, at = x.reshape(-1, x.shape[-1]).to(rows.dtype), 0
            for part, start, stop in ctx.parts:
                count = len(part.numbers())
                own = numbers[at : at + count]
                found[at : at + count] = _gradients(part, rows[:, start:stop].T @ inputs, weight[start:stop], own)
                at += count
        return dx, None, db, None, *found


def _gradients(part: Stepped, g: Tensor, weight: Tensor, numbers: Sequence[Tensor]) -> list[Tensor]:
    """dA, dB, d log s, and dz if there is one, of G (o, i)."""
    a, b = numbers[:2]
    v, q, s, z = _divided(part, weight, *numbers)
    g = g.to(v.dtype)
    inside = (v >= part.levels.low - SLACK) & (v <= part.levels.high + SLACK)
    moved = g.view_as(v) * inside  # G . M
    outside = g.view_as(v) - moved
    ds = (moved * (q - v)).sum(-1) + (outside * (q if z is None else q + z[..., None])).sum(-1)
    moved = moved.flatten(1)
    found = [part.scale * (b.to(v.dtype).T @ moved), part.scale * (moved @ a.to(v.dtype).T), s * ds]
    found += [] if z is None else [s * outside.sum(-1)]
    return [value.to(n.dtype) for value, n in zip(found, numbers, strict=True)]
