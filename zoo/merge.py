"""Merging: fold adapters into a copy of the backbone's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import MergeError
from zoo.points import LinearPoint, Point


class Merger:
    """Handed to `Adapter.merge`: changes weights of `target`, a copy of the backbone without hooks.

    All tensors handed in are in the adapter's dtype; sums are formed in float32 at least and cast back.
    """

    def __init__(self, target: nn.Module, points: Any) -> None:
        self.target = target
        self.points = points

    def module(self, point: Point) -> nn.Module:
        """The copy's module at a point."""
        return self.target.get_submodule(point.path)

    @contextmanager
    def _edit(self, point: Point, name: str) -> Iterator[Tensor]:
        parameter = self.module(point)._parameters.get(name)
        if parameter is None:
            raise MergeError(
                f"point '{point.name}' has no {name} to merge into, and adding one would change the library's module. "
                "Keep the adapter live."
            )
        rows = slice(point.start, point.stop) if isinstance(point, LinearPoint) else slice(None)
        with torch.no_grad():
            part = parameter.data[rows]
            wide = part.to(torch.promote_types(part.dtype, torch.float32))
            yield wide
            part.copy_(wide)

    def add_weight(self, point: LinearPoint, delta: Tensor) -> None:
        """`W <- W + delta`; delta (dim_out, dim_in)."""
        with self._edit(point, "weight") as weight:
            weight += delta.detach().to(weight).reshape(weight.shape)

    def set_weight(self, point: LinearPoint, value: Tensor) -> None:
        """`W <- value`; (dim_out, dim_in)."""
        with self._edit(point, "weight") as weight:
            weight.copy_(value.detach().reshape(weight.shape))

    def weight(self, point: LinearPoint) -> Tensor:
        """The copy's present weight at a point (dim_out, dim_in), with what was merged before."""
        return self.module(point).weight.data[point.start : point.stop].flatten(1)  # type: ignore[operator,union-attr,index]

    def add_bias(self, point: Point, delta: Tensor) -> None:
        """`b <- b + delta`; (dim_out,)."""
        with self._edit(point, "bias") as bias:
            bias += delta.detach().to(bias)

    def rescale(self, point: Point, scale: Tensor, shift: Tensor | None = None) -> None:
        """Output `y <- scale * y + shift` of a projection or norm; both (dim_out,)."""
        with self._edit(point, "weight") as weight:
            weight *= scale.detach().to(weight).reshape(-1, *[1] * (weight.dim() - 1))
        if shift is not None or self.module(point)._parameters.get("bias") is not None:
            with self._edit(point, "bias") as bias:
                bias *= scale.detach().to(bias)
                if shift is not None:
                    bias += shift.detach().to(bias)

    def rescale_input(self, point: LinearPoint, scale: Tensor) -> None:
        """Input `x <- scale * x` of a projection; (dim_in,)."""
        with self._edit(point, "weight") as weight:
            weight *= scale.detach().to(weight)
