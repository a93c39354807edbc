"""A projection of which single entries of weight and bias are tuned.

    y = (W + scatter(delta)) x + b + scatter(delta_b)

In memory: (W + scatter(delta)) is formed anew in forward and in backward and never kept; the gradient of delta is computed for
these entries alone (`zoo.adapters.parts.sampled`). What else was tried, on one CPU core at ViT-B/16 sizes: adding
`delta_k x[i_k]` to y in place, a sparse product in forward, a dense product of the rows and columns that are hit; all slower.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adapters.parts.sampled import sampled
from zoo.engine.second_order import exact, first_order
from zoo.errors import MismatchError
from zoo.points import LinearPoint, Merger

__all__ = ["Entries", "index_of"]

Part = tuple["Entries", int, int]


def index_of(known: Tensor | None, count: int) -> Tensor:
    """A copy of the positions that were chosen; without any, `count` places for those that a file brings."""
    if known is not None and len(known) == count:
        return known.clone()
    return torch.full((count,), -1, dtype=torch.int32)


class Entries(nn.Module):
    """The entries that are tuned at one projection, or at one slice of a fused one; all slices are computed together."""

    weight_index: Tensor | None
    bias_index: Tensor | None

    def __init__(self, point: LinearPoint, indices: dict[str, Tensor], whole_bias: bool = False) -> None:
        super().__init__()
        self.sizes = {"weight_index": point.dim_in * point.dim_out, "bias_index": point.dim_out}
        for name in self.sizes:  # positions in the flat weight and bias of this point
            self.register_buffer(name, indices.get(name))
        count = {"weight": 0, "bias": point.dim_out if whole_bias else 0}
        count |= {name.removesuffix("_index"): len(index) for name, index in indices.items()}
        self.weight_delta = nn.Parameter(torch.zeros(count["weight"])) if count["weight"] else None
        self.bias_delta = nn.Parameter(torch.zeros(count["bias"])) if count["bias"] else None

    @staticmethod
    def linear_group(
        parts: tuple[Part, ...], run: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """x (..., i) -> (..., o)."""
        return Entries.tuned(parts, run, x, weight, bias)

    @staticmethod
    def tuned(
        parts: Sequence[Part], run: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """The projection of x (..., i) with all changed entries of its slices, (..., o)."""
        if bias is not None and (found := [m.entries("bias", a) for m, a, _ in parts if m.bias_delta is not None]):
            bias = bias.index_add(0, torch.cat([i for i, _ in found]), torch.cat([d for _, d in found]).to(bias.dtype))
        found = [m.entries("weight", a * x.shape[-1]) for m, a, _ in parts if m.weight_delta is not None]
        if not found:
            return run(x, weight, bias)
        index, delta = torch.cat([i for i, _ in found]), torch.cat([d for _, d in found])
        if run is F.linear and not weight.requires_grad and not exact():
            return _SparselyTuned.apply(x, weight, bias, index, delta)
        return run(x, _moved(weight, index, delta), bias)

    def entries(self, name: str, start: int) -> tuple[Tensor, Tensor]:
        """Flat positions (n,) in the whole projection, of which this slice begins at `start`, and their changes (n,)."""
        index, delta = getattr(self, f"{name}_index"), getattr(self, f"{name}_delta")
        if index is None:  # a bias that is tuned whole
            index = torch.arange(len(delta), device=delta.device, dtype=torch.int32)
        return index + start, delta

    def change(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The change of the weight or bias as a dense tensor, in float32."""
        if getattr(self, f"{name}_delta") is None:
            return torch.zeros(shape)
        index, delta = self.entries(name, 0)
        change = torch.zeros(math.prod(shape), device=delta.device)
        return change.index_add_(0, index, delta.detach().float()).view(shape)

    def fold(self, merger: Merger, point: LinearPoint) -> None:
        """Add the changes to the point's weight and bias."""
        weight = merger.weight(point)
        merger.set_weight(point, weight + self.change("weight", tuple(weight.shape)).to(weight.device))
        if self.bias_delta is not None:
            bias = merger.bias(point)
            merger.set_bias(point, bias + self.change("bias", tuple(bias.shape)).to(bias.device))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, size in self.sizes.items():
            index = state.get(prefix + name)
            if index is not None and len(index) and (int(index.min()) < 0 or int(index.max()) >= size):
                raise MismatchError(
                    f"'{prefix}{name}' points outside of the {size:,} weights. Take the adapter as it was saved."
                )
        super()._load_from_state_dict(state, prefix, *args)


def _moved(weight: Tensor, index: Tensor, delta: Tensor) -> Tensor:
    """W (o, i) with delta (n,) added at flat positions index (n,)."""
    return weight.flatten().index_add(0, index, delta.to(weight.dtype)).view(weight.shape)


class _SparselyTuned(torch.autograd.Function):
    """`x -> (W + scatter(delta)) x + b` for a frozen W; the sum is formed again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, delta: Tensor) -> Tensor:
        learning = ctx.needs_input_grad[4]
        ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(x if learning else None, weight, index, delta)
        # .data: else the result may count as a view, and a structured module could not add to it in place
        return F.linear(x, _moved(weight, index, delta), bias).data

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, weight, index, delta = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        dx = db = dd = None
        if ctx.needs_input_grad[0]:
            dx = (grad @ _moved(weight, index, delta).to(grad.dtype)).to(ctx.x_dtype)
        if ctx.needs_input_grad[2]:
            db = rows.sum(0, dtype=ctx.bias_dtype)
        if ctx.needs_input_grad[4]:
            dd = sampled(rows, x.reshape(-1, x.shape[-1]), index, torch.empty_like(delta))
        return dx, None, db, None, dd
