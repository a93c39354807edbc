"""Changes of some slices of a projection's output."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["spread"]


def spread(y: Tensor, changes: Iterable[tuple[int, int, Tensor]]) -> Tensor:
    """`y[..., start:stop] + change` for all (start, stop, change), in rising order, in one sum; y (..., o) stays as it is."""
    pieces: list[Tensor] = []
    at = 0
    for start, stop, change in changes:
        if start > at:
            pieces.append(y.new_zeros(*y.shape[:-1], start - at))
        pieces.append(change.to(y.dtype))
        at = stop
    if at < y.shape[-1]:
        pieces.append(y.new_zeros(*y.shape[:-1], y.shape[-1] - at))
    return y + (pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1))
