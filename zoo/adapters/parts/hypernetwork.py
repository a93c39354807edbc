"""Hypernetworks: weights of bottlenecks as linear maps of embeddings (Karimi Mahabadi et al. 2021)."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

STD = 0.01  # of every matrix here; biases start at 0


class Weights(NamedTuple):
    """A bottleneck with a LayerNorm behind it: of one point, or of P points with one more axis in front."""

    down: Tensor  # (b, d)
    down_bias: Tensor  # (b,)
    up: Tensor  # (d, b)
    up_bias: Tensor  # (d,)
    norm: Tensor  # (d,)
    norm_bias: Tensor  # (d,)

    def points(self) -> list[Weights]:
        """Of P points together: each by itself. One backward gathers them again."""
        return [Weights(*single) for single in zip(*(t.unbind(0) for t in self), strict=True)]


def linear(dim_in: int, dim_out: int) -> nn.Linear:
    """A linear map that starts at N(0, 0.01^2)."""
    layer = nn.Linear(dim_in, dim_out)
    nn.init.normal_(layer.weight, std=STD)
    nn.init.zeros_(layer.bias)
    return layer


class Projector(nn.Module):
    """`e = LN(W_2 relu(W_1 [z_1; z_2; ...] + b_1) + b_2)`: (P, width) -> (P, projected)."""

    def __init__(self, width: int, hidden: int, projected: int) -> None:
        super().__init__()
        self.into = linear(width, hidden)
        self.out = linear(hidden, projected)
        self.norm = nn.LayerNorm(projected, eps=1e-6)

    def forward(self, rows: Tensor) -> Tensor:
        """(P, width) -> (P, projected)."""
        return self.norm(self.out(self.into(rows).relu()))


class BottleneckMaker(nn.Module):
    """Makes a bottleneck d -> b -> d and its LayerNorm from an embedding, by one linear map for each tensor.

    Count: (p + 1) (2 d b + b + d + 2 d) for embeddings of width p.
    """

    def __init__(self, embedding: int, dim: int, bottleneck: int) -> None:
        super().__init__()
        self.dim, self.bottleneck = dim, bottleneck
        self.down = linear(embedding, bottleneck * dim)
        self.down_bias = linear(embedding, bottleneck)
        self.up = linear(embedding, dim * bottleneck)
        self.up_bias = linear(embedding, dim)
        self.scale = linear(embedding, dim)
        self.shift = linear(embedding, dim)

    def forward(self, embeddings: Tensor) -> Weights:
        """(P, p) -> the weights of P points."""
        return Weights(
            self.down(embeddings).unflatten(-1, (self.bottleneck, self.dim)),
            self.down_bias(embeddings),
            self.up(embeddings).unflatten(-1, (self.dim, self.bottleneck)),
            self.up_bias(embeddings),
            self.scale(embeddings),
            self.shift(embeddings),
        )


def normed(x: Tensor, weights: Weights) -> Tensor:
    """The LayerNorm of a bottleneck: (..., d) -> (..., d)."""
    return F.layer_norm(x, x.shape[-1:], weights.norm, weights.norm_bias)
