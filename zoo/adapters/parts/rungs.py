"""The rungs of a ladder: what stands beside each block of a frozen backbone, and the side net's way over them (LST).

    h_0 = start(x_0)        h <- side(mu h + (1 - mu) down(y)),  mu = sigmoid(alpha / T)        h (B, N, w), y (B, N, d)

Rungs are climbed several at a time. While there is no graph through the backbone, their blocks' outputs are not kept for backward
but made again there, from what entered the first of these blocks (`BlockPoint.replay`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.adapters.parts.side import Merge, SideBlock, SideNorm
from zoo.engine.second_order import exact
from zoo.errors import AttachError
from zoo.points import Point, Points
from zoo.points.recorder import Carried

__all__ = ["Rung", "Step", "Top", "Walk", "one_stream"]


@dataclass(eq=False)
class Walk:
    """The side net's way through one forward pass: its state, and the blocks since it was last brought up to date."""

    h: Tensor | None = None  # (B, N, w)
    x: Tensor | None = None  # what entered the first of `steps`
    last: Tensor | None = None  # what left the last of them
    steps: list[tuple[Step, Any]] = field(default_factory=list)  # rungs, and how their blocks run again
    outputs: list[Tensor] = field(default_factory=list)

    def climb(self) -> None:
        """Bring h up to the last block that has run."""
        steps, x, outputs = self.steps, self.x, self.outputs
        self.steps, self.outputs = [], []
        if not outputs:
            return
        frozen = not any(t is not None and t.requires_grad for t in (x, *outputs))
        part = Part(steps, outputs)
        if frozen and torch.is_grad_enabled() and not exact() and all(again is not None for _, again in steps):
            self.h = checkpoint(part, self.h, x, use_reentrant=False, preserve_rng_state=False)
        else:
            assert x is not None
            self.h = part(self.h, x)


@dataclass(eq=False)
class Part:
    """Some rungs in a row. The second time, in backward, their blocks run again, since the outputs were not kept."""

    steps: list[tuple[Step, Any]]
    outputs: list[Tensor] | None

    def __call__(self, h: Tensor | None, x: Tensor) -> Tensor | None:
        """h (B, N, w) in front (None: at the start), x (B, N, d) what entered the first block -> h behind."""
        outputs, self.outputs = self.outputs, None
        for i, (rung, again) in enumerate(self.steps):
            y = again(x) if outputs is None else outputs[i]
            h, x = rung.step(h, x, y), y
        return h


class Step(nn.Module):
    """What stands beside one block of a frozen backbone and takes a state along, several blocks at a time."""

    def __init__(self, walk: Carried, block: Point, rerun: int) -> None:
        super().__init__()
        self.walk, self.rerun, self.block = walk, rerun, block.name

    def enter(self, x: Tensor, again: Any) -> None:
        """The block begins with x (B, N, d)."""
        walk = self._further()
        if not self.rerun:
            again = None
        if again is None or x is not walk.last or len(walk.steps) >= self.rerun:
            walk.climb()
        if not walk.steps:
            walk.x = x
        walk.steps.append((self, again))

    def leave(self, y: Tensor) -> Tensor:
        """The block is done with y (B, N, d)."""
        walk = self._further()
        walk.outputs.append(y)
        walk.last = y
        if walk.steps[-1][1] is None:
            walk.climb()
        return y

    def _further(self) -> Walk:
        """The way so far, as one to be changed.

        A block that runs again in backward holds the way as it was in front of it: what is further along leads to the block's
        own output, and a graph that holds itself is never freed.
        """
        before: Any = self.walk.get()
        walk = Walk() if before is None else replace(before, steps=[*before.steps], outputs=[*before.outputs])
        self.walk.put(walk)  # type: ignore[arg-type]
        return walk

    def step(self, h: Tensor | None, x: Tensor, y: Tensor) -> Tensor | None:
        """State h in front of the block, its input x and output y -> the state behind it."""
        raise NotImplementedError


class Rung(Step):
    """What the ladder has at one block. Without `kept` the block is only passed."""

    def __init__(self, walk: Carried, block: Point, width: int, rerun: int) -> None:
        super().__init__(walk, block, rerun)
        self.start: nn.Linear | None = None
        self.merge: Merge | None = None
        self.side: SideBlock | None = None
        self.top: Top | None = None
        self.width = width

    def keep(self, inside: list[Point], dim: int, reduction: int, gate: tuple[float, float], number: int) -> None:
        """Give it its parameters; gate = (alpha, T)."""
        self.alpha, self.temperature = nn.Parameter(torch.full((1,), gate[0])), gate[1]
        self.down = nn.Linear(dim, self.width)
        self.side = SideBlock(inside, self.width, reduction, number)

    def leave(self, y: Tensor) -> Tensor:
        """The block is done with y (B, N, d)."""
        y = super().leave(y)
        return y if self.top is None else self.top(y)

    def step(self, h: Tensor | None, x: Tensor, y: Tensor) -> Tensor | None:
        """h in front of the block, its input x and output y -> h behind it."""
        if self.start is not None:
            h = self.start(x)
        if self.side is None or h is None:
            return h
        h = h if self.merge is None else self.merge(h)
        if h.shape[:-1] != y.shape[:-1]:
            raise AttachError(
                f"the ladder's state has tokens {tuple(h.shape[:-1])} at '{self.block}', and the block's output has "
                f"{tuple(y.shape[:-1])}: another adapter puts tokens in or takes some out. Switch it off."
            )
        mu = torch.sigmoid(self.alpha / self.temperature)
        return self.side(mu * h + (1 - mu) * self.down(y))


class Top(nn.Module):
    """The ladder's state becomes the tokens that the backbone's pooling reads."""

    def __init__(self, walk: Carried, width: int, dim: int, norm: Any, dropout: float, add: bool) -> None:
        super().__init__()
        self.walk, self.add = walk, add
        self.norm = SideNorm(width, norm)
        self.drop = nn.Dropout(dropout)
        self.up = nn.Linear(width, dim)

    def forward(self, y: Tensor) -> Tensor:
        """y (B, N, d), the backbone's own -> (B, N, d)."""
        walk: Any = self.walk.get()
        walk.climb()
        tokens: Tensor = self.up(self.drop(self.norm(walk.h)))
        if tokens.shape != y.shape:
            raise AttachError(
                f"the ladder ends with tokens {tuple(tokens.shape)}, the backbone with {tuple(y.shape)}: another adapter puts "
                "tokens in or takes some out. Switch it off."
            )
        return y + tokens if self.add else tokens


def one_stream(points: Points, method: str) -> list[Point]:
    """The blocks of the one sequence of tokens that a side net stands beside.

    Raises:
        AttachError: there is none, or more than one.
    """
    blocks = points.require("block", method, each_tower=True)
    points.require("attention", method)
    towers = sorted({p.tower for p in blocks})
    if len(towers) > 1:
        raise AttachError(
            f"'{method}' stands beside one sequence of tokens, and {points.backbone} has several ({', '.join(towers)}): what "
            "would run beside each, and how these would meet, is not described. Use a backbone of one tower."
        )
    if "condition" in points.kinds:
        raise AttachError(
            f"'{method}' reads tokens alone, and the blocks of {points.backbone} depend on a condition (points of kind "
            "'condition') that a side block would not know."
        )
    inside = tuple(f"{p.name}." for p in blocks)
    behind = next((p.name for p in points if p.kind == "attention" and not p.name.startswith(inside)), None)
    if behind is not None:
        raise AttachError(
            f"'{method}' ends with the tokens of the last block, and those of {points.backbone} are read by another attention "
            f"behind it ('{behind}'). Use a backbone whose blocks give its tokens."
        )
    return blocks
