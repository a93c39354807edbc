"""LT-SFT: tune everything, keep the entries that moved most, go back to the start and tune only these.

Idea: a task needs few of the weights, and full fine-tuning tells which; two such sparse differences, of a domain and of a task,
can be added up. Points: all `linear` points inside of blocks, weights and biases; a slice of a fused q/k/v for itself.

    phase 1   theta_0 -> theta_1          all candidates and the head, `full_epochs` over the training data
              M = the K entries with the largest |theta_1 - theta_0|, over all candidates together
              theta, head <- theta_0, head_0         (to the bit)
    phase 2   y = (W + scatter(delta)) x + b + scatter(delta_b)        delta = 0 at the start, K numbers in all
    L1        lambda / n * sum |theta - theta_0|      added to the loss of each step, n numbers of backbone and head

Phase 1 is what this method does before training (zoo.fit runs it, or `calibrate` by hand); the fit is phase 2, with an optimizer
and a schedule of its own, which know nothing of the first. The trained numbers are exactly K: nothing else has a momentum or a
decay that could move it, and the frozen weights stay as they are, whatever is switched on or off. Several of these adapters can
be in use together, and their differences add up: `model.set_active("domain", "task")`; at inference another domain is
`model.set_active("other-domain", "task")`. Entries that both have are simply added. A task is trained on top of its domain by
`model.set_active("domain", "task", train="task")`.

Phase 1: AdamW (0.9, 0.999) without weight decay, learning rate `full_lr` falling linearly to 0, gradients clipped to a norm of 1.
Defaults: K = 1 % of the backbone's parameters, full_epochs = 5, full_lr = 5e-5, no L1 (0.1 in the paper, for domains). ViT-B/16
857,986 numbers.
Source: Ansell, Ponti, Korhonen, Vulic, "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", ACL 2022
(cambridgeltl/composable-sft).
Deviations: exactly K entries are taken, where theirs takes all that tie with the K-th; K entries that did not all move are
refused. One choice, not several iterations of it (their default, too). Candidates are weights and biases of projections: norms,
embeddings, positions and tokens stay. K is a part of the whole backbone, not of the candidates.
Phase 1 runs in evaluation mode, without dropout. L1 is on the candidates only (theirs: on the head too, unless told otherwise),
off by default in both; in their code it has no effect, since what it measures from hangs on the trained values and the gradients
cancel. Theirs stores differences above 1e-7 only; here all K are stored. Killed in phase 1, a run begins that anew.

In memory: phase 1 is full fine-tuning, with a copy of the candidates, their gradients and two moments; phase 2 keeps K numbers
and their moments, and the input of each tuned projection.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.adapters.base import Adapter
from zoo.adapters.parts.deciding import asked, deciding, name_in
from zoo.adapters.parts.entries import Entries, index_of
from zoo.adapters.parts.highest import highest
from zoo.adapters.parts.moved import Slot, linear_slots, moved
from zoo.errors import ConfigError
from zoo.host import Host
from zoo.model.damping import damped
from zoo.points import Points
from zoo.points.merger import Merger
from zoo.registry import register_adapter
from zoo.tasks.base import Task


@register_adapter("lt-sft")
@dataclass
class LTSFT(Adapter):
    """Lottery-ticket sparse fine-tuning; decides by a full fine-tuning what to tune (zoo.fit runs it, or `calibrate` by hand).

    Args:
        proportion: K as a part of the backbone's parameters.
        entries: K itself, in the place of `proportion`.
        full_epochs: passes over the training data in phase 1. full_lr: its learning rate.
        l1: lambda, in both phases.
    """

    proportion: float = 0.01
    entries: int | None = None
    full_epochs: int = 5
    full_lr: float = 5e-5
    l1: float = 0.0

    needs_calibration = True
    default_lr = 1e-3
    default_weight_decay = 0.0
    paper = "Ansell et al. 2022"
    taxonomy = "selective"
    sums = True
    trial = {"entries": 400, "full_epochs": 2}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(0 < self.proportion <= 1, f"proportion is {self.proportion}; expected 0 < proportion <= 1.")
        self.check(self.entries is None or self.entries >= 1, f"entries is {self.entries}; expected 1 or more.")
        self.check(self.full_epochs >= 1, f"full_epochs is {self.full_epochs}; expected 1 or more.")
        self.check(self.full_lr > 0, f"full_lr is {self.full_lr}; expected more than 0.")
        self.check(self.l1 >= 0, f"l1 is {self.l1}; expected 0 or more.")
        self._indices: dict[str, Tensor] = {}  # found by a calibration and not attached yet

    @property
    def stateless(self) -> bool:  # type: ignore[override]
        """Nothing is attached before phase 1."""
        return self.plan is None

    @classmethod
    def of_size(cls, size: int) -> dict[str, Any]:
        """`size` thousands of entries."""
        return {"entries": 1000 * size}

    def to_come(self) -> int:
        """K, before phase 1 has chosen which."""
        return self.entries or 0 if self.plan is None else 0

    def fresh(self) -> Adapter:
        """An unattached adapter with the same settings, plan and index lists."""
        twin = super().fresh()
        assert isinstance(twin, LTSFT)
        twin._indices = dict(self._indices or {n: b for n, b in self.named_buffers() if n.endswith("_index")})
        return twin

    def budget(self, model: Host) -> int:
        """K for this model.

        Raises:
            ConfigError: none, or more than the candidates have.
        """
        whole = sum(p.numel() for p in model.backbone.parameters())
        most = sum(slot.size for slot in linear_slots(model.points))
        wanted = int(self.proportion * whole) if self.entries is None else self.entries
        said = f"proportion={self.proportion:g}" if self.entries is None else f"entries={self.entries:,}"
        self.check(
            1 <= wanted <= most,
            f"{said} is {wanted:,} of the {whole:,} numbers of {model.backbone_name}, of which {most:,} can be "
            f"tuned. Expected 1 to {most:,}.",
        )
        return wanted

    # -- phase 1 ----------------------------------------------------------------------------------------------------

    def calibrate(self, model: Host, batches: Iterable[Any], task: Task | None = None) -> None:
        """Phase 1: full fine-tuning, the choice, and back to the start; if that was done before, anew on the pretrained weights.

        Args:
            batches: (inputs, targets), read `full_epochs` times.
            task: whose loss is trained; by default what the model is for.

        Raises:
            ConfigError: the adapter is in no model, the model has no head and the task needs one, K is none or too large, or
                fewer than K entries moved.
            AttachError: quantised weights. DataError: no batch, NaN or Inf. The model is as it was, then.
        """
        name, what = name_in(model, self), asked(model, self, task, "full fine-tuning is that of a task")
        budget = self.budget(model)
        slots = linear_slots(model.points)
        numbers = sum(p.numel() for p in [*model.backbone.parameters(), *model.head.parameters()])
        # what was chosen before is off, while the head in use stays
        with damped(model, name, 0.0) if self.plan is not None and name in model.active else nullcontext():
            changes, report = moved(
                model, slots, batches, what, epochs=self.full_epochs, lr=self.full_lr, l1=self.l1 / numbers
            )
        self.check(
            (count := sum(int(c.count_nonzero()) for c in changes)) >= budget,
            f"{count:,} entries moved in {report['steps']} steps of full fine-tuning, and {budget:,} are wanted: the others "
            "would be chosen by nothing. Tune longer (full_epochs=, full_lr=), or keep fewer (proportion=, entries=).",
        )
        try:
            with deciding(self):
                self._decide(slots, changes, budget, {**report, "numbers": numbers})
                model.reattach(name)
        finally:
            self._indices = {}

    def _decide(self, slots: list[Slot], changes: list[Tensor], budget: int, report: dict[str, Any]) -> None:
        """Set `plan` and the index lists."""
        owner, place = highest(changes, budget)
        self._indices = {}
        for number, slot in enumerate(slots):
            if len(mine := place[owner == number]):
                self._indices[f"{slot.key}_index"] = mine.sort().values.cpu()
        counts = {key.removesuffix("_index"): len(index) for key, index in self._indices.items()}
        self.plan = {"entries": counts, "report": {**report, "total": budget}}

    # -- phase 2 ----------------------------------------------------------------------------------------------------

    def attach(self, points: Points) -> None:
        """Attach the entries that the plan names."""
        slots = linear_slots(points)
        if self.plan is None:
            return
        counts = self._read(points, {slot.key for slot in slots})
        for point in dict.fromkeys(slot.point for slot in slots):
            found = {f"{part}_index": counts.get(f"{point.name}.{part}", 0) for part in ("weight", "bias")}
            indices = {part: index_of(self._indices.get(f"{point.name}.{part}"), n) for part, n in found.items() if n}
            if indices:
                point.reparametrize(Entries(point, indices))

    def _read(self, points: Points, known: set[str]) -> dict[str, int]:
        """How many entries the plan has of each candidate, checked against the backbone."""
        try:
            counts = {str(key): int(count) for key, count in dict(self.plan["entries"]).items()}  # type: ignore[index]
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"The plan of 'lt-sft' is damaged ({error!r}). Calibrate it again, or load it as saved."
            ) from error
        if unknown := sorted(key for key in counts if key not in known):
            raise ConfigError(
                f"The plan of 'lt-sft' names {len(unknown)} parameters that {points.backbone} has not, such as '{unknown[0]}': "
                "it was made for another backbone. Calibrate it on this one."
            )
        return counts

    def extra_loss(self, model: Host, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """lambda / n sum |delta|."""
        deltas = [p for p in self.parameters() if p.requires_grad]
        if not self.l1 or not deltas or self.plan is None:
            return None
        scale = self.l1 / float(self.plan["report"]["numbers"])
        return scale * torch.stack([d.abs().sum() for d in deltas]).sum()

    def by_layer(self, model: Host) -> dict[str, dict[str, float]]:
        """The part of each candidate, weight or bias, that phase 1 chose."""
        counts = (self.plan or {}).get("entries", {})
        sizes = {slot.key: slot.size for slot in linear_slots(model.points)} if counts else {}
        return {"part tuned": {key: counts.get(key, 0) / size for key, size in sizes.items()}}

    def merge(self, merger: Merger) -> None:
        """W <- W + scatter(delta), b <- b + scatter(delta_b)."""
        for name, module in self.named_modules():
            if isinstance(module, Entries):
                module.fold(merger, merger.points[name])
