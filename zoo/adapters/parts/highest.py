"""The highest of many numbers that lie in several tensors, with the same answer for ties on every device and process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["highest"]


def highest(scores: Sequence[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest scores, highest first: number of the candidate (n,), position in it (n,), both int32.

    Equal scores come in the order of the candidates, so the choice does not depend on the device. Takes memory for about
    3 * `count` scores besides the given ones. With several processes all take what the first one found.
    """
    device = scores[0].device
    value = torch.empty(0, device=device)
    owner = place = torch.empty(0, dtype=torch.int32, device=device)
    floor: Tensor | None = None  # the lowest of `count` known scores; what only equals it comes behind it
    for i, score in enumerate(scores):
        index = torch.arange(len(score), device=device) if floor is None else (score > floor).nonzero().flatten()
        value = torch.cat([value, score[index]])
        owner = torch.cat([owner, torch.full((len(index),), i, dtype=torch.int32, device=device)])
        place = torch.cat([place, index.to(torch.int32)])
        if len(value) >= 2 * count or i == len(scores) - 1:
            order = value.argsort(descending=True, stable=True)[:count]
            value, owner, place = value[order], owner[order], place[order]
            floor = value[-1] if len(value) == count else None
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(owner, 0)
        dist.broadcast(place, 0)
    return owner, place
