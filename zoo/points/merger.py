"""Merging: fold adapters into a copy of the backbone's weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from zoo.errors import MergeError
from zoo.points.foreign import kept_by
from zoo.points.kinds import LinearPoint, SublayerPoint
from zoo.points.point import Point


class Mergeable(Protocol):
    """An adapter, as merging sees it."""

    def check_decided(self) -> None:
        """Raise MergeError where data decide what is folded in, and none were seen."""

    def merge(self, merger: Merger) -> None:
        """Fold this method into the weights."""


Fold = Callable[[nn.Module, Point, Tensor], bool]  # see `Backbone.fold_shift`


class Merger:
    """Handed to `Adapter.merge`: changes weights of `target`, a copy of the backbone without hooks.

    All tensors handed in are in the adapter's dtype; sums are formed in float32 at least and cast back.

    In the live model a projection first gets its reparametrized weight, then its output is changed in the order of the active
    adapters, and its input is scaled in front of all that; what enters a whole sublayer is changed before. So `run` calls every
    adapter's `merge` once for each of these phases, and a verb acts in its own phase only; whatever the order of the adapters,
    merged and live agree. What was done to an input last is folded in first.
    """

    def __init__(self, target: nn.Module, points: Any, fold: Fold | None = None) -> None:
        self.target = target
        self.points = points
        self._fold = fold
        self._folded: dict[str, Tensor] = {}  # points without a bias: what their family took in place of it
        self._phase = ""
        self._turn = 0  # number of the adapter whose turn it is
        self._rescaled: dict[int, int] = {}  # norms by id, and the last adapter that rescales each

    def run(self, adapters: Sequence[Mergeable]) -> None:
        """Fold these adapters in; their order is that of application.

        Raises:
            MergeError: one of them cannot be merged, or has not seen the data that it decides by.
        """
        for adapter in adapters:
            adapter.check_decided()
        turns = list(enumerate(adapters))
        for phase in ("weight", "output", "input", "entry"):
            self._phase = phase
            for self._turn, adapter in reversed(turns) if phase == "entry" else turns:
                adapter.merge(self)
        self._keep_zeros()

    def _keep_zeros(self) -> None:
        """What is zero in a sparse backbone (`zoo.sparsify`) stays zero; what that takes from the adapters is said."""
        for name, module in self.target.named_modules():
            mask = module._buffers.get("weight_mask")
            weight = module._parameters.get("weight")
            if mask is None or weight is None or not bool((lost := weight.data * ~mask).any()):
                continue
            part = float(lost.norm() / (weight.data.norm() + 1e-30))
            weight.data.mul_(mask)
            warnings.warn(
                f"Merging kept the zeros of the sparse weight '{name}': entries of {100 * part:.2g} % of its norm, which the "
                "adapters had put there, are left out, so the merged module computes something else than the live model.",
                stacklevel=4,
            )

    def module(self, point: Point) -> nn.Module:
        """The copy's module at a point."""
        return self.target.get_submodule(point.path)

    def _held(self, point: Point, name: str) -> tuple[nn.Parameter | None, slice]:
        """The copy's parameter of this name, and the rows of it that are the point's."""
        if isinstance(point, LinearPoint) and name == "bias" and point.beside is not None:
            owner = self.target.get_submodule(point.path.rpartition(".")[0])
            return owner._parameters.get(point.beside[1]), slice(None)
        rows = slice(point.start, point.stop) if isinstance(point, LinearPoint) else slice(None)
        return self.module(point)._parameters.get(name), rows

    @contextmanager
    def _edit(self, point: Point, name: str) -> Iterator[Tensor]:
        if point.unmergeable:
            raise MergeError(
                f"point '{point.name}' cannot take a change of its {name}: {point.unmergeable}. Keep the adapter live."
            )
        self._readable(point)
        parameter, rows = self._held(point, name)
        if parameter is None and name == "weight" and (kept := getattr(self.module(point), "kept_in", "")):
            raise MergeError(
                f"the weight of '{point.name}' is kept in {kept}, into which nothing can be merged without rounding it anew. "
                "Keep the adapter live: model.save_adapter(folder)."
            )
        if parameter is None:
            raise MergeError(
                f"point '{point.name}' has no {name} to merge into, and adding one would change the library's module. "
                "Keep the adapter live."
            )
        turned = name == "weight" and isinstance(point, LinearPoint) and point.transposed
        with torch.no_grad():
            part = (parameter.data.T if turned else parameter.data)[rows]
            wide = part.to(torch.promote_types(part.dtype, torch.float32))
            yield wide
            part.copy_(wide)

    def add_weight(self, point: LinearPoint, delta: Tensor) -> None:
        """`W <- W + delta`; delta (dim_out, dim_in)."""
        if self._phase != "output":
            return
        with self._edit(point, "weight") as weight:
            weight += delta.detach().to(weight).reshape(weight.shape)

    def set_weight(self, point: LinearPoint, value: Tensor) -> None:
        """`W <- value`; (dim_out, dim_in). For what the live model does by `reparametrize`."""
        if self._phase != "weight":
            return
        with self._edit(point, "weight") as weight:
            weight.copy_(value.detach().reshape(weight.shape))

    def set_bias(self, point: LinearPoint, value: Tensor) -> None:
        """`b <- value`; (dim_out,). For what the live model does by `reparametrize`."""
        if self._phase != "weight":
            return
        with self._edit(point, "bias") as bias:
            bias.copy_(value.detach())

    def _readable(self, point: Point) -> None:
        """Raise MergeError where another library has quantised the weight."""
        if kept := kept_by(self.module(point)):
            raise MergeError(
                f"point '{point.name}' keeps its weight {kept}, into which nothing can be folded. Keep the adapter live, or "
                "merge it into the backbone that was not quantised."
            )

    def bias(self, point: LinearPoint) -> Tensor:
        """The copy's present bias at a point (dim_out,), with what was merged before."""
        return self.module(point).bias.data[point.start : point.stop]  # type: ignore[operator,union-attr,index]

    def weight(self, point: LinearPoint) -> Tensor:
        """The copy's present weight at a point (dim_out, dim_in), with what was merged before."""
        self._readable(point)
        weight: Tensor = self.module(point).weight.data  # type: ignore[operator,union-attr,assignment]
        return (weight.T if point.transposed else weight)[point.start : point.stop].flatten(1)

    def add_bias(self, point: Point, delta: Tensor) -> None:
        """`b <- b + delta`; (dim_out,)."""
        if self._phase != "output" or self._elsewhere(point, delta):
            return
        with self._edit(point, "bias") as bias:
            bias += delta.detach().to(bias)

    def _elsewhere(self, point: Point, shift: Tensor | None, scale: Tensor | None = None) -> bool:
        """Where there is no bias: fold the shift of an output into what the family has instead; false if it has nothing."""
        before = self._folded.get(point.name)
        nothing = shift is None and before is None
        if nothing or self._fold is None or self._held(point, "bias")[0] is not None:
            return False
        with torch.no_grad():
            kept = before if before is None or scale is None else before * scale
            after = sum(t.detach() for t in (kept, shift) if t is not None)
            assert isinstance(after, Tensor)
            if not self._fold(self.target, point, after if before is None else after - before):
                return False
        self._folded[point.name] = after
        return True

    def add_rows(self, point: Point, rows: Tensor, delta: Tensor) -> None:
        """Rows of a table of embeddings at a point: `row <- row + delta`; rows (n,), delta (n, d).

        Raises:
            MergeError: there is no such table.
        """
        if self._phase != "output":
            return
        table = next((m for m in self.module(point).modules() if isinstance(m, nn.Embedding)), None)
        if table is None:
            raise MergeError(f"point '{point.name}' has no table of embeddings to merge into. Keep the adapter live.")
        with torch.no_grad():
            table.weight[rows] = (table.weight[rows] + delta.detach().to(table.weight)).to(table.weight.dtype)

    def rescale(self, point: Point, scale: Tensor, shift: Tensor | None = None) -> None:
        """Output `y <- scale * y + shift` of a projection or norm; both (dim_out,)."""
        if self._phase != "output":
            return
        self._rescaled[id(point.module)] = self._turn
        with self._edit(point, "weight") as weight:
            weight *= scale.detach().to(weight).reshape(-1, *[1] * (weight.dim() - 1))
        if self._elsewhere(point, shift, scale):
            return
        if shift is not None or self._held(point, "bias")[0] is not None:
            with self._edit(point, "bias") as bias:
                bias *= scale.detach().to(bias)
                if shift is not None:
                    bias += shift.detach().to(bias)

    def rescale_input(self, point: LinearPoint, scale: Tensor) -> None:
        """Input `x <- scale * x` of a projection; (dim_in,)."""
        if self._phase != "input":
            return
        with self._edit(point, "weight") as weight:
            weight *= scale.detach().to(weight).reshape(-1, *[1] * (weight.dim() - 2))

    def before(self, point: SublayerPoint, delta: Tensor, shift: Tensor | None = None) -> None:
        """Input `x <- x + delta x + shift` of a sublayer, in the projections that read it; delta (d, d), shift (d,).

        Raises:
            MergeError: no projection alone reads it, zeros join it behind the change, or another adapter changes it in between.
        """
        if self._phase != "entry":
            return
        if point.unmergeable:
            raise MergeError(
                f"'{point.name}' cannot take a change of its input: {point.unmergeable}. Keep the adapter live, or leave it out."
            )
        readers = self.points.readers(point)
        if not readers or any(
            r.weight.shape[1] != point.dim_in for r in readers
        ):  # others are convolutions over places
            raise MergeError(
                f"'{point.name}' cannot take a change of its input: it is not read by projections alone. Keep the adapter live."
            )
        layout = point.layout
        filled = point.role != "mlp" and layout is not None and layout.window is not None
        filled = filled and point.entry_side == "output" and point.inner is None
        if filled and shift is not None:
            assert layout is not None and layout.window is not None
            if not layout.grid or any(n % w for n, w in zip(layout.grid, layout.window)):
                raise MergeError(
                    f"'{point.name}' cannot take a shift of its input: its windows are filled up with zeros, which the shift "
                    "does not reach. Keep the adapter live, or use an image size that windows divide."
                )
        norm = self.points.norm_before(point)
        if norm is not None and self._rescaled.get(id(norm.module), -1) > self._turn:
            raise MergeError(
                f"'{norm.name}' is rescaled behind a change of its output that a projection shall take in, so the two cannot be "
                "merged in this order. Activate the adapter that rescales norms first: model.set_active(...)."
            )
        for reader in readers:
            with self._edit(reader, "weight") as weight:
                matrix = weight.flatten(1)
                moved = None if shift is None else matrix @ shift.detach().to(matrix)
                weight += (matrix @ delta.detach().to(matrix)).reshape(weight.shape)
            if moved is not None and not self._elsewhere(reader, moved):
                with self._edit(reader, "bias") as bias:
                    bias += moved
