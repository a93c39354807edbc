"""A head that embeds: of metric learning, where what counts is how near two items are."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.heads.base import register_head

__all__ = ["EmbeddingHead"]


@register_head("embedding")
class EmbeddingHead(nn.Module):
    """`z = l / |l|`, `l = W LN(x) + b`: pooled features (B, d) to points on a sphere, (B, e). W Xavier-uniform, b = 0.

    `out_features` is e, the width of the embedding; it has no classes.
    """

    own_start = True  # its initial values are its own

    def __init__(self, in_features: int, out_features: int, **place: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.norm = nn.LayerNorm(in_features, **place)
        self.linear = nn.Linear(in_features, out_features, **place)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, d) -> (B, e), each of length 1."""
        return F.normalize(self.linear(self.norm(x)), dim=-1)

    def extra_repr(self) -> str:
        """Both widths."""
        return f"in_features={self.in_features}, out_features={self.out_features}"
