"""IncreLoRA: ranks that begin at one and grow where the change of a projection matters most.

Idea: the change of a projection is P diag(e) Q; every so often the few projections whose change the loss is most sensitive to
get further directions, until the whole network has its budget, and each new part has a warm-up of its own.
Points: `linear`, all six of a block (q, k, v, o, up, down), and what a family has in their place.

    y = W x + b + s P diag(e) Q dropout(x)         P (o, r), e (r,), Q (r, i), s = alpha / (r + 1e-5) for the present r
    loss + gamma * mean over all P and Q of ||P^T P - 1||_F and ||Q Q^T - 1||_F; each direction that came later by itself

In front of each optimizer step t = 0, 1, ... T - 1, until the budget is met, with D = s P diag(e) Q:

    I = sum |D * dL/dD| / sqrt(o i),   M <- b1 M + (1 - b1) I,   U <- b2 U + (1 - b2) |I - M|            of a projection
    t > t0 and t a multiple of dT:  the h projections with the highest M U get a directions each

The directions that come next exist already, and learn in advance: P, Q ~ N(0, 0.02^2) with e = 1e-5, which is not trained and
not counted in r. When a projection grows, their e is trained from there on, and others take their place. Each part has a
learning rate that rises anew and is 0 at T. P, Q ~ N(0, 0.02^2) and e = 0 at the start, which is the pretrained function, to
the bit; with the first step come the first 1e-5. Every growth makes r larger and s smaller, so outputs jump then, as theirs.
At the end what waits is dropped, and the parts become one.

Defaults: r0 = 1, r = 2 on average in the end, a = r / 2 (1, 2, 3, 4 for 2, 4, 6, 8, as theirs), t0 = dT = T / 50, b1 = b2 = 0.85,
gamma = 0.1, alpha = 16, no weight decay. h is as small as lets the network grow in the first 0.4 T; the authors' scripts have
2 to 22, with which growth takes 0.3 to 0.45 T.
Counts: r (o + i + 1) for each projection, in the beginning 165,960 per unit of r0 on ViT-B/16, in the end the sum of
r_j (o + i + 1) over the ranks (their sum is r n for n projections); while it grows also a (o + i) for what waits. On 72
projections growth from 1 to 2 with h = 2, a = 1 takes 36 rounds, to 8 with h = 3, a = 4 it takes 42.
Source: Zhang et al. 2023, "IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning"
(FeiyuZhang98/IncreLoRA), whose code this follows.
Deviations: settings may be fractions of the run, so that a fit of any length reaches its budget. Their growth ends where the sum
of ranks equals the budget, which it jumps over when h a does not divide it or scores tie; here the last round gives what is
left, ties go to the first, and the sum is the budget. What waits is dropped then, theirs stays with e = 0 and is
regularised for ever. Without `advance` nothing waits, where theirs holds constants that count in the mean above.
The paper finds it above AdaLoRA and LoRA at equal size; `vit-micro` after 60 steps on CIFAR-10 shows nothing of it
(docs/comparison.md: 52.3 +- 0.6, LoRA 52.9 +- 1.9).

In memory: as LoRA, x and r numbers of a token. While it grows backward also forms the gradient of one W at a time, as a full
fine-tuning does; where a batch comes in parts, those of all. A step of ViT-B/16 (batch 8, one core) then takes 1.45 times LoRA's,
before and after as long as LoRA's: with the defaults 1.18 times over a run (`benchmarks/growth_speed.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from zoo.adapters.parts.budget import smooth, steps_of
from zoo.adapters.parts.growing import Growing, OfGrowing
from zoo.adapters.parts.low_rank import check_rank
from zoo.adapters.parts.rounds import InRounds, Rounds
from zoo.host import Host
from zoo.points import Points
from zoo.registry import register_adapter


@register_adapter("increlora")
@dataclass
class IncreLoRA(OfGrowing, InRounds):
    """Low-rank adaptation whose ranks grow where it matters.

    Args:
        rank: r0, directions of each projection at the start. target_rank: how many there are on average at the end,
            at most what the widest target's change can have.
        alpha: numerator of the scale alpha / r.
        targets: roles or names of linear points; "all-linear" is q, k, v, o, in, out, gate, up, down.
        dropout: on the input, while training.
        added: a, directions that a projection gets in a round; by default half of target_rank.
        top_h: h, projections that grow in a round; by default as few as end the growth at `tgrown`.
        tinit: nothing grows before; below 1 a part of the run, else steps.
        interval: a round every so often; below 1 a part of the run, else steps.
        tgrown: when growth shall be over, if top_h is not given; below 1 a part of the run, else steps.
        advance: the directions that come next learn before they come.
        beta1, beta2: how slowly a projection's sensitivity and its spread change.
        orthogonality: gamma.
    """

    rank: int = 1
    target_rank: int = 2
    alpha: float = 16.0
    targets: str | tuple[str, ...] = "all-linear"
    dropout: float = 0.0
    added: int | None = None
    top_h: int | None = None
    tinit: float = 1 / 50
    interval: float = 1 / 50
    tgrown: float = 2 / 5
    advance: bool = True
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.1

    plans_steps = True
    default_lr = 1e-3
    default_weight_decay = 0.0
    paper = "Zhang et al. 2023"
    taxonomy = "reparametrised"
    trial = {"rank": 1, "target_rank": 3}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_growth()
        self.check(self.top_h is None or self.top_h >= 1, f"top_h is {self.top_h}; expected 1 or more.")
        self.check(self.tgrown > 0, f"tgrown is {self.tgrown}; expected steps, or a part of the run.")
        for name in ("beta1", "beta2"):
            self.check(0 < getattr(self, name) < 1, f"{name} is {getattr(self, name)}; expected 0 < {name} < 1.")

    def to_come(self) -> int:
        """If all projections grow alike."""
        ranks = self.ranks()
        parts = [self.module_at(name) for name in ranks]
        left = self.target_rank * len(ranks) - sum(ranks.values())
        return left * sum(len(part.lora_p) + part.lora_q.shape[1] + 1 for part in parts) // max(1, len(parts))

    def attach(self, points: Points) -> None:
        """Add the first directions at every selected linear point."""
        points.require("linear", "increlora")
        check_rank(self, ((point, self.target_rank) for point in points.linears(self.targets)), "target_rank")
        for point in points.linears(self.targets):
            point.add(Growing(point.dim_in, point.dim_out, self.rank, self.alpha, self.dropout))

    # -- training ---------------------------------------------------------------------------------------------------

    def step_start(self, model: Host, step: int) -> None:
        """What a pass beside the training left is no part of the step."""
        if self.schedule is not None:
            self.clear()

    def after_backward(self, model: Host, step: int) -> None:
        """Measure, and grow if it is time."""
        if self.schedule is None:
            return
        smooth(self.sensitivities(), self.scores_mean, self.scores_spread, self.beta1, self.beta2)
        if self.advance:
            for name, part in self.growing().items():
                if part.reserve is None:
                    self.reserve(name, part, self.schedule.added)
        if self.schedule.grows(step):
            self._grow(step)

    def fit_end(self, model: Host) -> None:
        """Drop what waits, and make one block of all."""
        self.close()
        for name, part in self.growing().items():
            self.drop_reserve(name, part)
            self.fold(name, part)

    # -- inside -----------------------------------------------------------------------------------------------------

    def open(self, first: int, total: int) -> None:
        """Plan, and measure from now on."""
        parts = self.growing()
        warmup, interval, end = (steps_of(v, total) for v in (self.tinit, self.interval, self.tgrown))
        added = self.at_a_time
        last = self.target_rank * len(parts)
        schedule = Rounds(first, last, total, warmup, max(1, interval), added, self.top_h or 1)
        if self.top_h is None:
            rounds = max(1, schedule.steps(max(end, warmup + schedule.interval)))
            schedule.top = math.ceil((last - first) / (added * rounds))
        schedule.top = min(schedule.top, len(parts))
        schedule.check(self.method, len(parts))
        self.schedule = schedule
        self.watch()

    def close(self) -> None:
        """Nothing grows any more: drop the scores, and measure nothing."""
        super().close()
        self.unwatch()

    def _grow(self, step: int) -> None:
        """A round."""
        schedule = self.schedule
        assert schedule is not None
        parts = list(self.growing().items())
        left = schedule.last - sum(part.rank for _, part in parts)
        gains = self.gains(
            [n for n, _ in parts], self.scores_mean * self.scores_spread, schedule.top, schedule.added, left
        )
        more = left > sum(gains.values())
        for name, part in parts:
            if name in gains:
                self.extend(name, part, gains[name], schedule.added if more and self.advance else 0)
        self.note(step, gains)
        if not more:
            self.close()
            for name, part in parts:
                self.drop_reserve(name, part)
