"""Partial-k: fine-tune the last blocks and the norm behind them.

Idea: early layers carry over, late ones are the task's; so the last k blocks are trained whole, all in front of them is frozen.
Points: `block`, and the `norm` points behind the last block. Equations: theta <- theta + d theta for these modules.
Defaults: k = 1 ("Partial-1" of the tables). Counts: ViT-B/16 7,087,872 k + 1,536.
Source: Yosinski, Clune, Bengio, Lipson, "How transferable are features in deep neural networks?", 2014; as a baseline in Jia et
al., "Visual Prompt Tuning", 2022 (KMnP/vpt, "partial-1": the last layer and the encoder's norm).
Deviations: none. On a backbone in stages the blocks are counted from the end, whatever their stage; what merges tokens between
two stages stays frozen. With several towers these are the last blocks of each.
While active, trainable copies stand in the place of the backbone's parameters. Saved keys are the library's names under
`backbone.`.

In memory: no graph runs through the frozen blocks in front.
"""

from __future__ import annotations

from dataclasses import dataclass

from zoo.adapters.base import Adapter
from zoo.points import Point, Points
from zoo.points.merger import Merger
from zoo.registry import register_adapter


@register_adapter("partial")
@dataclass
class Partial(Adapter):
    """Train the last blocks.

    Args:
        k: how many.
    """

    k: int = 1

    default_lr = 5e-5
    paper = "Yosinski et al. 2014; Jia et al. 2022"
    taxonomy = "selective"
    sums = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.k >= 1, f"k is {self.k}; expected 1 or more.")

    def attach(self, points: Points) -> None:
        """Put a trainable copy of every parameter of these blocks and norms in its place."""
        blocks: list[Point] = points.require("block", "partial", each_tower=True)
        chosen: list[Point] = []
        for tower in dict.fromkeys(p.tower for p in blocks):
            own = [p for p in points if p.tower == tower]
            mine = [p for p in own if p.kind == "block"]
            self.check(self.k <= len(mine), f"k is {self.k}; {points.backbone} has {len(mine)} blocks.")
            behind = own[own.index(mine[-1]) + 1 :]
            chosen += [*mine[-self.k :], *(p for p in behind if p.kind == "norm" and p.block is None)]
        points.train_everything(within=chosen)

    def merge(self, merger: Merger) -> None:
        """The trained values are in the merged copy already."""
