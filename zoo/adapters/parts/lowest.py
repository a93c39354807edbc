"""The smallest of many scores that lie in several tensors, for pruning."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["lowest"]


def lowest(scores: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Masks of the shapes of `scores`, false for the smallest of all together: round(share * all) of them.

    Equal scores go in the order of the tensors, so the choice does not depend on the device.
    """
    if not scores:
        return {}
    pool = torch.cat([s.detach().float().flatten() for s in scores.values()])
    gone = round(share * len(pool))
    stays = torch.ones(len(pool), dtype=torch.bool, device=pool.device)
    if gone:
        floor = pool.kthvalue(gone).values
        below = pool < floor
        stays[below] = False
        equal = (pool == floor).nonzero()[:, 0]
        stays[equal[: gone - int(below.sum())]] = False
    pieces = stays.split([s.numel() for s in scores.values()])
    return {name: piece.view_as(score) for (name, score), piece in zip(scores.items(), pieces)}
