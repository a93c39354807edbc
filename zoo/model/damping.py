"""Damping: an adapter's effect scaled, at all blocks or at some, for the time of a context. See `zoo.damped`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from zoo.engine.sites import BlockSite, LinearSite, Op, Site
from zoo.errors import ConfigError, SelectionError, nearest
from zoo.model.probing import unwrapped

__all__ = ["damped"]

Factors = float | Mapping[int | str, float]


@contextmanager
def damped(model: Any, adapter: str, factor: Factors = 0.0) -> Iterator[None]:
    """A context in which what an adapter changes is `factor` times as much: `y + factor * (op(y) - y)` at each of its ops.

    Args:
        adapter: the name of an active one.
        factor: 0 is off, 1 as it is. For some blocks: by their index (in every tower), or by name ("text.blocks.3"); the others,
            and what is outside of blocks, stay as they are.

    What changes the number of tokens, adds keys and values, or trains the backbone's own parameters can be switched off (0), and
    not scaled. Backward belongs inside of the context where blocks are run again for it (memory="min"); elsewhere that raises.

    Raises:
        ConfigError: an adapter that is not active, is read by the head, or cannot be scaled. SelectionError: no such block.
    """
    model = unwrapped(model)
    if adapter not in model.active:
        raise ConfigError(
            f"'{adapter}' cannot be damped: it is not active (active: {', '.join(model.active) or 'none'})."
        )
    if model.adapters[adapter].own_features:
        raise ConfigError(
            f"'{adapter}' cannot be damped at blocks: the head reads what it computes. Use model.set_active(...)."
        )
    at = _factors(model, factor)
    ops = model._ops[adapter]
    _check_runs(adapter, [op.point for _, op in ops if op.verb == "run"], at)
    now = [(site, _scaled(site, op, at(op.point))) for site, op in ops]
    changed = {id(new): old for (_, old), (_, new) in zip(ops, now) if new is not old}
    swaps = [
        swap for swap in model._swaps[adapter] if (f := at(_point_of(model, swap.module))) != 1.0 and _off(adapter, f)
    ]
    standing = model._state.swaps
    state, token = model._state, object()
    before = state.damping
    sites = list({id(site): site for (site, old), (_, new) in zip(ops, now) if new is not old}.values())
    instead = {id(old): new for (_, old), (_, new) in zip(ops, now)}
    for site in sites:
        site.ops = [instead.get(id(op), op) for op in site.ops]
        site.refresh()
    state.stand(tuple(swap for swap in standing if swap not in swaps))
    state.damping, model._ops[adapter] = token, now
    try:
        yield
    finally:
        state.damping = before
        if model._ops.get(adapter) is now:  # it may have been taken away, or attached anew
            model._ops[adapter] = ops
        for site in sites:
            site.ops = [changed.get(id(op), op) for op in site.ops]
            site.refresh()
        model._stand_in()


def _factors(model: Any, factor: Factors) -> Callable[[str], float]:
    """The factor at each point, by name."""
    values = list(factor.values()) if isinstance(factor, Mapping) else [factor]
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ConfigError(f"factor is {value!r}; expected a finite number: 0 is off, 1 as it is.")
    if not isinstance(factor, Mapping):
        return lambda name: float(factor)
    blocks = {p.name: p for p in model.points if p.kind == "block"}
    found: dict[str, float] = {}
    for key, value in factor.items():
        names = [n for n, p in blocks.items() if key in (n, p.block)]
        if not names:
            known = [str(p.block) for p in blocks.values()] + list(blocks)
            raise SelectionError(f"{model.backbone_name} has no block {key!r}. {nearest(str(key), known)}")
        found |= dict.fromkeys(names, float(value))

    def at(name: str) -> float:
        return next((f for block, f in found.items() if name == block or name.startswith(f"{block}.")), 1.0)

    return at


def _check_runs(adapter: str, blocks: list[str], at: Callable[[str], float]) -> None:
    """Raise ConfigError if some blocks of a sequence that an adapter runs as one have another factor than the rest."""
    factors: dict[str, set[float]] = {}
    for name in blocks:
        factors.setdefault(name.rpartition(".")[0], set()).add(at(name))
    if any(len(found) > 1 for found in factors.values()):
        raise ConfigError(
            f"'{adapter}' runs its blocks as one: it can be switched off at all of them (factor 0), or at none."
        )


def _point_of(model: Any, module: Any) -> str:
    return next((p.name for p in model.points if p.module is module), "")


def _off(adapter: str, factor: float) -> bool:
    if factor != 0:
        raise ConfigError(
            f"'{adapter}' trains the backbone's own parameters there: that can be switched off (factor 0), and not scaled by "
            f"{factor:g}."
        )
    return True


def _scaled(site: Site, op: Op, factor: float) -> Op:
    """The same op with a part of its effect.

    Raises:
        ConfigError: it has none that could be scaled.
    """
    if factor == 1 or (factor != 0 and op.where in ("watch_input", "watch_output", "off")):
        return op
    if factor == 0:
        return dataclasses.replace(op, where="off")
    if op.where in ("input", "output") and op.per_row:
        return dataclasses.replace(op, fn=_Part(op.fn, factor))
    if op.where == "forward" and isinstance(site, LinearSite):
        return dataclasses.replace(op, fn=(_Weight if op.rows is not None else _Projection)(op.fn, factor))
    if op.where == "forward" and isinstance(site, BlockSite) and op.verb == "replace":
        return dataclasses.replace(op, fn=_Block(op.fn, factor))
    raise ConfigError(
        f"'{op.owner}' ({op.verb} at '{op.point}') cannot be scaled by {factor:g}: what it adds is there or not. Switch it off "
        "there (factor 0)."
    )


@dataclass(eq=False)
class _Part:
    """`x + f (op(x) - x)`, or `y + f (op(x, y) - y)`."""

    fn: Callable[..., Tensor]
    factor: float

    def __call__(self, *tensors: Tensor) -> Tensor:
        before = tensors[-1]
        after = self.fn(*tensors[:-1], before.clone())  # an op may change it in place
        return before + self.factor * (after - before)


@dataclass(eq=False)
class _Weight:
    """`W + f (op(W) - W)`."""

    fn: Callable[[Tensor], Tensor]
    factor: float

    def __call__(self, weight: Tensor) -> Tensor:
        return weight + self.factor * (self.fn(weight) - weight)


@dataclass(eq=False)
class _Projection:
    """A projection's own computation: `y + f (op - y)`, y without it."""

    fn: Callable[..., Tensor]
    factor: float

    def __call__(self, run: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        before = run(x, weight, bias)
        return before + self.factor * (self.fn(run, x, weight, bias) - before)


@dataclass(eq=False)
class _Block:
    """A block that was replaced: `y + f (op - y)`, y the block's own output."""

    fn: Callable[..., Tensor]
    factor: float

    def __call__(self, run: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        before = run(*args, **kwargs)
        return before + self.factor * (self.fn(run, *args, **kwargs) - before)
