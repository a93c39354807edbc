"""Convpass: convolutional bypasses, bottlenecks beside both sublayers whose middle is a 3 x 3 convolution over the patches.

Idea: a transformer knows nothing of neighbouring patches that it was not taught; a few trained convolutions beside the frozen
sublayers bring that knowledge, which small data sets cannot teach.
Points: `sublayer` (verb `parallel`), attn and mlp, each with a bypass of its own that reads what the sublayer reads:

    y = F(x) + s (W_up dropout(f(K * f(W_down x + b_down) + c)) + b_up)      x (B, N, d), f(z) = z sigmoid(1.702 z)

W_down (h, d), K (h, h, 3, 3) over the grid of patches with a border of zeros, W_up (d, h). A class token or another one in
front of the patches is a map of its own of one place: it meets the middle of K alone. Where a sublayer sees windows cut out of
the map (SAM), K stays inside of each.

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

import torch.nn.functional as F
from torch import Tensor, nn

from vision.adapters.parts.patches import Patches, patches_at
from zoo import Adapter, Points, register_adapter
from zoo.adapters.parts.bottleneck import quick_gelu
from zoo.engine.memory import dropped, recomputable


class Bypass(nn.Module):
    """x (B, N, d) or (B, H, W, d) -> s * W_up f(K * f(W_down x)), of the same shape; `patches`: where the patches stand."""

    def __init__(self, dim: int, rank: int, patches: Patches, scale: float, dropout: float) -> None:
        super().__init__()
        self.down = nn.Linear(dim, rank)
        self.conv = nn.Conv2d(rank, rank, 3, padding=1)
        self.up = nn.Linear(rank, dim)
        self.drop = nn.Dropout(dropout)
        self.patches, self.scale = patches, scale
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
        hidden = self.patches.convolve(hidden, self.conv, self.alone)
        return self.scale * self.up(dropped(recomputable(quick_gelu, hidden), self.drop))

    def alone(self, hidden: Tensor) -> Tensor:
        """K over a map of one place, for each token (B, n, h)."""
        return F.linear(hidden, self.conv.weight[:, :, 1, 1], self.conv.bias)


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
    unmerged = (
        "its convolutions are a network of their own beside the sublayers, not a change of the weights. Keep the model as it "
        "is, or use a method that can be merged: lora, fact, repadapter, ssf."
    )
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
        for point in points.sublayers(self.targets, Convpass.targets):  # type: ignore[arg-type]
            patches = patches_at(points, "convpass", point.name, point.layout)
            point.parallel(Bypass(point.dim_out, self.rank, patches, self.scale, self.dropout).start(self.conv))
