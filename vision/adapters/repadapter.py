"""RepAdapter: a linear bottleneck in front of each sublayer, folded into the projections that read it.

Idea: an adapter without a nonlinearity in front of a projection is a change of that projection: trained apart, then gone.
Points: `sublayer` (verb `before`), attn and mlp, each with an adapter of its own behind the norm:

    x <- x + s (B dropout(A x + a) + b)              x (..., d), A (h, d), B (d, h) of g blocks: rows j d/g ... of B read the
                                                     hidden numbers j h/g ... alone, so that it has d h / g numbers

Defaults: h = 8, g = 2, s = 1 (theirs is chosen for each task from .1, .5, 1, 5, 10), dropout 0.1, both sublayers. A
Xavier-uniform, B = 0, a = b = 0, so the start is the pretrained function, to the bit. AdamW, 1e-3, weight decay 1e-4.
Merged, into each projection W, c that reads the sublayer's input (q, k and v; up and gate):

    W <- W + s W B A        c <- c + s W (B a + b)

Counts: d h + h + d h / g + d for each; ViT-B/16: 9,992, for 24 of them 239,808; without biases (`bias=False`) 221,184; in
front of attn alone 119,904.
Source: Luo, Huang, Zhou, Sun, Jiang, Wang, Ji, "Towards Efficient Visual Adaption via Structural Re-parameterization", 2023
(luogen1996/RepAdapter, `repadapter.py`).
Deviations: none on ViT and Swin. Their blocks of ConvNeXt have the first adapter in front of a convolution by channels, which no
merge can take in, and the second fed with tokens that it reads as a map; here the one of the MLP stands behind the norm.
Where a projection has no bias to take b in, merging is refused (a key's is left out where no softmax can tell); so it is where
windows are filled up with zeros behind the adapter, which see no b.

In memory: backward needs x, which the norm gives back, and the h hidden numbers; what is handed on is computed again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import Adapter, Merger, Points, register_adapter
from zoo.engine.memory import dropped, recomputable


class LinearAdapter(nn.Module):
    """x (..., d) -> x + s (B dropout(A x + a) + b)."""

    def __init__(self, dim: int, rank: int, groups: int, scale: float, dropout: float, bias: bool) -> None:
        super().__init__()
        self.down = nn.Linear(dim, rank, bias=bias)
        self.up = nn.Parameter(torch.zeros(dim, rank // groups))
        self.shift = nn.Parameter(torch.zeros(dim)) if bias else None
        self.drop = nn.Dropout(dropout)
        self.groups, self.scale = groups, scale
        nn.init.xavier_uniform_(self.down.weight)
        if bias:
            nn.init.zeros_(self.down.bias)

    def dense(self) -> Tensor:
        """B (d, h), with its zeros."""
        return self.up if self.groups == 1 else torch.block_diag(*self.up.chunk(self.groups))

    def forward(self, x: Tensor) -> Tensor:
        """What the sublayer reads."""
        hidden = dropped(self.down(x), self.drop)
        return recomputable(_moved, x, hidden, self.dense(), self.shift, self.scale)

    def change(self) -> tuple[Tensor, Tensor | None]:
        """s B A (d, d) and s (B a + b) (d,): x <- x + s B A x + s (B a + b)."""
        dense = self.dense()
        delta = self.scale * (dense @ self.down.weight)
        return delta, None if self.shift is None else self.scale * (dense @ self.down.bias + self.shift)


def _moved(x: Tensor, hidden: Tensor, up: Tensor, shift: Tensor | None, scale: float) -> Tensor:
    return x + scale * F.linear(hidden, up, shift)


@register_adapter("repadapter")
@dataclass
class RepAdapter(Adapter):
    """Linear adapters in front of sublayers.

    Args:
        rank: h. groups: g, blocks of B; it divides h and d. scale: s. dropout: on the h numbers, while training.
        bias: a and b. targets: roles or names of sublayer points.
    """

    rank: int = 8
    groups: int = 2
    scale: float = 1.0
    dropout: float = 0.1
    bias: bool = True
    targets: str | tuple[str, ...] = ("attn", "mlp")

    default_lr = 1e-3
    default_weight_decay = 1e-4
    paper = "Luo et al. 2023"
    taxonomy = "reparametrised"
    trial = {"rank": 4, "dropout": 0.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.rank >= 1, f"rank is {self.rank}; expected 1 or more.")
        self.check(self.groups >= 1, f"groups is {self.groups}; expected 1 or more.")
        self.check(
            self.rank % self.groups == 0, f"{self.groups} groups cannot share a rank of {self.rank}; give a multiple."
        )
        self.check(self.scale != 0, "scale is 0; the adapter could never do anything.")
        self.check(0 <= self.dropout < 1, f"dropout is {self.dropout}; expected 0 <= dropout < 1.")

    def attach(self, points: Points) -> None:
        """One in front of every selected sublayer."""
        points.require("sublayer", "repadapter")
        for point in self.selected(points):
            dim = point.dim_in
            self.check(
                dim % self.groups == 0, f"{self.groups} groups cannot share the {dim} channels at '{point.name}'."
            )
            point.before(LinearAdapter(dim, self.rank, self.groups, self.scale, self.dropout, self.bias))

    def selected(self, points: Points) -> list:  # type: ignore[type-arg]
        """The target points; by default attn and mlp, or what there is of them."""
        return points.sublayers(self.targets, RepAdapter.targets)  # type: ignore[arg-type]

    def merge(self, merger: Merger) -> None:
        """W <- W + s W B A and c <- c + s W (B a + b) in what reads each sublayer's input."""
        for point in self.selected(merger.points):
            merger.before(point, *self.module_at(point).change())
