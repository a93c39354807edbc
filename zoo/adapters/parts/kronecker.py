"""Sums of Kronecker products: parameterized hypercomplex multiplication (Zhang et al. 2021), and the rule that layers share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.engine.memory import recomputable

GAIN = math.sqrt(2)  # of the Glorot-uniform start of every slice


def kronecker_sum(rule: Tensor, factors: Tensor) -> Tensor:
    """`sum_i rule[i] (x) factors[i]`; rule (..., n, a, c), factors (..., n, k, p) -> (..., a k, c p)."""
    return torch.einsum("...iac,...ikp->...akcp", rule, factors).flatten(-2).flatten(-3, -2)


def compose(rule: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`sum_i rule[i] (x) (left[i] right[i])`; left (n, k, r), right (n, r, p)."""
    return kronecker_sum(rule, left @ right)


class Rule(nn.Module):
    """A (n, n, n), which says how the n blocks of an input are mixed; shared by every layer that multiplies so."""

    def __init__(self, n: int, std: float) -> None:
        super().__init__()
        self.rule = nn.Parameter(torch.empty(n, n, n).normal_(std=std))


class KroneckerLinear(nn.Module):
    """`x (..., dim_in) -> x W + b`, `W = sum_i A_i (x) (S_i T_i)` (dim_in, dim_out), A of a shared `Rule`.

    S_i (dim_in / n, r) and T_i (r, dim_out / n) are Glorot-uniform with gain sqrt(2), each slice by itself; b = 0. Both
    dimensions are multiples of n.
    """

    def __init__(self, dim_in: int, dim_out: int, rule: Rule, rank: int = 1) -> None:
        super().__init__()
        n = len(rule.rule)
        self.shared = (rule,)
        self.left = nn.Parameter(torch.empty(n, dim_in // n, rank))
        self.right = nn.Parameter(torch.empty(n, rank, dim_out // n))
        self.bias = nn.Parameter(torch.zeros(dim_out))
        for factors in (self.left, self.right):
            for single in factors.data:
                nn.init.xavier_uniform_(single, gain=GAIN)

    def weight(self) -> Tensor:
        """W (dim_in, dim_out); made anew in backward instead of kept."""
        return recomputable(compose, self.shared[0].rule, self.left, self.right)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim_in) -> (..., dim_out)."""
        return F.linear(x, self.weight().T, self.bias)


class WholeKroneckerLinear(nn.Module):
    """`x (..., dim_in) -> x W + b`, `W = sum_i A_i (x) W_i`, with a rule A (n, n, n) of its own and whole W_i.

    W_i (dim_in / n, dim_out / n) are Glorot-uniform with gain sqrt(2), A is N(0, std^2), b = 0. Both dimensions are multiples
    of n.
    """

    def __init__(self, dim_in: int, dim_out: int, n: int, std: float) -> None:
        super().__init__()
        self.rule = nn.Parameter(torch.empty(n, n, n).normal_(std=std))
        self.factors = nn.Parameter(torch.empty(n, dim_in // n, dim_out // n))
        self.bias = nn.Parameter(torch.zeros(dim_out))
        for single in self.factors.data:
            nn.init.xavier_uniform_(single, gain=GAIN)

    def weight(self) -> Tensor:
        """W (dim_in, dim_out); made anew in backward instead of kept."""
        return recomputable(kronecker_sum, self.rule, self.factors)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim_in) -> (..., dim_out)."""
        return F.linear(x, self.weight().T, self.bias)
