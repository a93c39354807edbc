"""Convpass: convolutional bypasses, bottlenecks beside both sublayers whose middle is a 3 x 3 convolution over the patches.

Idea: a transformer knows nothing of neighbouring patches that it was not taught; a few trained convolutions beside the frozen
sublayers bring that knowledge, which small data sets cannot teach.
Points: `sublayer` (verb `parallel`), attn and mlp, each with a bypass of its own that reads what the sublayer reads:

    y = F(x) + s (W_up dropout(f(K * f(W_down x + b_down) + c)) + b_up)      x (B, N, d), f(z) = z sigmoid(1.702 z)

W_down (h, d), K (h, h, 3, 3) over the grid of patches with a border of zeros, W_up (d, h). A class token or another one in
front of the patches is a map of its own of one place: it meets the middle of K alone.

Defaults: h = 8, s = 1 (theirs is chosen for each task from .01 ... 100), dropout 0.1, both sublayers; `targets="attn"` is their
"convpass_attn". W_down Xavier-uniform, biases 0, W_up = 0, so the start is the pretrained function, to the bit; K starts as the
identity (its middle is 1, all else 0) or, `conv="xavier"`, Xavier-uniform. AdamW, 1e-3, weight decay 1e-4.
Counts: 2 d h + 9 h^2 + 2 h + d for each; ViT-B/16 at h = 8: 13,648, for 24 of them 327,552, on attn alone 163,776.
Source: Jie and Deng, "Convolutional Bypasses Are Better Vision Transformer Adapters", 2022 (JieShibo/PETL-ViT,
`convpass/vtab/convpass.py`).
Deviations: the width and the grid are the network's; theirs are 768 and 14 x 14, and their identity is of 8 channels whatever h.
The bypass has no stochastic depth of its own (theirs is dropped apart from its sublayer): frozen blocks run without it here.

In memory: backward needs x, which the norm keeps anyway, and the h numbers in front of each f; their f are computed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import Adapter, Merger, Points, register_adapter
from zoo.engine.memory import dropped, recomputable
from zoo.errors import AttachError, MergeError
from zoo.points.layout import Layout

SLOPE = 1.702


def quick_gelu(x: Tensor) -> Tensor:
    """z sigmoid(1.702 z), by one function that keeps one tensor."""
    return F.silu(SLOPE * x) / SLOPE


class Bypass(nn.Module):
    """x (B, N, d) or (B, H, W, d) -> s * W_up f(K * f(W_down x)), of the same shape.

    `grid`: (H, W) of the patches in a sequence, which come last, behind `prefix` other tokens.
    """

    def __init__(
        self, dim: int, rank: int, where: str, grid: tuple[int, int], prefix: int, scale: float, dropout: float
    ) -> None:
        super().__init__()
        self.down = nn.Linear(dim, rank)
        self.conv = nn.Conv2d(rank, rank, 3, padding=1)
        self.up = nn.Linear(rank, dim)
        self.drop = nn.Dropout(dropout)
        self.where, self.grid, self.prefix, self.scale = where, grid, prefix, scale
        nn.init.xavier_uniform_(self.down.weight)
        for zero in (self.down.bias, self.conv.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)  # type: ignore[arg-type]

    def start(self, conv: str) -> Bypass:
        """K as the identity or Xavier-uniform."""
        if conv == "xavier":
            nn.init.xavier_uniform_(self.conv.weight)
        else:
            nn.init.dirac_(self.conv.weight)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the sublayer's output."""
        hidden = recomputable(quick_gelu, self.down(x))
        hidden = dropped(recomputable(quick_gelu, self.neighbours(hidden)), self.drop)
        return self.scale * self.up(hidden)

    def neighbours(self, hidden: Tensor) -> Tensor:
        """K over the patches, (..., h) -> (..., h) of the same shape."""
        if hidden.dim() == 4:  # (B, H, W, h)
            return self.conv(hidden.movedim(-1, 1)).movedim(1, -1)  # type: ignore[no-any-return]
        if hidden.shape[1] != self.prefix + self.grid[0] * self.grid[1]:
            raise AttachError(
                f"'convpass' at '{self.where}' got {hidden.shape[1]} tokens and expects {self.prefix} + {self.grid[0]} x "
                f"{self.grid[1]}: an image of another size, or another adapter that puts tokens in or takes some out. Switch "
                "that off, or load the backbone for this size."
            )
        front, patches = hidden[:, : self.prefix], hidden[:, self.prefix :]
        patches = self.conv(patches.transpose(1, 2).unflatten(2, self.grid)).flatten(2).transpose(1, 2)
        if not self.prefix:
            return patches
        alone = F.linear(front, self.conv.weight[:, :, 1, 1], self.conv.bias)
        return torch.cat([alone, patches], dim=1)


@register_adapter("convpass")
@dataclass
class Convpass(Adapter):
    """Convolutional bypasses.

    Args:
        rank: h. scale: s. dropout: in front of W_up, while training.
        conv: how K starts, "identity" or "xavier".
        targets: roles or names of sublayer points.
    """

    rank: int = 8
    scale: float = 1.0
    dropout: float = 0.1
    conv: Literal["identity", "xavier"] = "identity"
    targets: str | tuple[str, ...] = ("attn", "mlp")

    default_lr = 1e-3
    default_weight_decay = 1e-4
    paper = "Jie and Deng 2022"
    taxonomy = "additive"
    merges = False
    trial = {"rank": 2, "dropout": 0.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.rank >= 1, f"rank is {self.rank}; expected 1 or more.")
        self.check(self.scale != 0, "scale is 0; the bypass could never do anything.")
        self.check(0 <= self.dropout < 1, f"dropout is {self.dropout}; expected 0 <= dropout < 1.")
        self.check(self.conv in ("identity", "xavier"), f"conv is {self.conv!r}; expected 'identity' or 'xavier'.")

    def attach(self, points: Points) -> None:
        """A bypass beside every selected sublayer."""
        points.require("sublayer", "convpass")
        targets = self.targets
        if targets == Convpass.targets:  # a backbone may have only one of them, or a mixer in the attention's place
            targets = tuple(r for r in ("attn", "mixer", "mlp") if r in points.roles("sublayer")) or targets
        for point in points.select(targets, kind="sublayer"):
            grid, prefix = _patches(points, point.name, point.layout)
            made = Bypass(point.dim_out, self.rank, point.name, grid, prefix, self.scale, self.dropout)
            point.parallel(made.start(self.conv))

    def merge(self, merger: Merger) -> None:
        """Never.

        Raises:
            MergeError: always.
        """
        raise MergeError(
            "'convpass' cannot be merged: its convolutions are a network of their own beside the sublayers, not a change of the "
            "weights. Keep the model as it is, or use a method that can be merged: lora, fact, repadapter, ssf."
        )


def _patches(points: Points, name: str, layout: Layout | None) -> tuple[tuple[int, int], int]:
    """The grid of the patches at a point, and the number of tokens in front of them.

    Raises:
        AttachError: they are no grid of two axes, or it is not described how they stand.
    """
    if layout is not None and len(layout.grid) == 2:
        return (layout.grid[0], layout.grid[1]), layout.prefix
    known = "is not described" if layout is None else "depends on the input" if not layout.grid else "is another one"
    raise AttachError(
        f"'convpass' needs the patches row by row in a grid of two axes, and the order of the tokens of {points.backbone} at "
        f"'{name}' {known}. Name other targets, or use a backbone of images of one size, such as a ViT or Swin."
    )
