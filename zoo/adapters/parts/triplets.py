"""A change of a projection in the form of an SVD, whose directions can be counted, cut and added one by one.

    y = W x + b + s P diag(e) Q dropout(x)         P (o, r), e (r,), Q (r, i)

As in AdaLoRA (Zhang et al. 2023), for methods that change ranks while they train. In memory: as LoRA, x and r numbers of a token;
diag(e) Q is made again in backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adapters.base import Adapter
from zoo.adapters.parts.budget import distance
from zoo.adapters.parts.low_rank import add_low_rank
from zoo.engine.memory import dropped, recomputable
from zoo.host import Host
from zoo.points import Points
from zoo.points.merger import Merger

__all__ = ["NAMES", "OfTriplets", "Triplets"]

NAMES = ("lora_p", "lora_e", "lora_q")


def _scaled(e: Tensor, q: Tensor) -> Tensor:
    """diag(e) Q (r, dim_in)."""
    return e[:, None] * q


class Triplets(nn.Module):
    """`x (..., dim_in) -> scale * P diag(e) Q dropout(x) (..., dim_out)`; without any triplet left the three are None."""

    lora_p: nn.Parameter | None
    lora_e: nn.Parameter | None
    lora_q: nn.Parameter | None

    def __init__(self, dim_in: int, dim_out: int, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.lora_p = nn.Parameter(torch.randn(dim_out, rank) * 0.02)
        self.lora_e = nn.Parameter(torch.zeros(rank))
        self.lora_q = nn.Parameter(torch.randn(rank, dim_in) * 0.02)
        self.dim_out, self.fixed = dim_out, scale
        self.drop = nn.Dropout(dropout)

    @property
    def scale(self) -> float:
        """s of the equations."""
        return self.fixed

    @property
    def rank(self) -> int:
        """Triplets that are there."""
        return 0 if self.lora_e is None else len(self.lora_e)

    def factors(self) -> tuple[Tensor, Tensor]:
        """diag(e) Q (r, dim_in) and P (dim_out, r), of one that has triplets."""
        assert self.lora_p is not None
        return recomputable(_scaled, self.lora_e, self.lora_q), self.lora_p

    def matrices(self) -> list[Tensor]:
        """P^T and Q, whose rows shall be orthonormal."""
        assert self.lora_p is not None and self.lora_q is not None
        return [self.lora_p.T, self.lora_q]

    def forward(self, x: Tensor) -> Tensor:
        """The delta alone."""
        if self.lora_p is None:
            return x.new_zeros(*x.shape[:-1], self.dim_out)
        q, p = self.factors()
        return self.scale * F.linear(F.linear(self.drop(x), q), p)

    def delta(self) -> Tensor:
        """The change of W (dim_out, dim_in)."""
        q, p = self.factors()
        return self.scale * (p @ q)

    @staticmethod
    def add_group(parts: tuple[tuple[Triplets, int, int], ...], x: Tensor, y: Tensor) -> Tensor:
        """`y[..., start:stop] += delta(x)` for all parts of one projection at once; y is changed in place and returned."""
        live = [(part, start, stop) for part, start, stop in parts if part.lora_p is not None]
        slices = tuple((start, stop, part.scale) for part, start, stop in live)
        factors = [f for part, _, _ in live for f in part.factors()]
        return add_low_rank(dropped(x, parts[0][0].drop), y, slices, factors) if slices else y


class OfTriplets(Adapter):
    """Methods whose modules are triplets: what becomes of these at the end, and how far from orthogonal they are."""

    orthogonality: float

    def parts(self) -> dict[str, Triplets]:
        """The modules that have triplets, by their points."""
        return {n: m for n, m in self.named_modules() if isinstance(m, Triplets) and m.rank}

    def ranks(self) -> dict[str, int]:
        """The rank of every point, 0 included."""
        return {n: m.rank for n, m in self.named_modules() if isinstance(m, Triplets)}

    def low_rank(self, points: Points) -> dict[str, tuple[Tensor, Tensor]] | None:
        """diag(e) Q, and P with the scale."""
        found = {}
        for name, part in self.parts().items():
            q, p = part.factors()
            found[name] = (q.detach(), part.scale * p.detach())
        return found

    def merge(self, merger: Merger) -> None:
        """W <- W + s P diag(e) Q."""
        for name, part in self.parts().items():
            merger.add_weight(merger.points[name], part.delta())

    def extra_loss(self, model: Host, outputs: Any, targets: Any) -> Tensor | None:
        """gamma times the mean distance of P and Q from orthogonal ones, while they are trained."""
        trained = any(p.requires_grad for p in self.parameters())
        return self.orthogonality * self.distance() if self.orthogonality and trained else None

    def distance(self) -> Tensor:
        """Mean over all P and Q of ||P^T P - 1||_F and ||Q Q^T - 1||_F."""
        return distance([m for part in self.parts().values() for m in part.matrices()])
