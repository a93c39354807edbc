"""DSL: projections have a constant number of weights, and while these are trained it is searched where they should be.

Idea: the weights that became small are dropped, and as many are put where the gradient asks for one, less and less of them.
Points: any `linear` points; a slice of a fused q/k/v is a point of its own. Biases, norms and the rest are frozen, the head is
dense and trained.

    W' = M . (W + D)                         M (o, i) of 0 and 1 with n = round(density o i) ones; D on these alone, n numbers
    behind every `interval`-th step t of T, for each matrix:
        k    = ceil(zeta(t) n),  zeta(t) = zeta_T + (zeta_0 - zeta_T) (1 + cos(pi t / T)) / 2
        drop   the k smallest |W'| of M
        grow   the k largest |dL/dW'| where M is now 0;  W' = 0 where there was none before the drop

An entry that is dropped and grown at once stays what it is. What the optimizer knows of an entry goes with it, and begins at 0
where it is new. Density 1 is full fine-tuning of the matrices; zeta_0 = 0 is training with a fixed mask.
The first M: "magnitude" the n largest |W| of each matrix; "global" the largest of all matrices together, so that each has its own
n; "random" n places of each, drawn.
Not the pretrained function at the start, but for density 1: weights are missing.
Defaults: density 0.5, zeta_0 = 0.5, zeta_T = 0.005, an update every 100 steps; no weight decay.
Counts: n for each matrix; ViT-B/16 42,467,328 at density 0.5.
Merged: W <- W', a dense tensor with zeros.
Source: Wang et al., "Dynamic Sparse Learning: A Novel Paradigm for Efficient Recommendation", WSDM 2024 (shuyao-wang/DSL).
Deviations: they train recommender networks from random weights, embeddings and biases too; here the matrices of a pretrained
network are sparse, so the first M is by magnitude rather than random, and D is trained rather than W'. Theirs draws each entry of
the first M for itself, so that n is not round(density o i). Equal magnitudes at the threshold all go in theirs, and where fewer
entries than k have a gradient, not all come back; here n is kept, and equal ones go in their order. Adam's moments see the dense
gradient in theirs, also where there is no weight, and an entry that comes back finds old ones. The dense gradient is formed by
every step of both, and here kept in the steps behind which M changes.

In memory: n trained numbers and their moments, one byte an entry for M, and where M changes the gradient of W'.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from zoo.adapters.base import Adapter
from zoo.adapters.parts.highest import highest
from zoo.adapters.parts.lowest import smallest
from zoo.adapters.parts.pictured import filled
from zoo.adapters.parts.sparse import Sparse, sparse
from zoo.errors import MismatchError
from zoo.host import Host
from zoo.points import LinearPoint, Points
from zoo.points.merger import Merger
from zoo.registry import register_adapter


@register_adapter("dsl")
@dataclass
class DSL(Adapter):
    """Dynamic sparse learning.

    Args:
        density: the part of the weights of each matrix that are there.
        update_ratio: zeta_0, the part of them that moves in an update at the beginning of the run; 0 keeps M as it is.
        final_ratio: zeta_T, that at the end.
        interval: steps from one update to the next.
        start: the first M: "magnitude", "global" or "random".
        targets: roles or names of linear points; "all-linear" is q, k, v, o, in, out, gate, up, down.
    """

    density: float = 0.5
    update_ratio: float = 0.5
    final_ratio: float = 0.005
    interval: int = 100
    start: Literal["magnitude", "global", "random"] = "magnitude"
    targets: str | tuple[str, ...] = "all-linear"

    plans_steps = True
    default_lr = 1e-4
    default_weight_decay = 0.0
    paper = "Wang et al. 2024"
    taxonomy = "selective"
    identity = False
    large = True
    trial = {"density": 0.5, "interval": 2}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(0 < self.density <= 1, f"density is {self.density}; expected 0 < density <= 1.")
        self.check(
            0 <= self.update_ratio < 1,
            f"update_ratio is {self.update_ratio}; expected 0 <= update_ratio < 1 (0: none).",
        )
        self.check(
            self.update_ratio == 0 or 0 < self.final_ratio <= self.update_ratio,
            f"final_ratio is {self.final_ratio} and update_ratio {self.update_ratio}; expected 0 < final_ratio <= update_ratio.",
        )
        self.check(self.interval >= 1, f"interval is {self.interval}; expected 1 step or more.")
        self.total: int | None = None  # steps of the fit in progress, if it moves anything
        self._fired: dict[str, Tensor] = {}  # entries that have been there at some time of it

    def attach(self, points: Points) -> None:
        """Put a mask and a change of what it leaves on every selected projection."""
        points.require("linear", "dsl")
        chosen = points.linears(self.targets)
        counts = self._counts(chosen)
        for point in chosen:
            point.reparametrize(Sparse(self._first(point, counts[point.name]), counts[point.name]))

    def _counts(self, chosen: list[LinearPoint]) -> dict[str, int]:
        """n of each matrix."""
        sizes = {p.name: p.dim_in * p.dim_out for p in chosen}
        if self.start != "global":
            return {name: max(1, round(self.density * size)) for name, size in sizes.items()}
        if self.plan is None:
            self.check(
                not any(p.weight.is_meta for p in chosen),
                "start='global' compares weights, and those on the meta device have no values. Take another start.",
            )
            owner, _ = highest(
                [p.weight.float().abs().flatten() for p in chosen], round(self.density * sum(sizes.values()))
            )
            found = owner.long().bincount(minlength=len(chosen)).tolist()
            self.plan = {"entries": dict(zip(sizes, found, strict=True))}
        counts: dict[str, int] = self.plan.get("entries", {})
        known = isinstance(counts, dict) and counts.keys() == sizes.keys()
        if not known or not all(type(n) is int and 0 <= n <= sizes[name] for name, n in counts.items()):
            raise MismatchError("The plan of 'dsl' is not one of these matrices: load the adapter as it was saved.")
        if empty := [name for name, n in counts.items() if n == 0]:
            self.check(False, f"start='global' leaves '{empty[0]}' without a weight. Take more, or start='magnitude'.")
        return counts

    def _first(self, point: LinearPoint, count: int) -> Tensor:
        """The first M of a matrix (o, i)."""
        weight = point.weight
        if weight.is_meta:
            there = torch.arange(weight.numel(), device=torch.empty(0).device) < count
            return there.view(weight.shape)
        scores = torch.rand(weight.shape).to(weight.device) if self.start == "random" else weight.float().abs()
        return ~smallest(scores, weight.numel() - count)

    def parts(self) -> dict[str, Sparse]:
        """The modules by their points."""
        return {n: m for n, m in self.named_modules() if isinstance(m, Sparse)}

    def ratio(self, step: int, total: int) -> float:
        """zeta behind `step` of `total` steps."""
        return self.final_ratio + (self.update_ratio - self.final_ratio) * (1 + math.cos(math.pi * step / total)) / 2

    def explored(self) -> float | None:
        """The part of all entries that has been there at some time of the fit in progress. None: nothing moves."""
        if not self._fired:
            return None
        return sum(int(f.sum()) for f in self._fired.values()) / sum(f.numel() for f in self._fired.values())

    def by_layer(self, model: Host) -> dict[str, dict[str, float]]:
        """The part of each matrix that is there, and that which has been there at some time of the fit in progress."""
        found = {"part left": {name: filled(part.mask) for name, part in self.parts().items()}}
        return found | {"part ever there": {name: filled(fired) for name, fired in self._fired.items()}}

    def merge(self, merger: Merger) -> None:
        """W <- M . (W + D)."""
        for name, part in self.parts().items():
            point = merger.points[name]
            merger.set_weight(point, sparse(merger.weight(point), part.delta.detach(), part.mask))

    # -- training ---------------------------------------------------------------------------------------------------

    def fit_start(self, model: Host, optimizer: Any, total_steps: int) -> None:
        """Plan the updates; a frozen adapter, and one without any, keeps its mask."""
        self.fit_end(model)
        if self.update_ratio == 0 or not any(p.requires_grad for p in self.parameters()):
            return
        self.check(
            self.interval <= total_steps,
            f"an update comes every {self.interval} steps (interval=), and the run has {total_steps}: the mask would never "
            "move. Take a smaller interval, train longer, or say update_ratio=0.",
        )
        self.total = total_steps
        self._fired = {name: part.mask.clone() for name, part in self.parts().items()}

    def _moves(self, step: int) -> bool:
        """Whether an update follows step `step`, counted from 0."""
        return self.total is not None and (step + 1) % self.interval == 0

    def step_start(self, model: Host, step: int) -> None:
        """Keep the dense gradient if the mask moves behind this step."""
        self.rearranged = {}
        for part in self.parts().values():
            if (part.probe is not None) != self._moves(step) or part.probe is not None:
                part.watch(self._moves(step))

    def after_step(self, model: Host, step: int) -> None:
        """Move the mask if it is time, the same on every process."""
        if not self._moves(step):
            return
        service: Any = self.training_service
        assert self.total is not None and service is not None
        for name, part in self.parts().items():
            probe, weight = part.probe, part.seen
            if probe is None or not part.delta.requires_grad:
                continue
            gradient = service.reduce(torch.zeros_like(probe) if probe.grad is None else probe.grad)
            weight = model.points[name].weight if weight is None else weight
            part.watch(False)
            if not gradient.any():  # it took no part in this step
                continue
            source = part.update(self.ratio(step + 1, self.total), weight, gradient)
            if source is not None:
                service.edit(part.delta, _following(source))
                self.rearranged[f"{name}.delta"] = source
                self._fired[name] |= part.mask

    def fit_end(self, model: Host) -> None:
        """No fit is in progress."""
        self.total, self._fired, self.rearranged = None, {}, {}
        for part in self.parts().values():
            part.watch(False)

    def extra_state(self) -> dict[str, Any] | None:
        """What has been there; masks are buffers."""
        return {"fired": dict(self._fired)} if self._fired else None

    def load_extra_state(self, model: Host, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._fired = {name: fired.to(self.parts()[name].mask.device) for name, fired in state["fired"].items()}


def _following(source: Tensor) -> Any:
    """What the optimizer knows of entries, in their new order; 0 of those that are new."""

    def follow(key: str, value: Tensor) -> Tensor:
        if value.shape != source.shape:
            return value
        return torch.where(
            source >= 0, value[source.clamp(min=0)], torch.zeros((), dtype=value.dtype, device=value.device)
        )

    return follow
