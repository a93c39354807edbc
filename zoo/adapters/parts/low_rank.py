"""The product of two thin matrices beside a projection, and its sum with the projection's output.

    y[..., start:stop] += s B A x           A (r, i), B (o, r), for slices of one projection, all at once and in place

In memory: backward needs x and the r numbers of A x.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adapters.base import Adapter
from zoo.engine.memory import dropped
from zoo.engine.second_order import exact, first_order
from zoo.errors import AttachError
from zoo.points import LinearPoint
from zoo.points.rows import is_conv

__all__ = ["LowRank", "add_low_rank", "check_rank"]

Part = tuple["LowRank", int, int]


def check_rank(adapter: Adapter, ranks: Iterable[tuple[LinearPoint, int]], setting: str = "rank") -> None:
    """A fresh adapter has no more ranks than a change of the widest of its targets can have.

    Where targets differ in width, the narrow ones keep a rank that the others can use, as peft's do; the method's own default is
    kept by networks that are narrower still; and what is put together or was made elsewhere (a weighted sum, peft's, which asks
    no question) keeps those that it has.

    Raises:
        AttachError: at all points of this rank, fewer are the same changes with fewer numbers.
    """
    widest: dict[int, tuple[int, LinearPoint]] = {}
    for point, rank in ranks:
        module: Any = point.module
        most = min(point.dim_out, math.prod(module.weight.shape[1:]) if is_conv(module) else point.dim_in)
        if most > widest.get(rank, (0, point))[0]:
            widest[rank] = most, point
    usual = next((f.default for f in fields(adapter) if f.name == setting and isinstance(f.default, int)), 0)
    for rank, (most, point) in widest.items():
        if rank > max(most, usual) and not adapter.of_values:
            raise AttachError(
                f"'{adapter.method}' has {setting} {rank}, and a change of the weight of '{point.name}', the widest of its "
                f"targets, has rank {most} at most: more are the same changes, with more numbers. Expected 1 to {most}."
            )


class LowRank(nn.Module):
    """`x (..., dim_in) -> scale * B A dropout(x) (..., dim_out)`."""

    def __init__(
        self, dim_in: int, dim_out: int, rank: int, scale: float, dropout: float = 0.0, learn_scale: bool = False
    ) -> None:
        super().__init__()
        self.lora_a = nn.Parameter(torch.empty(rank, dim_in))
        self.lora_b = nn.Parameter(torch.zeros(dim_out, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.lora_scale = nn.Parameter(torch.tensor(float(scale))) if learn_scale else None
        self.scale = 1.0 if learn_scale else scale
        self.drop = nn.Dropout(dropout)

    def scaled_b(self) -> Tensor:
        """B, times the learned scale if there is one: (o, r) numbers, so that no output has to be kept for its gradient."""
        return self.lora_b if self.lora_scale is None else self.lora_scale * self.lora_b

    def forward(self, x: Tensor) -> Tensor:
        """The delta alone."""
        return self.scale * F.linear(F.linear(self.drop(x), self.lora_a), self.scaled_b())

    def delta(self) -> Tensor:
        """The change of W (dim_out, dim_in)."""
        return self.scale * (self.scaled_b() @ self.lora_a)

    @staticmethod
    def add_group(parts: tuple[Part, ...], x: Tensor, y: Tensor) -> Tensor:
        """`y[..., start:stop] += delta(x)` for all parts of one projection at once; y is changed in place and returned."""
        first = parts[0][0]
        x = dropped(x, first.drop)
        slices = tuple((start, stop, m.scale) for m, start, stop in parts)
        factors = [f for m, _, _ in parts for f in (m.lora_a, m.scaled_b())]
        return add_low_rank(x, y, slices, factors)


def add_low_rank(x: Tensor, y: Tensor, slices: tuple[tuple[int, int, float], ...], factors: Sequence[Tensor]) -> Tensor:
    """`y[..., start:stop] += s B A x` for slices (start, stop, s), with factors A_1, B_1, A_2, ...; y is changed in place."""
    if torch.compiler.is_compiling() or x.device.type == "meta" or exact():
        return _plain(x, y, slices, factors)
    return _LowRankAdd.apply(y, x, slices, *factors)


def _plain(x: Tensor, y: Tensor, slices: tuple[tuple[int, int, float], ...], factors: Sequence[Tensor]) -> Tensor:
    """The same in plain operations, for the compiler and for derivatives of any order."""
    pieces, at = [], 0
    x = x.to(y.dtype)
    for (start, stop, scale), a, b in zip(slices, factors[::2], factors[1::2]):
        if start > at:
            pieces.append(y.new_zeros(*y.shape[:-1], start - at))
        pieces.append(scale * F.linear(F.linear(x, a.to(y.dtype)), b.to(y.dtype)))
        at = stop
    if at < y.shape[-1]:
        pieces.append(y.new_zeros(*y.shape[:-1], y.shape[-1] - at))
    return y + (pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1))


class _LowRankAdd(torch.autograd.Function):
    """`y[:, slice_j] += s_j B_j A_j x` in place. All in the dtype of y (that of the autocast region).

    The r numbers of a token stand in columns, (r, n): products with few rows are several times faster on a CPU than those
    with few columns.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, slices: tuple[tuple[int, int, float], ...], *factors: Tensor) -> Tensor:
        ranks = [len(a) for a in factors[::2]]
        rows, flat = x.reshape(-1, x.shape[-1]).to(y.dtype), y.view(-1, y.shape[-1])
        hidden = (_stack(factors[::2], y.dtype) @ rows.T).to(y.dtype)  # (sum of ranks, n)
        for h, (start, stop, scale), b in zip(hidden.split(ranks), slices, factors[1::2]):
            flat[:, start:stop].addmm_(h.T, b.T.to(y.dtype), alpha=scale)
        ctx.mark_dirty(y)
        ctx.slices, ctx.ranks, ctx.shape, ctx.dtype = slices, ranks, x.shape, x.dtype
        ctx.trained = any(ctx.needs_input_grad[3:])  # a frozen adapter needs neither x nor A x
        ctx.save_for_backward(*((x, hidden) if ctx.trained else ()), *factors)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        saved = ctx.saved_tensors
        factors = saved[2:] if ctx.trained else saved
        g = grad.reshape(-1, grad.shape[-1])
        through = g.new_empty(sum(ctx.ranks), len(g))  # gradient of the hidden values
        for t, (start, stop, scale), b in zip(through.split(ctx.ranks), ctx.slices, factors[1::2]):
            torch.mm((b.to(g.dtype) * scale).T, g[:, start:stop].T, out=t)
        grads: list[Any] = [None] * len(factors)
        if ctx.trained:
            x, hidden = saved[:2]
            down = (through @ x.reshape(-1, x.shape[-1]).to(g.dtype)).split(ctx.ranks)
            grads[::2] = [d.to(a.dtype) for d, a in zip(down, factors[::2])]
            grads[1::2] = [
                (h @ g[:, start:stop]).mul_(scale).T.to(b.dtype)
                for h, (start, stop, scale), b in zip(hidden.split(ctx.ranks), ctx.slices, factors[1::2])
            ]
        dx = None
        if ctx.needs_input_grad[1]:
            dx = (through.T @ _stack(factors[::2], g.dtype)).view(ctx.shape).to(ctx.dtype)
        return (grad, dx, None, *grads)


def _stack(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """All A of one projection, (sum of ranks, dim_in)."""
    return torch.cat([a.to(dtype) for a in matrices]) if len(matrices) > 1 else matrices[0].to(dtype)
