"""Values of one shape as a start for another: prompts of another length, low-rank factors of another rank."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["of_length", "of_rank"]

NOISE = 0.02  # standard deviation of what is added to a repeated row, as a share of that of all


def of_length(rows: Tensor, length: int) -> Tensor:
    """Rows (T, ...) as (length, ...): the first ones, or all and then again, with N(0, (0.02 std(rows))^2) on what repeats.

    Without noise two equal keys would get equal gradients and stay one key of twice the weight.
    """
    if length <= len(rows):
        return rows[:length].clone()
    tiled = rows.repeat(math.ceil(length / len(rows)), *(1 for _ in rows.shape[1:]))[:length]
    more = tiled[len(rows) :]
    more += NOISE * rows.float().std(correction=0).to(rows) * torch.randn_like(more)
    return tiled


def of_rank(a: Tensor, b: Tensor, rank: int, fresh: Tensor) -> tuple[Tensor, Tensor]:
    """A (r, i) and B (o, r) with another rank: (rank, i) and (o, rank).

    A smaller one gives the best approximation of B A (its truncated SVD, half of the singular values on each side). A larger one
    gives the same B A: further columns of B are zero, and further rows of A those of `fresh` (rank, i), so that both learn.
    """
    if rank == len(a):
        return a.clone(), b.clone()
    if rank > len(a):
        return torch.cat([a, fresh[len(a) :].to(a)]), torch.cat([b, b.new_zeros(len(b), rank - len(a))], dim=1)
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    half = s[:rank].sqrt()
    return (half[:, None] * (vh[:rank] @ q_a.T)).to(a), ((q_b @ u[:, :rank]) * half).to(b)
