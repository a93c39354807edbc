"""The two classifiers of a distilled network (DeiT): one on its class token, one on the token that learned from a teacher.

    logits = (W z_0 + b + W' z_1 + b') / 2        z_0, z_1 (B, d): the first two tokens behind the final norm

No single classifier on the mean of the tokens equals both. A head for other classes is an ordinary one on that mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from zoo.heads import Head, register_head

__all__ = ["DistilledHead"]


@register_head("distilled")
class DistilledHead(Head):
    """A linear head on each of the first two tokens, and the mean of their answers."""

    needs = ("tokens",)

    def __init__(self, in_features: int, out_features: int, **place: Any) -> None:
        super().__init__(in_features, out_features, **place)
        self.head = nn.Linear(in_features, out_features, **place)
        self.head_dist = nn.Linear(in_features, out_features, **place)

    def forward(self, outputs: Mapping[str, Any], targets: Any = None) -> Tensor:
        """ "tokens" (B, N, d) -> (B, K)."""
        tokens: Tensor = outputs["tokens"]
        return (self.head(tokens[:, 0]) + self.head_dist(tokens[:, 1])) / 2
