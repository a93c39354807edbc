"""A projection of which single entries, the bias and a structured module are tuned (for `vision.adapters.spt`).

    y = (W + scatter(delta)) x + b + scatter(delta_b)        then        y + B A drop(x)   or   y + adapter(drop(y))

How the entries are computed is told in `zoo.adapters.parts.entries`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from zoo.adapters.parts.entries import Entries
from zoo.adapters.parts.low_rank import LowRank
from zoo.engine.memory import recomputable
from zoo.points import LinearPoint

Part = tuple["Tuned", int, int]


class Tuned(Entries):
    """What is tuned at one projection, or at one slice of a fused one; all slices are computed together."""

    structured: nn.Module | None

    def __init__(
        self,
        point: LinearPoint,
        structured: nn.Module | None,
        indices: dict[str, Tensor],
        whole_bias: bool,
        dropout: float,
        drop_path: float,
    ) -> None:
        super().__init__(point, indices, whole_bias)
        self.structured = structured
        self.drop, self.path = nn.Dropout(dropout), nn.Dropout(drop_path)

    @staticmethod
    def linear_group(  # type: ignore[override]
        parts: tuple[Part, ...], run: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """x (..., i) -> (..., o)."""
        y = Entries.tuned(parts, run, x, weight, bias)
        built = [(m, m.structured, a, b) for m, a, b in parts if m.structured is not None]
        if not built:
            return y
        if isinstance(built[0][1], LowRank):
            first = built[0][0]
            return LowRank.add_group(tuple((s, a, b) for _, s, a, b in built), first.thinned(x), y)  # type: ignore[misc]
        pieces, at_row = [], 0
        for m, bottleneck, a, b in built:
            change = bottleneck(m.drop(y[..., a:b]))
            images = change.new_ones(change.shape[0], *[1] * (change.dim() - 1))
            pieces += [y[..., at_row:a], y[..., a:b] + change * m.path(images)]
            at_row = b
        return torch.cat([*pieces, y[..., at_row:]], dim=-1)

    def thinned(self, x: Tensor) -> Tensor:
        """x with some values and some whole images dropped; kept for backward as a mask of one byte each."""
        if not self.training or self.drop.p == self.path.p == 0:
            return x
        keep = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - self.drop.p)
        if self.path.p:
            images = torch.empty(x.shape[0], *[1] * (x.dim() - 1), dtype=torch.bool, device=x.device)
            keep &= images.bernoulli_(1 - self.path.p)
        return recomputable(_masked, x, keep, 1 / ((1 - self.drop.p) * (1 - self.path.p)))

    def change(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The change of the weight or bias as a dense tensor, in float32."""
        if name == "weight" and isinstance(self.structured, LowRank):
            return self.structured.delta().detach().float()
        return super().change(name, shape)


def _masked(x: Tensor, keep: Tensor, scale: float) -> Tensor:
    return (x * keep).mul_(scale)
