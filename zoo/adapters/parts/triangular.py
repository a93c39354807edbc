"""A low-rank change with a square mixer between its two matrices, in blocks that can be added.

    D = s B (L + U) A         A (r, i), B (o, r), L, U (r, r), s = alpha / (r + 1e-5) for the present r

Block j of a_j directions, s_j with those before it, is a row of blocks (a_j, s_j) of L, a column (s_j, a_j) of U, a_j rows of A
and columns of B. As in TriAdaptLoRA (Liang, Wang and Zeng 2025).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adapters.parts.low_rank import add_low_rank
from zoo.engine.memory import dropped, recomputable

__all__ = ["NAMES", "Triangular"]

NAMES = ("lora_a", "lora_b", "lora_low", "lora_up")


def _below(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


def _beside(*parts: Tensor) -> Tensor:
    return torch.cat(parts, dim=1)


def _square(*parts: Tensor) -> Tensor:
    """L + U (r, r) of all rows of blocks, and behind them all columns."""
    half = len(parts) // 2
    rank = parts[half - 1].shape[1]
    low = torch.cat([F.pad(row, (0, rank - row.shape[1])) for row in parts[:half]])
    return low + torch.cat([F.pad(column, (0, 0, 0, rank - column.shape[0])) for column in parts[half:]], dim=1)


class Triangular(nn.Module):
    """`x (..., dim_in) -> alpha / (r + 1e-5) * B (L + U) A dropout(x) (..., dim_out)`, in blocks: `lora_a`, `lora_a1` ..."""

    def __init__(self, dim_in: int, dim_out: int, rank: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.lora_a = nn.Parameter(torch.randn(rank, dim_in) * 0.02)
        self.lora_b = nn.Parameter(torch.randn(dim_out, rank) * 0.02)
        self.lora_low = nn.Parameter(torch.zeros(rank, rank))
        self.lora_up = nn.Parameter(torch.zeros(rank, rank))
        self.alpha = alpha
        self.drop = nn.Dropout(dropout)

    def all(self, name: str) -> list[Tensor]:
        """A parameter of every block."""
        found: list[Tensor] = [getattr(self, name)]
        while (more := getattr(self, f"{name}{len(found)}", None)) is not None:
            found.append(more)
        return found

    @property
    def rank(self) -> int:
        """r."""
        return sum(len(a) for a in self.all("lora_a"))

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / (self.rank + 1e-5)

    def square(self) -> Tensor:
        """L + U (r, r)."""
        return recomputable(_square, *self.all("lora_low"), *self.all("lora_up"))

    def outer(self) -> tuple[Tensor, Tensor]:
        """A (r, dim_in) and B (dim_out, r)."""
        a, b = self.all("lora_a"), self.all("lora_b")
        return (a[0], b[0]) if len(a) == 1 else (recomputable(_below, *a), recomputable(_beside, *b))

    def factors(self) -> tuple[Tensor, Tensor]:
        """(L + U) A (r, dim_in), and B (dim_out, r)."""
        a, b = self.outer()
        return recomputable(torch.mm, self.square(), a), b

    def forward(self, x: Tensor) -> Tensor:
        """The delta alone."""
        a, b = self.factors()
        return self.scale * F.linear(F.linear(self.drop(x), a), b)

    def delta(self) -> Tensor:
        """The change of W (dim_out, dim_in)."""
        a, b = self.factors()
        return self.scale * (b @ a)

    @staticmethod
    def add_group(parts: tuple[tuple[Triangular, int, int], ...], x: Tensor, y: Tensor) -> Tensor:
        """`y[..., start:stop] += delta(x)` for all parts of one projection at once; y is changed in place and returned."""
        slices = tuple((start, stop, part.scale) for part, start, stop in parts)
        factors = [f for part, _, _ in parts for f in part.factors()]
        return add_low_rank(dropped(x, parts[0][0].drop), y, slices, factors)

    @torch.no_grad()
    def size(self) -> Tensor:
        """F = ||L + U||_F / (number of blocks)."""
        return self.square().norm() / len(self.all("lora_a"))
