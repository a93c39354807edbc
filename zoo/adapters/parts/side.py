"""Narrow copies of a backbone's blocks, for networks that run beside it.

A side block of width w is a pre-norm transformer block built from what the points of a block say: its number of heads, whether
projections have biases, the width of its MLP, its norm, and the window of its attention.

    x <- x + proj(attention(norm1(x)))        x <- x + fc2(gelu(fc1(norm2(x))))        x (B, N, w), or (B, H, W, w) in windows

Norms and activations are recomputed in backward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.engine.memory import recomputable
from zoo.errors import AttachError
from zoo.points import Point

__all__ = ["Merge", "SideBlock", "SideNorm"]


class SideNorm(nn.Module):
    """A norm of width w of the kind of the backbone's: LayerNorm, or RMSNorm where that has no shift."""

    def __init__(self, width: int, like: Any) -> None:
        super().__init__()
        self.eps = float(getattr(like, "eps", None) or getattr(like, "variance_epsilon", None) or 1e-6)
        self.weight = nn.Parameter(torch.ones(width))
        shifts = getattr(like, "bias", None) is not None
        self.bias = nn.Parameter(torch.zeros(width)) if shifts else None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., w)."""
        if self.bias is None:
            return recomputable(_rms, x, self.weight, self.eps)
        return recomputable(_layer_norm, x, self.weight, self.bias, self.eps)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


class SideBlock(nn.Module):
    """Block of width `width`, at a `reduction`-th of a backbone's block, of which `inside` are the points.

    Raises:
        AttachError: the block has no queries or no MLP among its points.
    """

    def __init__(self, inside: Sequence[Point], width: int, reduction: int, number: int) -> None:
        super().__init__()
        q: Any = _first(inside, "linear", "q")
        up: Any = _first(inside, "linear", "up")
        attention: Any = _first(inside, "attention", None)
        norms = [p for p in inside if p.kind == "norm"]
        bias, hidden = q.bias is not None, max(up.dim_out // reduction, 1)
        self.heads = math.gcd(attention.num_heads, width)
        window = attention.window
        self.window = 0 if window is None else math.isqrt(window)
        self.shift = self.window // 2 if number % 2 else 0
        self.norm1 = SideNorm(width, norms[0].module)
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width, bias=bias)
        self.norm2 = SideNorm(width, norms[-1].module)
        self.fc1 = nn.Linear(width, hidden, bias=up.bias is not None)
        self.fc2 = nn.Linear(hidden, width, bias=up.bias is not None)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, w) or (B, H, W, w), the same back."""
        x = x + self.attend(self.norm1(x))
        return x + self.fc2(recomputable(F.gelu, self.fc1(self.norm2(x))))

    def attend(self, x: Tensor) -> Tensor:
        """Attention over all tokens, or within windows, which every second block shifts by half of one (around the edges)."""
        if x.dim() == 3 or not self.window:
            return self._attention(x.flatten(1, -2)).view(x.shape)
        side, (_, height, width, _) = self.window, x.shape
        x = torch.roll(x, (-self.shift, -self.shift), (1, 2)) if self.shift else x
        x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
        rows = x.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)  # (B, a, b, side, side, w)
        y = self._attention(rows.flatten(3, 4).flatten(0, 2)).view(rows.shape)
        y = y.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :height, :width]
        return torch.roll(y, (self.shift, self.shift), (1, 2)) if self.shift else y

    def _attention(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Merge(nn.Module):
    """(B, f H, f W, v) -> (B, H, W, w): neighbours are joined, as between the stages of a hierarchical backbone."""

    def __init__(self, before: int, width: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.reduction = nn.Linear(factor * factor * before, width)

    def forward(self, h: Tensor) -> Tensor:
        """An odd edge is filled up with zeros. Tokens in one row, (B, N, v), are those of a square map."""
        if h.dim() == 3:
            side = math.isqrt(h.shape[1])
            return self.forward(h.unflatten(1, (side, side))).flatten(1, 2)
        f, (_, height, width, _) = self.factor, h.shape
        h = F.pad(h, (0, 0, 0, -width % f, 0, -height % f))
        h = h.unflatten(2, (-1, f)).unflatten(1, (-1, f)).transpose(2, 3)
        return self.reduction(h.flatten(3))


def _first(points: Sequence[Point], kind: str, role: str | None) -> Point:
    found = next((p for p in points if p.kind == kind and (role is None or p.role == role)), None)
    if found is None:
        raise AttachError(f"a side block is built like a transformer block, and this one has no {role or kind} point.")
    return found
