"""DyLoRA: one low-rank change that works when it is cut to any smaller rank.

Idea: in each step of training a rank b is drawn, and only the first b directions of every projection take part; so the first
directions learn what matters most, and the rank is chosen after training instead of before.
Points: any `linear` points; a slice of a fused q/k/v is a point of its own.

    y = W x + b_0 + (alpha / b) B[:, :b] A[:b] dropout(x)          A (r, i), B (o, r)
    b ~ U{r_min, ..., r}, one draw for all projections in each step

At rank b this is LoRA with alpha and rank b: the authors multiply both factors by sqrt(r / b) and their product by alpha / r.
With `frozen=True` only direction b learns in a step, the b - 1 before it are constants.
A ~ Kaiming-uniform(a = sqrt 5), B = 0, so the start is the pretrained function, to the bit, at every rank.
Defaults: r = 8, r_min = 1, alpha = 16, on q and v, no dropout, all b directions learn.
Counts: r (i + o) for each point, as LoRA of rank r: ViT-B/16 on q, v 294,912; cut to rank b it is b / r of that.

Outside of training (evaluation, a loop of one's own that calls no hooks) the rank is `chosen`, r by default. `choose(b)` sets
it; it is saved with the adapter, and is what `merge` folds and `model.combine({"dylora": 1.0})` cuts to: a plain LoRA of rank b.

    for b in range(1, 9):
        model.adapters["dylora"].choose(b)
        print(b, zoo.evaluate(model, validation))

Source: Valipour et al., "DyLoRA: Parameter-Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank Adaptation",
EACL 2023.
Deviations: their rank counts from zero and starts there, so that a network whose rank was never set is evaluated at rank 1; here
it is r. Their merged weight is taken apart with the rank of that moment; here merging leaves the frozen weights as they are. The
draw of a step is a function of `seed` and the step, so that all processes have the same and a resumed run has those of the
unbroken one. As in their code, directions that were not drawn have a gradient of zero rather than none: Adam's momentum and
weight decay move them nevertheless.

In memory: as LoRA of rank r. Directions that do not take part are multiplied by zero and not cut out, so that a compiled step
is compiled once.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.adapters.base import Adapter
from zoo.adapters.parts.low_rank import LowRank, add_low_rank, check_rank
from zoo.engine.memory import dropped, recomputable
from zoo.errors import MismatchError
from zoo.host import Host
from zoo.points import LinearPoint, Points
from zoo.points.merger import Merger
from zoo.registry import register_adapter


def _learning(factor: Tensor, learns: Tensor) -> Tensor:
    """The factor, of which only the entries in `learns` are differentiated."""
    return torch.where(learns, factor, factor.detach())


class Nested(LowRank):
    """`x (..., dim_in) -> (alpha / b) B[:, :b] A[:b] dropout(x) (..., dim_out)` for the rank b that is set."""

    share: Tensor  # (r,): alpha / b for the directions that take part, else 0
    learns: Tensor  # (r,): those that are differentiated

    def __init__(self, dim_in: int, dim_out: int, rank: int, alpha: float, dropout: float, frozen: bool) -> None:
        super().__init__(dim_in, dim_out, rank, 1.0, dropout)
        self.alpha, self.frozen = alpha, frozen
        self.chosen = rank  # outside of training
        self.register_buffer("share", torch.empty(rank), persistent=False)
        self.register_buffer("learns", torch.empty(rank, dtype=torch.bool), persistent=False)
        self.set_rank(rank)

    @torch.no_grad()
    def set_rank(self, rank: int, training: bool = False) -> None:
        """Use the first `rank` directions; in a step of training with `frozen`, differentiate the last of them alone."""
        self.share.zero_()
        self.share[:rank] = self.alpha / rank
        self.learns.fill_(True)
        if training and self.frozen:
            self.learns.zero_()
            self.learns[rank - 1] = True

    def train(self, mode: bool = True) -> Nested:
        """As torch's; whoever evaluates, also behind a fit that broke off, gets the chosen rank and not the last draw."""
        if not mode:
            self.set_rank(self.chosen)
        return super().train(mode)

    def cut(self) -> tuple[Tensor, Tensor]:
        """A (b, dim_in) and B (dim_out, b), this with the scale, of the chosen rank b."""
        return self.lora_a[: self.chosen], self.alpha / self.chosen * self.lora_b[:, : self.chosen]

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, dim_in) and B (dim_out, r), this with the scale, and with zeros behind the first b columns."""
        a: Tensor = self.lora_a
        b: Tensor = self.lora_b
        if self.frozen:
            a, b = _learning(a, self.learns[:, None]), _learning(b, self.learns)
        return a, recomputable(torch.mul, b, self.share)

    def forward(self, x: Tensor) -> Tensor:
        """The delta alone."""
        a, b = self.factors()
        return F.linear(F.linear(self.drop(x), a), b)

    def delta(self) -> Tensor:
        """The change of W (dim_out, dim_in) at the chosen rank."""
        a, b = self.cut()
        return b @ a

    @staticmethod
    def add_group(parts: tuple[tuple[Nested, int, int], ...], x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        """`y[..., start:stop] += delta(x)` for all parts of one projection at once; y is changed in place and returned."""
        slices = tuple((start, stop, 1.0) for _, start, stop in parts)
        factors = [f for part, _, _ in parts for f in part.factors()]
        return add_low_rank(dropped(x, parts[0][0].drop), y, slices, factors)


@register_adapter("dylora")
@dataclass
class DyLoRA(Adapter):
    """Low-rank adaptation for all ranks at once.

    Args:
        rank: r, the largest rank. min_rank: the smallest that is drawn.
        alpha: numerator of the scale alpha / b.
        targets: roles or names of linear points; "all-linear" is q, k, v, o, in, out, gate, up, down. The default is `in` on a
            backbone without attention.
        dropout: on the input, while training.
        frozen: in each step only the last direction that takes part learns.
        seed: of the draws.
    """

    rank: int = 8
    min_rank: int = 1
    alpha: float = 16.0
    targets: str | tuple[str, ...] = ("q", "v")
    dropout: float = 0.0
    frozen: bool = False
    seed: int = 0

    default_lr = 1e-3
    paper = "Valipour et al. 2023"
    taxonomy = "reparametrised"
    trial = {"rank": 3, "targets": "all-linear"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(
            1 <= self.min_rank <= self.rank,
            f"min_rank is {self.min_rank} and rank {self.rank}; expected 1 <= min_rank <= rank.",
        )
        self.check(self.alpha != 0, "alpha is 0; what is learned is multiplied by it, so it could never act.")
        self.check(0 <= self.dropout < 1, f"dropout is {self.dropout}; expected 0 <= dropout < 1.")

    def attach(self, points: Points) -> None:
        """Add nested directions at every selected linear point, at the rank that was chosen."""
        points.require("linear", "dylora")
        chosen = self.chosen
        check_rank(self, ((point, self.rank) for point in self.selected(points)))
        for point in self.selected(points):
            part = Nested(point.dim_in, point.dim_out, self.rank, self.alpha, self.dropout, self.frozen)
            part.chosen = chosen
            part.set_rank(chosen)
            point.add(part)

    def selected(self, points: Points) -> list[LinearPoint]:
        """The target points."""
        return points.linears(self.targets, DyLoRA.targets)  # type: ignore[arg-type]

    @property
    def chosen(self) -> int:
        """The rank outside of training.

        Raises:
            MismatchError: a file names one that this adapter does not have.
        """
        rank = (self.plan or {}).get("rank", self.rank)
        if type(rank) is not int or not 1 <= rank <= self.rank:
            raise MismatchError(
                f"The plan of 'dylora' chooses rank {rank!r}, and its directions are {self.rank}. Load it as it was saved."
            )
        return rank

    def choose(self, rank: int) -> None:
        """Use the first `rank` directions from now on, wherever nothing is trained; saved with the adapter.

        Raises:
            ConfigError: there are not so many.
        """
        self.check(
            type(rank) is int and 1 <= rank <= self.rank,
            f"choose({rank!r}): the directions that were trained are {self.rank}; expected a rank of 1 to {self.rank}.",
        )
        self.plan = {**(self.plan or {}), "rank": rank}
        for part in self.parts().values():
            part.chosen = rank
        self._use(rank)

    def draw(self, step: int) -> int:
        """The rank of a step: the same in every process, and whenever it is asked for."""
        return random.Random(f"dylora {self.seed} {step}").randint(self.min_rank, self.rank)

    def parts(self) -> dict[str, Nested]:
        """The modules by their points."""
        return {n: m for n, m in self.named_modules() if isinstance(m, Nested)}

    def low_rank(self, points: Points) -> dict[str, tuple[Tensor, Tensor]] | None:
        """The directions of the chosen rank: A (b, i), and B (o, b) with the scale."""
        return {n: tuple(f.detach() for f in part.cut()) for n, part in self.parts().items()}  # type: ignore[misc]

    def merge(self, merger: Merger) -> None:
        """W <- W + (alpha / b) B[:, :b] A[:b]."""
        for point in self.selected(merger.points):
            merger.add_weight(point, self.module_at(point).delta())

    # -- training ---------------------------------------------------------------------------------------------------

    def step_start(self, model: Host, step: int) -> None:
        """One rank for all projections. A frozen adapter, beside which another is trained, keeps the chosen one."""
        if any(p.requires_grad for p in self.parameters()):
            self._use(self.draw(step), training=True)

    def eval_start(self, model: Host) -> None:
        """An evaluation sees the chosen rank; the next step draws anew."""
        self._use(self.chosen)

    def fit_end(self, model: Host) -> None:
        """The chosen rank, from the last step's draw."""
        self._use(self.chosen)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _use(self, rank: int, training: bool = False) -> None:
        for part in self.parts().values():
            part.set_rank(rank, training)
