"""DiffoRA: a short search says which projections of a block deserve a low-rank change; the others have one in common, or none.

Idea: a matrix of gates, one for each projection of each layer, is trained as numbers between 0 and 1 on data that the low-rank
changes do not see, then made binary, and the changes that stay are trained anew.
Points: any `linear` points, by default all six of a block (q, k, v, o, up, down).

    search      y = W x + b + sigmoid(a_lm) s B A x              a (L, N) for N projections of each of L layers, a = 0
                `warmup` steps of A, B and head, all gates 1/2; then `steps` times one of A, B and head on one half of the
                batches, and one of a on the other half, each with the other fixed
    discretise  in each layer the round(rho N) projections with the highest a; of equals the first ones
    retrain     kept:    y = W x + b + s B A dropout(x)          A (r, i), B (o, r), s = alpha / r, anew from the start
                others:  the same with one pair (A, B) for all of a kind (role and shape) in the network; or nothing

The search is what this method does before training (zoo.fit runs it, or `calibrate` by hand); the fit is the retraining. A and B
of the search are thrown away, the head goes back to its start, to the bit. No gate is left, so nothing has to be folded into B.
A ~ Kaiming-uniform(a = sqrt 5), B = 0, so both start as the pretrained function, to the bit. As long as B is 0 the gradient of
every gate, sigmoid'(a) <dL/dW, s B A>, is exactly 0: therefore the warm-up.
Defaults: r = 8, s = 1, rho = 1/2, shared pairs, 100 + 200 steps, AdamW 1e-3 for A, B and head, Adam 1e-2 with decay 1e-3 for a.
Counts: r (i + o) for each projection that is kept, and for each shared pair; L N gates more while it searches. ViT-B/16 that
keeps v, o and down everywhere 663,552, with shared pairs for q, k and up 718,848.
Limits: rho = 1 is `lora`, rho = 0 without shared pairs the head alone; neither needs a search.
Source: Jiang, Wang and Yuan 2025, "DiffoRA: Enabling Parameter-Efficient LLM Fine-Tuning via Differential Low-Rank Matrix
Adaptation" (v2: "... via Differential Module Selection").
Deviations: no code of theirs is public and only the abstracts were at hand. From these are the relaxation, the binary choice and
the shared weights; that the gate is a sigmoid, the alternation of first order, the restart after the choice, all numbers and
which projections share are our reading. The search runs in evaluation mode, without dropout. Killed in the search, a run begins
that anew.

In memory: as LoRA, in the search too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from zoo.adapters.base import Adapter
from zoo.adapters.parts.deciding import asked, deciding, name_in
from zoo.adapters.parts.low_rank import LowRank, check_rank
from zoo.adapters.parts.relaxed import Borrowed, Relaxed, search, unequal
from zoo.errors import AttachError, ConfigError
from zoo.host import Host
from zoo.model.damping import damped
from zoo.points import LinearPoint, Points
from zoo.points.merger import Merger
from zoo.points.rows import is_conv
from zoo.registry import register_adapter
from zoo.tasks.base import Task


@register_adapter("diffora")
@dataclass
class DiffoRA(Adapter):
    """Low-rank adaptation of the projections that a search chose (zoo.fit runs it, or `calibrate` by hand).

    Args:
        rho: part of the projections of each layer that is kept.
        share: those that are not kept have one pair for all of a kind; otherwise they stay as they are.
        rank: r. alpha: numerator of the scale; None sets it to the rank, so that the scale is 1.
        targets: roles or names of linear points; "all-linear" is q, k, v, o, in, out, gate, up, down.
        dropout: on the input, while retraining.
        warmup: steps of the search before the gates move. steps: in which they do.
        search_lr: of A, B and head in the search. gate_lr, gate_decay: of the gates.
        held_out: gates are trained on batches of their own; otherwise on those of A and B, right after these.
    """

    rho: float = 0.5
    share: bool = True
    rank: int = 8
    alpha: float | None = None
    targets: str | tuple[str, ...] = "all-linear"
    dropout: float = 0.0
    warmup: int = 100
    steps: int = 200
    search_lr: float = 1e-3
    gate_lr: float = 1e-2
    gate_decay: float = 1e-3
    held_out: bool = True

    needs_calibration = True
    default_lr = 1e-3
    paper = "Jiang, Wang and Yuan 2025"
    taxonomy = "reparametrised"
    trial = {"rank": 2, "warmup": 2, "steps": 2, "held_out": False}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(0 <= self.rho <= 1, f"rho is {self.rho}; expected 0 <= rho <= 1.")
        self.check(self.rank >= 1, f"rank is {self.rank}; expected 1 or more.")
        self.check(self.alpha != 0, "alpha is 0; what is learned is multiplied by it, so it could never act.")
        self.check(0 <= self.dropout < 1, f"dropout is {self.dropout}; expected 0 <= dropout < 1.")
        self.check(self.warmup >= 0, f"warmup is {self.warmup}; expected 0 or more.")
        self.check(self.steps >= 1, f"steps is {self.steps}; expected 1 or more.")
        for name in ("search_lr", "gate_lr"):
            self.check(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; expected more than 0.")
        self.check(self.gate_decay >= 0, f"gate_decay is {self.gate_decay}; expected 0 or more.")
        self._most = 0  # parameters at most, of an adapter that has not chosen yet

    @property
    def scale(self) -> float:
        """s of the equations."""
        return (self.rank if self.alpha is None else self.alpha) / self.rank

    @property
    def stateless(self) -> bool:  # type: ignore[override]
        """Nothing is attached before the choice, or where nothing was kept and nothing is shared."""
        return self.plan is None or not (self.share or self.plan.get("kept"))

    def to_come(self) -> int:
        """Before the choice: if the largest projections are kept."""
        return self._most if self.plan is None else 0

    # -- choosing ---------------------------------------------------------------------------------------------------

    def layers(self, points: Points) -> list[tuple[list[LinearPoint], int]]:
        """The targets of each layer, and how many of them are kept.

        Raises:
            ConfigError: rho is above 0, and so small that no layer would keep any.
        """
        found: dict[tuple[Any, ...], list[LinearPoint]] = {}
        for point in self.selected(points):
            found.setdefault((point.tower, point.stage, point.block), []).append(point)
        layers = [(layer, int(self.rho * len(layer) + 0.5)) for layer in found.values()]
        widest = max((len(layer) for layer, _ in layers), default=1)
        self.check(
            not self.rho or any(count for _, count in layers),
            f"rho is {self.rho:g}, and the layers of {points.backbone} have {widest} targets at most: none would be kept. "
            f"Expected {0.5 / widest:g} to 1, or 0.",
        )
        return layers

    def calibrate(self, model: Host, batches: Iterable[Any], task: Task | None = None) -> None:
        """Search, choose, and attach what was chosen; if that was done before, anew, without what was trained since.

        Args:
            batches: (inputs, targets), read as often as the search needs; every second one is for the gates.
            task: whose loss is trained; by default what the model is for.

        Raises:
            ConfigError: the adapter is in no model, the model has no head and the task needs one, nothing would be kept, or
                the search told nothing.
            DataError: no batch, or one alone, NaN or Inf. The model is as it was, then.
        """
        name, what = name_in(model, self), asked(model, self, task, "the search trains on a task")
        layers = self.layers(model.points)
        gates: dict[str, float] = {}
        if any(0 < count < len(layer) for layer, count in layers):
            gates = self._search(model, name, batches, what)
        kept: set[str] = set()
        for layer, count in layers:
            names = [point.name for point in layer]
            if 0 < count < len(names):
                unequal(gates, names)
            kept.update(sorted(names, key=lambda n: -gates.get(n, 0.0))[:count])  # stable: of equals the first ones
        with deciding(self):
            self.plan = {"kept": [p.name for layer, _ in layers for p in layer if p.name in kept], "gates": gates}
            model.reattach(name)

    def _search(self, model: Host, name: str, batches: Iterable[Any], task: Task) -> dict[str, float]:
        """The gates; a relaxed adapter stands in the model meanwhile, and what this one chose before is off."""
        active, relaxed = model.active, Relaxed(self.rank, self.scale, self.targets)
        with model.disable():  # which puts back afterwards who is in use, and who is trained
            model.set_active(*active)
            added = model.add_adapter(relaxed)
            try:
                with damped(model, name, 0.0) if name in active and not self.stateless else nullcontext():
                    return search(
                        *(model, added, batches, task),
                        warmup=self.warmup,
                        steps=self.steps,
                        lr=self.search_lr,
                        gate_lr=self.gate_lr,
                        gate_decay=self.gate_decay,
                        held_out=self.held_out,
                    )
            finally:
                model.remove_adapter(added.name)

    def by_layer(self, model: Host) -> dict[str, dict[str, float]]:
        """The gates that the search found, and 1 where a projection has a change of its own; neither moves in a fit."""
        plan = self.plan or {}
        names = [point.name for point in self.selected(model.points)] if plan else []
        kept = set(plan.get("kept", ()))
        return {"gate": dict(plan.get("gates", {})), "kept": {name: int(name in kept) for name in names}}

    # -- attaching --------------------------------------------------------------------------------------------------

    def selected(self, points: Points) -> list[LinearPoint]:
        """The target points."""
        return points.linears(self.targets)

    def attach(self, points: Points) -> None:
        """Attach what the plan keeps, and the shared pairs."""
        points.require("linear", "diffora")
        chosen = self.selected(points)
        check_rank(self, ((point, self.rank) for point in chosen))
        for point in chosen:
            if is_conv(point.module):
                raise AttachError(
                    f"point '{point.name}' is a convolution, which 'diffora' does not change. Leave it out of targets."
                )
        if self.plan is None:
            self._most = self._at_most(points)
            return
        kept = self._kept(points, {point.name for point in chosen})
        pairs: dict[str, LowRank] = {}
        for point in chosen:
            if point.name in kept:
                point.add(self._made(point))
            elif self.share:
                kind = _kind(point)
                if kind not in pairs:
                    pairs[kind] = points.share(kind, self._made(point))
                point.add(Borrowed(pairs[kind]))

    def _made(self, point: LinearPoint) -> LowRank:
        return LowRank(point.dim_in, point.dim_out, self.rank, self.scale, self.dropout)

    def _at_most(self, points: Points) -> int:
        """Parameters, if each layer kept its largest."""
        layers = self.layers(points)
        found = 0
        for layer, count in layers:
            found += sum(sorted((p.dim_in + p.dim_out for p in layer), reverse=True)[:count])
        pairs = {_kind(p): p.dim_in + p.dim_out for layer, count in layers if count < len(layer) for p in layer}
        return self.rank * (found + (sum(pairs.values()) if self.share else 0))

    def _kept(self, points: Points, known: set[str]) -> set[str]:
        """The names that the plan keeps, checked against the backbone."""
        kept = (self.plan or {}).get("kept")
        if not isinstance(kept, list) or not all(isinstance(name, str) for name in kept):
            raise ConfigError("The plan of 'diffora' is damaged. Calibrate it again, or load it as saved.")
        if unknown := [name for name in kept if name not in known]:
            raise ConfigError(
                f"The plan of 'diffora' keeps {len(unknown)} projections that are no targets on {points.backbone}, such as "
                f"'{unknown[0]}': it was made for another backbone, or other targets. Calibrate it on this one."
            )
        return set(kept)

    def parts(self) -> dict[str, LowRank | Borrowed]:
        """The modules by their points."""
        pairs = {id(m.shared[0]) for m in self.modules() if isinstance(m, Borrowed)}
        return {n: m for n, m in self.named_modules() if isinstance(m, (LowRank, Borrowed)) and id(m) not in pairs}

    def low_rank(self, points: Points) -> dict[str, tuple[Tensor, Tensor]] | None:
        """A, and B with the scale in it."""
        return {n: (p.lora_a.detach(), (p.scale * p.scaled_b()).detach()) for n, p in self.parts().items()}

    def merge(self, merger: Merger) -> None:
        """W <- W + s B A."""
        for name, part in self.parts().items():
            merger.add_weight(merger.points[name], part.delta())


def _kind(point: LinearPoint) -> str:
    """Under which name a shared pair is saved: points of one role and shape, and one tower, have it in common."""
    return re.sub(r"\W", "_", f"shared_{point.tower}_{point.role}_{point.dim_in}_{point.dim_out}")
