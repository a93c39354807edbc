"""The smallest of many scores, in one tensor or in several, for pruning; equal ones go in their order, on every device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["lowest", "smallest"]


def smallest(scores: Tensor, count: int) -> Tensor:
    """True for the `count` smallest scores; shaped like `scores`. By the `count`-th score, without an order of all of them."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    last = scores.flatten().kthvalue(count).values
    below = scores < last
    equal = (scores == last).flatten().nonzero()[:, 0]
    below.view(-1)[equal[: count - int(below.sum())]] = True
    return below


def lowest(scores: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Masks of the shapes of `scores`, false for the smallest of all together: round(share * all) of them.

    Equal scores go in the order of the tensors, so the choice does not depend on the device.
    """
    if not scores:
        return {}
    pool = torch.cat([s.detach().float().flatten() for s in scores.values()])
    stays = ~smallest(pool, round(share * len(pool)))
    pieces = stays.split([s.numel() for s in scores.values()])
    return {name: piece.view_as(score) for (name, score), piece in zip(scores.items(), pieces)}
