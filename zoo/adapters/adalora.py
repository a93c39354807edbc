"""AdaLoRA: a change in the form of an SVD, whose directions compete for a budget over the whole network.

Idea: the change of a projection is P diag(e) Q with near-orthogonal P and Q; while it trains, the triplets (P_j, e_j, Q_j) that
matter least, of all projections together, lose their e_j, so that the rank goes where it is needed.
Points: `linear`, all six of a block (q, k, v, o, up, down), and what a family has in their place.

    y = W x + b + s P diag(e) Q dropout(x)         P (o, r0), e (r0,), Q (r0, i), s = alpha / (r0 + 1e-5)
    loss + gamma * mean over all P and Q of ||P^T P - 1||_F and ||Q Q^T - 1||_F

After each optimizer step t = 0, 1, ... T - 1, with the weights after it and the gradients that it used:

    I = |w g|,   M <- b1 M + (1 - b1) I,   U <- b2 U + (1 - b2) |I - M|,   s(w) = M U           for t < T - tf
    S_j = s(e_j) + mean s(Q_j,:) + mean s(P_:,j)                                                     a triplet's score
    budget(t) = R0 for t <= ti, RT for t > T - tf, else int(RT + (R0 - RT) (1 - (t - ti) / (T - tf - ti))^3)
    e_j <- 0 for all but the budget(t) highest S_j                       every dT-th step; in the final phase every step

R0 = r0 n and RT = r n for n projections (r the average rank that is left). P, Q ~ N(0, 0.02^2), e = 0, so the start is the
pretrained function, to the bit. At the end the triplets without e_j are cut out, which changes no output: s keeps its r0.
Defaults: r0 = 12, r = 8, ti = T / 6, tf = T / 2, dT = T / 300 (500, 1500 and 10 of 3000 steps in the authors' README), b1 = b2 =
0.85, gamma = 0.1, alpha = 16, no weight decay. On 72 projections the budget is 863 / 612 / 576 at t = 501 / 1000 / 1501.
Counts: r0 (o + i + 1) for each projection in training, 165,960 per unit of r0 on ViT-B/16 (1,991,520); afterwards the sum of
r_j (o + i + 1) over the ranks that are left (their sum is RT).
Source: Zhang et al. 2023 (QingruZhang/AdaLoRA), whose code this follows, also where the paper differs: the norm is not squared.
Deviations: settings are fractions of the run, so that a fit of any length reaches its budget; the last step prunes to RT even if
tf is 0; evaluations in between see the budget of their step (theirs see the e_j that Adam has revived since), and leave no trace.

In memory: as LoRA, x and r0 numbers of a token; diag(e) Q is made again in backward. M and U are as large as the parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.adapters.parts.budget import Schedule, forget, kept, measure, score, steps_of, track
from zoo.adapters.parts.low_rank import check_rank
from zoo.adapters.parts.triplets import NAMES, OfTriplets, Triplets
from zoo.host import Host
from zoo.points import Points
from zoo.registry import register_adapter


@register_adapter("adalora")
@dataclass
class AdaLoRA(OfTriplets):
    """Low-rank adaptation that gives each projection the rank it needs.

    Args:
        rank: r0, triplets of each projection at the start. target_rank: how many there are on average at the end.
        alpha: numerator of the scale alpha / rank.
        targets: roles or names of linear points; "all-linear" is q, k, v, o, in, out, gate, up, down.
        dropout: on the input, while training.
        tinit, tfinal: nothing is pruned before, and nothing chosen any more after; below 1 parts of the run, else steps.
        interval: prune every so often; below 1 a part of the run, else steps.
        beta1, beta2: how slowly a weight's sensitivity and its spread change.
        orthogonality: gamma.
    """

    rank: int = 12
    target_rank: int = 8
    alpha: float = 16.0
    targets: str | tuple[str, ...] = "all-linear"
    dropout: float = 0.0
    tinit: float = 1 / 6
    tfinal: float = 1 / 2
    interval: float = 1 / 300
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.1

    plans_steps = True
    default_lr = 1e-3
    default_weight_decay = 0.0
    paper = "Zhang et al. 2023"
    taxonomy = "reparametrised"
    trial = {"rank": 3, "target_rank": 2}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(
            1 <= self.target_rank <= self.rank,
            f"rank is {self.rank} and target_rank {self.target_rank}; expected 1 <= target_rank <= rank.",
        )
        self.check(self.alpha != 0, "alpha is 0; what is learned is multiplied by it, so it could never act.")
        self.check(0 <= self.dropout < 1, f"dropout is {self.dropout}; expected 0 <= dropout < 1.")
        for name in ("tinit", "tfinal"):
            self.check(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; expected 0 or more.")
        parts = self.tinit + self.tfinal
        self.check(
            max(self.tinit, self.tfinal) >= 1 or parts < 1,
            f"tinit and tfinal are {parts:.3g} of the run; less than 1 leaves steps to prune in.",
        )
        self.check(self.interval > 0, f"interval is {self.interval}; expected steps, or a part of the run.")
        for name in ("beta1", "beta2"):
            self.check(0 < getattr(self, name) < 1, f"{name} is {getattr(self, name)}; expected 0 < {name} < 1.")
        self.check(self.orthogonality >= 0, f"orthogonality is {self.orthogonality}; expected 0 or more.")
        self.schedule: Schedule | None = None  # of the fit in progress
        self.step = -1
        self._masks: list[Tensor] | None = None  # of the final phase
        self._held: list[Tensor] = []  # e of an evaluation

    @classmethod
    def of_size(cls, size: int) -> dict[str, Any]:
        """Ranks from half as many again, as the defaults are; what is trained at first counts."""
        return {"rank": size + (size + 1) // 2, "target_rank": size}

    def attach(self, points: Points) -> None:
        """Add triplets at every selected linear point."""
        points.require("linear", "adalora")
        check_rank(self, ((point, self.rank) for point in points.linears(self.targets)))
        for point in points.linears(self.targets):
            scale = self.alpha / (self.rank + 1e-5)
            point.add(Triplets(point.dim_in, point.dim_out, self.rank, scale, self.dropout))

    # -- training ---------------------------------------------------------------------------------------------------

    def fit_start(self, model: Host, optimizer: Any, total_steps: int) -> None:
        """Make the schedule; refuse one that cannot reach the budget. What is frozen, or within the budget, stays as it is."""
        self._finish()
        ranks = self.ranks()
        first, last = sum(ranks.values()), self.target_rank * len(ranks)
        if first <= last or not any(p.requires_grad for p in self.parameters()):
            return
        steps = [steps_of(v, total_steps) for v in (self.tinit, self.tfinal, self.interval)]
        schedule = Schedule(first, last, total_steps, steps[0], steps[1], max(1, steps[2]))
        schedule.check(self.method)
        self.schedule = schedule
        for part in self.parts().values():
            track(part, NAMES)

    def after_step(self, model: Host, step: int) -> None:
        """Measure, and prune if it is time."""
        schedule, self.step = self.schedule, step
        if schedule is None:
            return
        if schedule.measures(step):
            for part in self.parts().values():
                measure(part, NAMES, self.beta1, self.beta2)
        if schedule.prunes(step):
            self._prune()

    def eval_start(self, model: Host) -> None:
        """Between two prunings Adam moves every e again; an evaluation sees the budget."""
        if self.schedule is not None and self.step > self.schedule.warmup:
            self._held = [p.get_parameter("lora_e").detach().clone() for p in self.parts().values()]
            self._prune()

    def eval_end(self, model: Host) -> None:
        """Training goes on from where it was."""
        held, self._held = self._held, []
        with torch.no_grad():
            for part, e in zip(self.parts().values(), held):
                part.get_parameter("lora_e").copy_(e)

    def ready(self) -> bool:
        """Whether no more than the budget is left."""
        return self.schedule is None or self.schedule.is_final(self.step)

    def fit_end(self, model: Host) -> None:
        """Cut out the triplets that are not in the budget; each point is left with its own rank, or none."""
        if self.schedule is not None and self.step >= 0:
            self.step = max(self.step, self.schedule.total - 1)
            masks = self._prune()
            for (name, part), mask in zip(self.parts().items(), masks, strict=True):
                index = mask.nonzero()[:, 0]
                if not len(index):
                    self.drop(*(f"{name}.{n}" for n in NAMES))
                elif len(index) < part.rank:
                    for n in NAMES:
                        self.resize(f"{name}.{n}", keep=index, dim=int(n == "lora_p"))
        self._finish()

    def extra_state(self) -> dict[str, Any] | None:
        """The step; scores are buffers."""
        return None if self.schedule is None else {"step": self.step}

    def load_extra_state(self, model: Host, state: dict[str, Any]) -> None:
        """Go on from a step."""
        self.step, self._masks = state["step"], None

    # -- inside -----------------------------------------------------------------------------------------------------

    def scores(self) -> list[Tensor]:
        """S (r0,) of each point, the same on every process."""
        found = []
        for part in self.parts().values():
            p, e, q = (score(part, name) for name in NAMES)
            found.append(e + q.mean(dim=1) + p.mean(dim=0))
        service = self.training_service
        if service is None:
            return found
        pool = service.reduce(torch.cat(found))
        return list(pool.split([len(s) for s in found]))

    def by_layer(self, model: Host) -> dict[str, dict[str, float]]:
        """The ranks within the present budget, as an evaluation sees them."""
        found: dict[str, float] = dict(self.ranks())
        if self.schedule is not None and self.step > self.schedule.warmup:
            found |= {name: int(mask.sum()) for name, mask in zip(self.parts(), self._staying(), strict=True)}
        return {"rank": found}

    @torch.no_grad()
    def _staying(self) -> list[Tensor]:
        """What is within the present budget. In the final phase scores are fixed, and so is that."""
        assert self.schedule is not None
        final = self.schedule.is_final(self.step)
        if final and self._masks is not None:
            return self._masks
        masks = kept(self.scores(), self.schedule.last if final else self.schedule.budget(self.step))
        self._masks = masks if final else None
        return masks

    @torch.no_grad()
    def _prune(self) -> list[Tensor]:
        """e <- 0 outside of the present budget; returns what stays."""
        masks = self._staying()
        for part, mask in zip(self.parts().values(), masks, strict=True):
            part.get_parameter("lora_e").masked_fill_(~mask, 0.0)
        return masks

    def _finish(self) -> None:
        """No fit is in progress: drop the scores."""
        self.schedule, self.step, self._masks, self._held = None, -1, None, []
        forget(self)
