"""DTL and DTL+: a thin side path collects from the frozen blocks and gives back to the later ones alone.

Idea: what is learned is kept apart from the backbone and joins it only in its second half, so the first half needs no backward
pass, and what is kept for backward shrinks with it.
Points: `block` (verb `replay`: a block's input and output, and the block once more).

    h <- h + B_i A_i x_i               in front of block i of `layers`, h_0 = 0        x_i (B, N, d), A_i (r, d), B_i (d, r)
    y_i <- y_i + phi(h)                behind block i of `add_after`         phi(z) = z sigmoid(beta z), beta = 100
    "dtl+": y_i <- y_i + G * phi(h)    G (d, 1, k, k), a convolution channel by channel over the grid of patches, one for all
                                       blocks of a width; tokens in front of the patches pass it by

Defaults: r = 2, all blocks collect, the second half of them gives back; on a backbone in stages the last two of these collect
(their Swin-B: blocks 4-23 and 14-23, r = 4), each from h = 0. A Kaiming-uniform(a = sqrt 5), B = 0, so the start is the
pretrained function, to the bit, also with G, which starts as torch's convolutions. AdamW, 1e-4 ... 1e-2 for each task (mostly
8e-3), weight decay 0.05.
Counts: 2 d r for each block, G d k^2; ViT-B/16 36,864, with G of 3 x 3 43,776; Swin-B, r = 4: 90,112.
Source: Fu, Zhu, Wu, "DTL: Disentangled Transfer Learning for Visual Recognition", AAAI 2024 (heekhero/DTL,
`models/vision_transformer.py`, `swin_transformer.py`).
Deviations: none in the side path. Theirs averages the patches in front of the last norm; here the family pools as it does without
it (a ViT of timm with global_pool="avg" as theirs). Their grid is 14 x 14, and a second token in front loses its place in it.
Their Swin has an idle G for the stages that give nothing back; there is none here.

In memory: h and phi(h) are computed again from the r numbers A_i x_i of each block. In front of the first addition no graph runs
through the backbone: of each `rerun` blocks the input alone is kept, and they run once more in backward for what A_i reads.
Behind it the frozen blocks carry gradients: each runs again from its input. In time that is one further forward pass, for the
same gradients. ViT-B/16, of what full fine-tuning keeps: 0.083 (rerun 3), 0.485 (rerun 0). Beside other active adapters every
x_i is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision.adapters.parts.patches import Patches, patches_at
from zoo import Adapter, BlockPoint, Points, register_adapter
from zoo.adapters.parts.rungs import Step, one_stream
from zoo.engine.memory import recomputable
from zoo.errors import AttachError
from zoo.points.recorder import Carried


class Fusion(nn.Module):
    """G: a convolution over patches, channel by channel, with a border of zeros."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=False)


class Side(Step):
    """What the side path has at one block: it collects (`a`, `b`), gives back (`adds`), or both.

    The state along the blocks is z (B, N, r n), the numbers A_i x_i of the n blocks that have collected; `collected` are these.
    """

    def __init__(self, walk: Carried, block: BlockPoint, rank: int, rerun: int) -> None:
        super().__init__(walk, block, rerun)
        if rank:
            self.a = nn.Parameter(torch.empty(rank, block.dim_in))
            self.b = nn.Parameter(torch.zeros(block.dim_in, rank))
            nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.collects, self.adds = rank > 0, False
        self.patches: Patches | None = None

    def give(self, collected: tuple[Side, ...], beta: float, patches: Patches | None, conv: tuple[Fusion, ...]) -> None:
        """Let it give back what these have collected (itself among them, or not)."""
        self.adds, self.beta, self.patches = True, beta, patches
        self.collected = collected
        self.shared = (*(side for side in collected if side is not self), *conv)

    def step(self, h: Tensor | None, x: Tensor, y: Tensor) -> Tensor | None:
        """z in front of the block, its input x -> z behind it."""
        if not self.collects:
            return h
        hidden = F.linear(x, self.a)
        if h is None:
            return hidden
        if h.shape[:-1] != x.shape[:-1]:
            raise AttachError(self._moved(h, x))
        return torch.cat([h, hidden], dim=-1)

    def leave(self, y: Tensor) -> Tensor:
        """The block's output, with what is given back."""
        y = super().leave(y)
        if not self.adds:
            return y
        walk: Any = self.walk.get()
        walk.climb()
        if walk.h.shape[:-1] != y.shape[:-1]:
            raise AttachError(self._moved(walk.h, y))
        h = recomputable(F.linear, walk.h, recomputable(_beside, *(side.b for side in self.collected)))
        act = recomputable(_soft, recomputable(_sharp, h, self.beta), self.beta)
        if self.patches is not None:
            act = self.patches.convolve(act, self.shared[-1].conv, lambda front: front)  # type: ignore[operator,arg-type]
        return y + act.to(y.dtype)

    def _moved(self, h: Tensor, tokens: Tensor) -> str:
        return (
            f"the side path has tokens {tuple(h.shape[:-1])} at '{self.block}', and the block has {tuple(tokens.shape[:-1])}: "
            "another adapter puts tokens in or takes some out. Switch it off."
        )


def _beside(*matrices: Tensor) -> Tensor:
    return torch.cat(matrices, dim=1)


def _sharp(h: Tensor, beta: float) -> Tensor:
    """beta h, in single precision at least: half precision ends at 65,504, and what is beyond comes back from no sigmoid."""
    return beta * (h.float() if h.element_size() < 4 else h)


def _soft(t: Tensor, beta: float) -> Tensor:
    return F.silu(t) / beta


@register_adapter("dtl")
@dataclass
class DTL(Adapter):
    """Disentangled transfer learning.

    Args:
        rank: r. beta: of phi.
        layers: numbers of the blocks that collect, from 0 and in forward order; None: all, in stages those of the last two.
        add_after: of the blocks that give back; None: the second half of `layers`.
        fusion: width and height of G, an odd number; 0: without.
        rerun: how many of the first blocks run again together in backward, the later ones each by itself; 0 keeps what they need.
    """

    rank: int = 2
    beta: float = 100.0
    layers: tuple[int, ...] | None = None
    add_after: tuple[int, ...] | None = None
    fusion: int = 0
    rerun: int = 3

    default_lr = 1e-3
    default_weight_decay = 0.05
    paper = "Fu, Zhu and Wu 2024"
    taxonomy = "additive"
    merges = False
    unmerged = (
        "its side path is a network of its own beside the blocks. Keep the model as it is, or use a method that can be merged: "
        "lora, fact, repadapter, ssf."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.rank >= 1, f"rank is {self.rank}; expected 1 or more.")
        self.check(self.rerun >= 0, f"rerun is {self.rerun}; expected 0 (keep what the blocks need) or more.")
        self.check(self.beta > 0, f"beta is {self.beta}; expected more than 0.")
        self.check(
            self.fusion == 0 or (self.fusion > 0 and self.fusion % 2 == 1),
            f"fusion is {self.fusion}; expected 0 (without), or an odd number.",
        )
        for name in ("layers", "add_after"):
            chosen = getattr(self, name)
            self.check(chosen is None or len(chosen) > 0, f"{name} is empty; name blocks, or leave it out.")

    def attach(self, points: Points) -> None:
        """The side path along the blocks."""
        blocks: Any = one_stream(points, self.method)
        collect, give = self._chosen(points, blocks)
        convs: dict[int, Fusion] = {}
        before: list[Side] = []
        stage = blocks[0].stage
        for i, block in enumerate(blocks):
            if block.stage != stage:
                stage, before = block.stage, []
            carried = points.carried("side" if stage is None else f"side{stage}")
            side = Side(carried, block, self.rank if i in collect else 0, self.rerun)
            before = [*before, side] if i in collect else before
            if i in give:
                self.check(
                    bool(before), f"block {i} gives back before any block of its stage has collected; mend `layers`."
                )
                self._give(points, side, block, tuple(before), convs)
            if before and i <= max(give):
                block.replay(side, changes=i in give)
        behind = tuple(block.name for block in blocks[give[0] + 1 :])
        self.__dict__["reruns"] = behind if self.rerun else ()

    def _give(
        self, points: Points, side: Side, block: BlockPoint, before: tuple[Side, ...], convs: dict[int, Fusion]
    ) -> None:
        if not self.fusion:
            return side.give(before, self.beta, None, ())
        if block.dim_out not in convs:
            convs[block.dim_out] = points.share(f"fusion_{block.dim_out}", Fusion(block.dim_out, self.fusion))
        patches = patches_at(points, self.method, block.name, block.layout)
        return side.give(before, self.beta, patches, (convs[block.dim_out],))

    def _chosen(self, points: Points, blocks: list[BlockPoint]) -> tuple[list[int], list[int]]:
        """Numbers of the blocks that collect and of those that give back, in order."""
        stages = sorted({p.stage for p in blocks if p.stage is not None})
        collect = [i for i, p in enumerate(blocks) if p.stage is None or p.stage in stages[-2:]]
        collect = collect if self.layers is None else sorted(set(self.layers))
        give = collect[len(collect) // 2 :] if self.add_after is None else sorted(set(self.add_after))
        for name, chosen in (("layers", collect), ("add_after", give)):
            for i in chosen:
                inside = 0 <= i < len(blocks)
                self.check(inside, f"{name} is {tuple(chosen)}; {points.backbone} has blocks 0 to {len(blocks) - 1}.")
                if blocks[i].dim_in != blocks[i].dim_out:
                    raise AttachError(
                        f"'{self.method}' adds to a block's output what it collects of inputs, and '{blocks[i].name}' of "
                        f"{points.backbone} changes their width. Leave block {i} out of `layers` and `add_after`."
                    )
        idle = [i for i in collect if not any(j >= i and blocks[j].stage == blocks[i].stage for j in give)]
        self.check(
            self.layers is None or not idle,
            f"block {idle[:1]} collects for none of its stage that gives back; mend `layers`.",
        )
        return [i for i in collect if i not in idle], give


@register_adapter("dtl+")
@dataclass
class DTLPlus(DTL):
    """Disentangled transfer learning with a convolution over what is given back."""

    fusion: int = 3

    trial = {"add_after": (0,)}  # what the last block alone gives to patches, no class token would see
