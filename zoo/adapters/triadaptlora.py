"""TriAdaptLoRA: a small square mixer between two thin matrices, which grows where it grew.

Idea: the change of a projection is B C A with a square C, kept as a lower and an upper triangle of blocks, so that it can be made
larger by a row and a column of blocks; the projections whose C moved most since the last look get further directions.
Points: `linear`, all six of a block (q, k, v, o, up, down), and what a family has in their place.

    y = W x + b + s B (L + U) A dropout(x)         A (r, i), B (o, r), L, U (r, r), s = alpha / (r + 1e-5) for the present r
    block j of a_j directions, s_j with those before it: a row (a_j, s_j) of L, a column (s_j, a_j) of U, rows of A, columns of B
    loss + gamma * mean over all A and B of ||A A^T - 1||_F and ||B^T B - 1||_F

The blocks on the diagonal are in L and in U; what acts is their sum. In front of the optimizer steps t > t0 that are multiples of
dT, until the budget is met, with F = ||L + U||_F / (number of blocks) of a projection:

    S = F now - F at the last look,   n = int((RT - R) c), or for growth="exponential" int((RT - R)^c), c = (t - t0) / (T - t0)
    the n projections with the highest S, at least one and at most all, get a directions each

R is the sum of ranks now, RT the budget. A, B ~ N(0, 0.02^2) and L = U = 0, of new blocks too: the start is the pretrained
function, to the bit, and a new block changes nothing but s. Each block has a learning rate that rises anew and is 0 at T.

Defaults: r0 = 1, r = 8 on average in the end, a = r / 2, t0 = 0, dT = 1, linear growth, gamma = 0.5, alpha = 16, no weight decay.
Counts: r (o + i) + sum over blocks of 2 a_j s_j for each projection: for r0 = 1 and m blocks of a that came later 2 + 2 a m +
a^2 m (m + 1) for L and U (42 for r = 1 + 4, 114 for 1 + 4 + 4), r^2 + a r for equal blocks. In the beginning 165,888 + 144 on
ViT-B/16.
Source: Liang, Wang and Zeng 2025, "TriAdaptLoRA: Brain-Inspired Triangular Adaptive Low-Rank Adaptation for Parameter-Efficient
Fine-Tuning"; what the paper leaves open is as in the tuner for an early peft that comes with it.
Deviations: that tuner starts A alone at random and all else, of new blocks everything, at 0: no gradient ever leaves that saddle
(dA = s C^T B^T G, dB = s G A^T C^T and dC = s B^T G A^T are 0 with B = C = 0). Its n counts projections where RT - R counts
directions, so that the last round passes the budget, as ties do; here the last round gives what is left, and the sum is RT. It
writes 2 r^2 for L and U into its log (50 for 42 numbers). It measures wherever its trainer calls it; here in front of the step,
as in IncreLoRA, whose trainer it comes from.
The paper finds it above IncreLoRA, AdaLoRA and LoRA at equal size; `vit-micro` after 60 steps on CIFAR-10 shows nothing of it
(docs/comparison.md: 51.4 +- 0.5, LoRA 52.9 +- 1.9).

In memory: as LoRA, x and r numbers of a token; (L + U) A is made again in backward. To look takes no
gradient: a step of ViT-B/16 (batch 8, one core) takes 1.01 times LoRA's, with a look 1.03 (`benchmarks/growth_speed.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from zoo.adapters.parts.budget import distance, steps_of
from zoo.adapters.parts.low_rank import check_rank
from zoo.adapters.parts.rounds import InRounds, Paced
from zoo.adapters.parts.triangular import NAMES, Triangular
from zoo.host import Host
from zoo.points import Points
from zoo.points.merger import Merger
from zoo.registry import register_adapter


@register_adapter("triadaptlora")
@dataclass
class TriAdaptLoRA(InRounds):
    """Low-rank adaptation with a triangular mixer whose ranks grow where it moves.

    Args:
        rank: r0, directions of each projection at the start. target_rank: how many there are on average at the end,
            at most what the widest target's change can have.
        alpha: numerator of the scale alpha / r.
        targets: roles or names of linear points; "all-linear" is q, k, v, o, in, out, gate, up, down.
        dropout: on the input, while training.
        added: a, directions that a projection gets in a round; by default half of target_rank.
        growth: how many projections grow at a step: "linear" or "exponential" in the part of the run that is over.
        tinit: nothing grows before; below 1 a part of the run, else steps.
        interval: a look every so often; below 1 a part of the run, else steps.
        orthogonality: gamma.
    """

    rank: int = 1
    target_rank: int = 8
    alpha: float = 16.0
    targets: str | tuple[str, ...] = "all-linear"
    dropout: float = 0.0
    added: int | None = None
    growth: Literal["linear", "exponential"] = "linear"
    tinit: float = 0
    interval: float = 1
    orthogonality: float = 0.5

    plans_steps = True
    default_lr = 1e-3
    default_weight_decay = 0.0
    paper = "Liang, Wang and Zeng 2025"
    taxonomy = "reparametrised"
    trial = {"rank": 1, "target_rank": 3}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_growth()

    def to_come(self) -> int:
        """If all projections grow alike, in blocks of a."""
        parts = self.parts().values()
        left = self.target_rank * len(parts) - sum(part.rank for part in parts)
        if left <= 0:
            return 0
        added, total = self.at_a_time, 0
        for part in parts:
            rank, width = part.rank, part.lora_a.shape[1] + len(part.lora_b)
            while rank < self.target_rank:
                more = min(added, self.target_rank - rank)
                rank += more
                total += more * (width + 2 * rank)
        return total

    def attach(self, points: Points) -> None:
        """Add the first block at every selected linear point."""
        points.require("linear", "triadaptlora")
        check_rank(self, ((point, self.target_rank) for point in points.linears(self.targets)), "target_rank")
        for point in points.linears(self.targets):
            point.add(Triangular(point.dim_in, point.dim_out, self.rank, self.alpha, self.dropout))

    def parts(self) -> dict[str, Triangular]:
        """The modules by their points."""
        return {n: m for n, m in self.named_modules() if isinstance(m, Triangular)}

    def ranks(self) -> dict[str, int]:
        """The rank of every point."""
        return {n: m.rank for n, m in self.parts().items()}

    def low_rank(self, points: Points) -> dict[str, tuple[Tensor, Tensor]] | None:
        """(L + U) A, and B with the scale."""
        found = {n: (part.scale, *part.factors()) for n, part in self.parts().items()}
        return {n: (a.detach(), scale * b.detach()) for n, (scale, a, b) in found.items()}

    def merge(self, merger: Merger) -> None:
        """W <- W + s B (L + U) A."""
        for name, part in self.parts().items():
            merger.add_weight(merger.points[name], part.delta())

    # -- training ---------------------------------------------------------------------------------------------------

    def extra_loss(self, model: Host, outputs: Any, targets: Any) -> Tensor | None:
        """gamma times the mean distance of A and B from orthogonal ones, while they are trained."""
        trained = any(p.requires_grad for p in self.parameters())
        return self.orthogonality * self.distance() if self.orthogonality and trained else None

    def distance(self) -> Tensor:
        """Mean over all A and B of ||A A^T - 1||_F and ||B^T B - 1||_F."""
        pairs = [part.outer() for part in self.parts().values()]
        return distance([m for a, b in pairs for m in (a, b.T)])

    def after_backward(self, model: Host, step: int) -> None:
        """Look, and grow, if it is time."""
        schedule = self.schedule
        if schedule is None or not schedule.grows(step):
            return
        parts = self.parts()
        sizes = torch.stack([part.size() for part in parts.values()])
        left = schedule.last - sum(part.rank for part in parts.values())
        gains = self.gains(
            list(parts), sizes - self.get_buffer("sizes"), schedule.count(step, left), schedule.added, left
        )
        self.register_buffer("sizes", sizes, persistent=False)
        for name, gain in gains.items():
            self.extend(name, gain)
        self.note(step, gains)
        if left == sum(gains.values()):
            self.close()

    # -- inside -----------------------------------------------------------------------------------------------------

    def extend(self, name: str, count: int) -> None:
        """A projection gets `count` directions."""
        part = self.parts()[name]
        rank, number = part.rank + count, len(part.all("lora_a"))
        fresh = (
            torch.randn(count, part.lora_a.shape[1]) * 0.02,
            torch.randn(len(part.lora_b), count) * 0.02,
            torch.zeros(count, rank),
            torch.zeros(rank, count),
        )
        for which, value in zip(NAMES, fresh):
            self.grow(f"{name}.{which}{number}", value, like=f"{name}.{which}")

    def open(self, first: int, total: int) -> None:
        """Plan, and remember how large the squares are."""
        parts = self.parts().values()
        added = self.at_a_time
        warmup, interval = steps_of(self.tinit, total), max(1, steps_of(self.interval, total))
        exponential = self.growth == "exponential"
        schedule = Paced(first, self.target_rank * len(parts), total, warmup, interval, added, len(parts), exponential)
        schedule.check(self.method)
        self.schedule = schedule
        self.register_buffer("sizes", torch.stack([part.size() for part in parts]), persistent=False)

    def close(self) -> None:
        """Nothing grows any more: drop the sizes."""
        super().close()
        self._buffers.pop("sizes", None)
