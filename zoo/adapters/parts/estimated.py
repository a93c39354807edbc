"""A projection with a low-rank change and coefficients on its input, whose change is measured while it trains (Light-PEFT).

y = W (c x) + b + s B A drop(c x)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adapters.parts.gates import Gates
from zoo.adapters.parts.low_rank import add_low_rank
from zoo.engine.memory import dropped

__all__ = ["Estimated"]

Part = tuple["Estimated", int, int]


class Estimated(Gates):
    """A projection with a low-rank change, or coefficients on its input, or both; the change is measured while it trains."""

    module_score: Tensor
    rank_score: Tensor
    now: Tensor

    def __init__(self, dim_in: int, dim_out: int, rank: int, scale: float, dropout: float, count: int) -> None:
        super().__init__(dim_in, count or 1)
        if not count:
            self.gate = None  # type: ignore[assignment]
        self.low_rank = scale if rank else 0.0
        self.drop = nn.Dropout(dropout)
        self.measuring = False
        if rank:
            self.lora_a = nn.Parameter(torch.empty(rank, dim_in))
            self.lora_b = nn.Parameter(torch.zeros(dim_out, rank))
            nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
            self.register_buffer("module_score", torch.zeros(2))  # sum, and of how many steps
            self.register_buffer("rank_score", torch.zeros(rank))
            self.register_buffer("now", torch.zeros(2), persistent=False)  # of the step: sum, and of how many passes

    def delta(self) -> Tensor:
        """s B A (dim_out, dim_in)."""
        return self.low_rank * (self.lora_b @ self.lora_a)

    @staticmethod
    def linear_group(
        parts: tuple[Part, ...], run: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """x (..., i) -> (..., o)."""
        first = parts[0][0]
        if first.gate is not None:  # a whole projection
            x = first(x)
        y = run(x, weight, bias)
        if not (low := [part for part in parts if part[0].low_rank]):
            return y
        x = dropped(x, low[0][0].drop)
        for part, start, stop in low:
            if part.measuring and part.training:
                part.measure(x.detach(), y.detach()[..., start:stop])
        slices = tuple((start, stop, part.low_rank) for part, start, stop in low)
        return add_low_rank(x, y, slices, [f for part, _, _ in low for f in (part.lora_a, part.lora_b)])

    @torch.no_grad()
    def measure(self, x: Tensor, y: Tensor) -> None:
        """||s B A x|| / ||y||, its mean over the tokens of a pass; ||B h||^2 is h^T (B^T B) h, with r numbers of a token."""
        with torch.autocast(x.device.type, enabled=False):
            a, b = self.lora_a.float(), self.lora_b.float()
            h = F.linear(x.float(), a)
            square = ((h @ (b.T @ b)) * h).sum(-1).clamp_min(0)
            ratio = abs(self.low_rank) * (square / y.float().square().sum(-1)).sqrt().mean()
            self.now += torch.stack([ratio.nan_to_num(0.0, 0.0, 0.0), torch.ones_like(ratio)])

    @torch.no_grad()
    def close_step(self) -> None:
        """Behind a backward pass: take the step's scores in."""
        if self.now[1] > 0:
            self.module_score += torch.stack([self.now[0] / self.now[1], torch.ones_like(self.now[0])])
        self.now.zero_()
        found = torch.zeros_like(self.rank_score)
        for factor, dim in ((self.lora_a, 1), (self.lora_b, 0)):
            if factor.grad is not None:
                found += (factor * factor.grad).mean(dim).abs()
        self.rank_score += found.nan_to_num(0.0, 0.0, 0.0)
