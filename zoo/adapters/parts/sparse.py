"""A weight of which a constant number of entries is there, and these can be exchanged for others (`zoo.adapters.dsl`).

W <- M . (W + D)          M (o, i) of 0 and 1; D on the entries of M alone, (n,) in their order
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from zoo.adapters.parts.lowest import smallest
from zoo.engine.memory import recomputable
from zoo.errors import MismatchError

__all__ = ["Sparse", "sparse"]


def sparse(weight: Tensor, delta: Tensor, mask: Tensor) -> Tensor:
    """M . (W + D)."""
    change = torch.zeros_like(weight, dtype=delta.dtype).masked_scatter(mask, delta)
    return torch.where(mask, weight + change, 0)


class Sparse(nn.Module):
    """W (o, i) -> M . (W + D) (o, i)."""

    mask: Tensor

    def __init__(self, mask: Tensor, count: int) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(count, device=mask.device))  # in the order of the entries of M
        self.register_buffer("mask", mask)
        self.probe: Tensor | None = None  # zeros (o, i), whose gradient is that of W'
        self.seen: Tensor | None = None  # the W that came in

    def watch(self, on: bool) -> None:
        """Keep the dense gradient from now on, or no more."""
        self.probe = torch.zeros_like(self.mask, dtype=self.delta.dtype).requires_grad_() if on else None
        self.seen = None

    def forward(self, weight: Tensor) -> Tensor:
        """M . (W + D)."""
        new = recomputable(sparse, weight, self.delta, self.mask)
        if self.probe is None:
            return new
        self.seen = weight.detach()
        return new + self.probe

    def train(self, mode: bool = True) -> Sparse:
        """As torch's; an evaluation watches nothing, also behind a fit that broke off."""
        if not mode:
            self.watch(False)
        return super().train(mode)

    @torch.no_grad()
    def update(self, ratio: float, weight: Tensor, gradient: Tensor) -> Tensor | None:
        """Drop ceil(ratio n) entries and grow as many, for the W that comes in and dL/dW' (o, i).

        Returns where each entry stood before among the n, -1 for those that are new; None if nothing can move.
        """
        count = math.ceil(ratio * len(self.delta))
        if count == 0 or len(self.delta) == self.mask.numel():
            return None
        weight = weight.to(self.delta)
        values = weight[self.mask] + self.delta
        kept = self.mask.masked_scatter(self.mask, ~smallest(values.abs(), count))
        # no gradient is below 0, so what is kept comes behind all others
        new = kept | smallest(-gradient.abs().masked_fill(kept, -1.0), count)
        place = torch.where(self.mask & new, self.mask.flatten().cumsum(0).view(new.shape) - 1, -1)
        source = place[new]
        self.delta.copy_(torch.where(source >= 0, self.delta[source.clamp(min=0)], -weight[new]))
        self.mask.copy_(new)
        return source

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        mask = state.get(f"{prefix}mask")
        if mask is not None and not mask.is_meta and int(mask.sum()) != len(self.delta):
            raise MismatchError(
                f"'{prefix}mask' has {int(mask.sum()):,} ones and {len(self.delta):,} weights belong to it. Take the adapter as "
                "it was saved."
            )
        super()._load_from_state_dict(state, prefix, *args)
