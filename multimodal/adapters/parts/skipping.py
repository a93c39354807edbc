"""Pieces of DAS: the networks in place of blocks and beside sublayers, the gates, and the bandit's update of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Bottleneck", "Gates", "updated"]


class Bottleneck(nn.Module):
    """`W_u relu(W_d LN(x) + b_d) + b_u`; with `residual` x + that, in place of a block while `skipping`."""

    def __init__(self, dim: int, width: int, residual: bool) -> None:
        super().__init__()
        self.ln, self.down, self.up = nn.LayerNorm(dim), nn.Linear(dim, width), nn.Linear(width, dim)
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.residual = self.skipping = residual
        self.always = False  # nothing in the block will ever run

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        y = self.up(torch.relu(self.down(self.ln(x))))
        return x + y if self.residual else y


class Gates(nn.Module):
    """a (n,), one for each candidate; no parameter, since no gradient reaches it."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("values", torch.zeros(count))


def updated(gates: Tensor, picks: list[list[int]], rewards: list[float], rate: float) -> Tensor:
    """The gates (n,) after rewards of some subsets: `a_i + rate (R_j - mean R) p_i (1 - p_i)` for every i in subset j."""
    p, mean = torch.sigmoid(gates), sum(rewards) / len(rewards)
    change = torch.zeros_like(gates)
    for picked, reward in zip(picks, rewards):
        change[picked] += reward - mean
    return gates + rate * change * p * (1 - p)
