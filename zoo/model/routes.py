"""Which adapter serves which row of a batch, and what runs for it (`zoo.model.routing`)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoo.errors import CombinationError, ConfigError
from zoo.model.compiled import one_more_set

if TYPE_CHECKING:
    from zoo.adapters.base import Adapter
    from zoo.engine.sites import Op, Site
    from zoo.engine.swaps import Swap
    from zoo.model import Model

__all__ = ["Parts", "Route", "row_by_row", "run_only", "train_also"]

Parts = dict["str | None", Tensor]  # an adapter (None: the bare backbone) and something about its rows
Sites = list[tuple["Site", tuple[tuple["Op", ...], ...]]]  # where ops run, and which


@dataclass(eq=False)
class Route:
    """Which rows of a batch each adapter serves; made by `model.route(names)`, for one size of batch.

    Under `torch.compile` the work that is no tensor's is done here: which ops run at which modules. All routes of the same
    adapters then run the same graph, whichever rows these serve.
    """

    batch: int
    rows: Parts  # samples (n,) of each adapter, None: of the bare backbone
    back: Tensor  # (B,): where in the outputs, which stand together by adapter, each sample is
    attached: tuple[str, ...]
    sites: Sites | None = None  # what runs; None: not in one pass
    apart: dict[str | None, tuple[Sites, tuple[Swap, ...]]] | None = (
        None  # of a sub-batch each; None: not as that either
    )

    @classmethod
    def of(cls, model: Model, names: Sequence[str | None], batch: int, plan: bool = False) -> Route:
        """Checked; `plan`: with what a compiled model needs."""
        if len(names) != batch:
            raise ConfigError(
                f"adapters= has {len(names)} names for a batch of {batch}; give one name (or None) for each sample."
            )
        order = list(dict.fromkeys(names))
        for name in order:
            if name is not None:
                model._known(name)
        device = model.device
        rows = {n: torch.tensor([i for i, m in enumerate(names) if m == n], device=device) for n in order}
        back = torch.empty(batch, dtype=torch.long, device=device)
        back[torch.cat(list(rows.values()))] = torch.arange(batch, device=device)
        route = cls(batch, rows, back, tuple(model.adapters.keys()))
        if plan:
            one_more_set(model, [f"route: {name}" for name in rows])
            train_also(model, route.named)
            here = model._state.here()
            try:
                if row_by_row(model, order):
                    model._serve((route.named, route.served, batch, None, False, None))
                    route.sites = _running(model)
                elif not any(model._rich(name) for name in order):
                    route.apart = {}
                    for name in order:
                        model._serve((() if name is None else (name,), None, 0, None, False, None))
                        route.apart[name] = (_running(model), model._state.swaps)
            finally:
                model._serve(here)
        return route

    @property
    def named(self) -> tuple[str, ...]:
        """The adapters."""
        return tuple(name for name in self.rows if name is not None)

    @property
    def served(self) -> dict[str, Tensor]:
        """The rows of each of them, and as "" those of the bare backbone."""
        return {name or "": rows for name, rows in self.rows.items()}

    def check(self, model: Model) -> None:
        """Raise ConfigError if adapters have come or gone since the route was made."""
        if self.attached != tuple(model.adapters.keys()):
            raise ConfigError("adapters were added or removed since model.route(...): make the route anew.")

    def joined(self, outputs: Sequence[Tensor]) -> Tensor:
        """What each adapter's rows gave, as rows of the batch."""
        if len({tuple(o.shape[1:]) for o in outputs}) > 1:
            shapes = ", ".join(f"{n}: {tuple(o.shape[1:])}" for n, o in zip(self.rows, outputs))
            raise ConfigError(
                f"the heads of the named adapters have different widths ({shapes}); call the model once for each."
            )
        return torch.cat(list(outputs)).index_select(0, self.back)


def _running(model: Model) -> Sites:
    """What runs now, wherever there are ops."""
    return [(site, site.running()) for site in model._sites.values() if site.ops]


def run_only(sites: Sites) -> Sites:
    """Let exactly these ops run at these sites; returns those that ran."""
    before = [(site, site.running()) for site, _ in sites]
    for site, ops in sites:
        site.run_only(ops)
    return before


def row_by_row(model: Model, order: Sequence[str | None]) -> bool:
    """Whether these adapters (None: the bare backbone) can serve their rows of one batch in one pass."""
    if any(model._rich(name) for name in order):
        return False
    named = [name for name in order if name is not None]
    for name in named:
        if (
            model._swaps[name]
            or model.adapters[name].trains_backbone
            or not all(op.per_row for _, op in model._ops[name])
        ):
            return False
    try:
        for name, other in itertools.combinations(named, 2):
            model._check_pair(other, model._ops[other], model._swaps[other], name)
    except CombinationError:
        return False
    return True


def train_also(model: Model, names: Sequence[str]) -> None:
    """Adapters that a routed batch names beside the active ones are trained by it, with the heads that serve them."""
    for name in names:
        adapter: Adapter = model.adapters[name]  # type: ignore[assignment]
        if name not in model.active:
            model._rest(name, adapter, resting=False)
        if adapter.stateless or any(p.requires_grad for p in adapter.parameters()):
            head = model._head_of(name)
            model._rest(f"head/{head}", model.heads[head], resting=False)
