"""A falling budget of directions: how many are left at a step, how much each weight matters, which directions go.

As in AdaLoRA (Zhang et al. 2023), for every method that prunes while it trains.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError

__all__ = ["Schedule", "distance", "forget", "kept", "measure", "score", "smooth", "steps_of", "track"]


KINDS = ("_mean", "_spread")


def steps_of(value: float, total: int) -> int:
    """Below 1 a part of `total` steps, otherwise a number of steps."""
    return math.floor(value * total + 1e-9) if value < 1 else int(value)


@dataclass
class Schedule:
    """From `first` directions in all to `last`: full for t <= warmup, then down by a cubic, `last` for t > total - final.

    Steps t are counted from 0, as in the authors' trainer.
    """

    first: int
    last: int
    total: int
    warmup: int
    final: int
    interval: int = 1

    def check(self, method: str) -> None:
        """Raise ConfigError if no step is left between warm-up and final phase."""
        if self.warmup + self.final >= self.total:
            raise ConfigError(
                f"{method}: tinit={self.warmup} and tfinal={self.final} steps leave none of {self.total} to reach the budget in. "
                "Train longer, or give both as fractions of the run (below 1), which suit any length."
            )

    def budget(self, t: int) -> int:
        """Directions that may be left at step t."""
        if t <= self.warmup:
            return self.first
        if t > self.total - self.final:
            return self.last
        rest = 1 - (t - self.warmup) / (self.total - self.final - self.warmup)
        return int(self.last + (self.first - self.last) * rest**3)

    def measures(self, t: int) -> bool:
        """Whether step t still counts in the scores; the first two do in a run of any length."""
        return t < max(self.total - self.final, 2)

    def is_final(self, t: int) -> bool:
        """Whether the budget is reached at step t: in the final phase, and in any case with the last step."""
        return t > self.total - self.final or t >= self.total - 1

    def prunes(self, t: int) -> bool:
        """Whether directions go at step t."""
        return self.is_final(t) or (t > self.warmup and t % self.interval == 0)


def track(module: nn.Module, names: Iterable[str]) -> None:
    """Keep mean and spread of the sensitivity of some parameters, as buffers that checkpoints hold and files do not."""
    for name in names:
        for kind in KINDS:
            module.register_buffer(name + kind, torch.zeros_like(module.get_parameter(name)), persistent=False)


def forget(root: nn.Module) -> None:
    """Drop what `track` made, in all modules of `root`."""
    for module in root.modules():
        for name in [n for n in module._buffers if n.endswith(KINDS)]:
            del module._buffers[name]


@torch.no_grad()
def measure(module: nn.Module, names: Iterable[str], beta1: float, beta2: float) -> None:
    """I = |w g| of every entry of a parameter, smoothed."""
    for name in names:
        w, mean, spread = module.get_parameter(name), *(module.get_buffer(name + kind) for kind in KINDS)
        smooth(torch.zeros_like(mean) if w.grad is None else (w * w.grad).abs(), mean, spread, beta1, beta2)


@torch.no_grad()
def smooth(i: Tensor, mean: Tensor, spread: Tensor, beta1: float, beta2: float) -> None:
    """mean <- b1 mean + (1 - b1) I; spread <- b2 spread + (1 - b2) |I - mean|, with the new mean; both in place."""
    mean.mul_(beta1).add_(i, alpha=1 - beta1)
    spread.mul_(beta2).add_((i - mean).abs(), alpha=1 - beta2)


def score(module: nn.Module, name: str) -> Tensor:
    """mean * spread of every entry of a parameter."""
    return module.get_buffer(name + KINDS[0]) * module.get_buffer(name + KINDS[1])


def kept(scores: Sequence[Tensor], budget: int) -> list[Tensor]:
    """Which of all directions stay, as masks of the shapes of `scores`: those above the k-th smallest, k = all - budget.

    Where several have the k-th score, all of these go: fewer than the budget stay.
    """
    pool = torch.cat([s.reshape(-1) for s in scores])
    gone = len(pool) - budget
    if gone < 1:
        return [torch.ones_like(s, dtype=torch.bool) for s in scores]
    threshold = torch.kthvalue(pool, min(gone, len(pool))).values
    return [s > threshold for s in scores]


def distance(matrices: Sequence[Tensor]) -> Tensor:
    """Mean over matrices (r, d), or stacks (n, r, d) of them, of ||M M^T - 1||_F; those of one shape are computed together."""
    groups: dict[torch.Size, list[Tensor]] = {}
    for matrix in matrices:
        groups.setdefault(matrix.shape[-2:], []).append(matrix if matrix.ndim == 3 else matrix[None])
    total, count = matrices[0].new_zeros(()), 0
    with torch.autocast(total.device.type, enabled=False):
        for (rank, _), members in groups.items():
            m = torch.cat(members)
            total = total + (m @ m.mT - torch.eye(rank, device=m.device, dtype=m.dtype)).flatten(1).norm(dim=1).sum()
            count += len(m)
    return total / count
