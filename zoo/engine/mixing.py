"""Several loaded adapters mixed by a module at every point where all of them act.

A method that mixes (fusion by attention, learned sums, merging by search) asks for it while it attaches:

    points.mix(("birds", "cars"), lambda point: WeightedSum(2))

At each point at which all the named adapters change something, the module is called with `y`, the activation that none of them
has changed, and what each of them would make of it: `module(y, [y_birds, y_cars]) -> y`. The named adapters are then not in use
themselves (the mixing one runs them), frozen as switched-off adapters are, and cannot be removed before it. What changes
something else than an activation (keys and values, weights, the token sequence) cannot be mixed and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.engine.changes import Skip
from zoo.engine.sites import Op, Site
from zoo.errors import AttachError, CombinationError, UnknownNameError, nearest
from zoo.points import Points

__all__ = ["Mixed", "WeightedSum", "check_pair", "check_removal", "mix", "mixed_by"]

Installed = Mapping[str, list[tuple[Site, Op]]]


@dataclass(eq=False)
class Mixed:
    """The op's function: what each adapter makes of the activation, then the module. Some of them work in place."""

    module: nn.Module
    ops: tuple[Op, ...]

    @property
    def owners(self) -> tuple[str, ...]:
        """Whose ops are run here."""
        return tuple(op.owner for op in self.ops)

    def __call__(self, *tensors: Tensor) -> Tensor:
        """`(x, y)` at an output, `(x,)` at an input; the last one changes."""
        *before, y = tensors
        return self.module(y, [op.fn(*before, y.clone()) for op in self.ops])  # type: ignore[no-any-return]


class WeightedSum(nn.Module):
    """`y + sum_i w_i (y_i - y)`: w trained, one number for each adapter, or given for each sample.

    Args:
        count: of adapters. weights: to begin with; by default 1 / count each.
        given: a value of the forward context (`points.context("weights")`) with (B, count) weights, instead of trained ones.
    """

    def __init__(self, count: int, weights: Sequence[float] | None = None, given: Any = None) -> None:
        super().__init__()
        self.given = given
        start = torch.full((count,), 1.0 / count) if weights is None else torch.tensor([float(w) for w in weights])
        self.weights = nn.Parameter(start) if given is None else None

    def forward(self, y: Tensor, outputs: Sequence[Tensor]) -> Tensor:
        """(..., d) and as many of it -> (..., d)."""
        changes = torch.stack([output - y for output in outputs])  # (n, ..., d)
        weights: Any = self.weights if self.given is None else self.given.rows(y).T  # (n,) or (n, rows)
        return y + (changes * weights.to(y.dtype).reshape(*weights.shape, *([1] * (changes.ndim - weights.ndim)))).sum(
            0
        )


def mix(
    session: Any, others: Installed, points: Points, names: Sequence[str], make: Callable[[Any], nn.Module]
) -> None:
    """Record the ops of the mixing adapter that attaches.

    Raises:
        UnknownNameError: an adapter that the model has not. AttachError: fewer than two, one that cannot be mixed, or no point at
        which all of them act.
    """
    names = tuple(names)
    for name in names:
        if name not in others:
            raise UnknownNameError(
                f"The model has no adapter '{name}' to mix. {nearest(name, others)} Attach it first."
            )
    if len(names) < 2 or len(set(names)) < len(names):
        raise AttachError(f"Mixing needs two adapters or more, each named once; given: {', '.join(names) or 'none'}.")
    changes: dict[tuple[str, int, str], list[tuple[Site, Op]]] = {}
    watches: list[tuple[Site, Op]] = []
    for name in names:
        if session.readers.get(name):
            raise AttachError(
                f"'{name}' cannot be mixed: it reads values of the forward pass, which only adapters in use are given."
            )
        for site, op in others[name]:
            if op.where.startswith("watch_") and op.where in ("watch_input", "watch_output"):
                watches.append((site, op))
            elif op.where in ("input", "output") and op.per_row:
                changes.setdefault((op.point, id(site.module), op.where), []).append((site, op))
            else:
                raise AttachError(
                    f"'{name}' cannot be mixed: '{op.verb}' at '{op.point}' changes no single activation. Mix adapters that add "
                    "to activations or rescale them (lora, adapter, ssf, ia3)."
                )
    common = {key: found for key, found in changes.items() if sorted(op.owner for _, op in found) == sorted(names)}
    if not common:
        raise AttachError(f"There is no point at which all of {', '.join(names)} act once, so nothing would be mixed.")
    if left := sorted({key[0] for key in changes.keys() - common.keys()}):
        raise AttachError(
            f"At '{left[0]}' not all of {', '.join(names)} act, so what stands there would be left out. Mix adapters that act at "
            "the same points."
        )
    by_name = {point.name: point for point in points}
    for site, op in watches:
        own = Op(session.owner, op.where, op.fn, op.point, verb="mix", modules=op.modules, last=op.last)
        session.op(site.module, own, type(site))
    for (where_name, _, where), found in common.items():
        ordered = tuple(next(op for _, op in found if op.owner == name) for name in names)
        module = make(by_name[where_name])
        session.own(by_name[where_name], module)
        inner = tuple(m for op in ordered for m in op.modules)
        own = Op(session.owner, where, Mixed(module, ordered), where_name, verb="mix", modules=(module, *inner))
        session.op(found[0][0].module, own, type(found[0][0]))


def mixed_by(ops: Sequence[tuple[Site, Op]]) -> set[str]:
    """The adapters that an adapter with these ops runs itself."""
    return {owner for _, op in ops if isinstance(op.fn, Mixed) for owner in op.fn.owners}


def check_pair(name: str, ops: Sequence[tuple[Site, Op]], other: str, theirs: Sequence[tuple[Site, Op]]) -> None:
    """Raise CombinationError if one of two adapters mixes the other, which would act twice, or skips a block in which the other
    has something, which would never run."""
    for mixing, own, mixed in ((name, ops, other), (other, theirs, name)):
        if mixed in mixed_by(own):
            raise CombinationError(
                f"'{mixing}' runs '{mixed}' itself; with both in use it would act twice. Use '{mixing}' alone: "
                f"model.set_active('{mixing}')."
            )
        for block in (op.point for _, op in own if isinstance(op.fn, Skip) and getattr(op.fn.module, "always", False)):
            others = theirs if own is ops else ops
            if inside := next((op.point for _, op in others if op.point.startswith(f"{block}.")), None):
                raise CombinationError(
                    f"'{mixing}' skips '{block}', and '{mixed}' has something inside of it, at '{inside}', which would never "
                    f"run. Leave that block out of the targets of '{mixed}'."
                )


def check_removal(name: str, installed: Installed) -> None:
    """Raise CombinationError if another adapter mixes this one."""
    for other, ops in installed.items():
        if name in mixed_by(ops):
            raise CombinationError(f"'{other}' mixes '{name}'; remove '{other}' first.")
