"""LoRA: a low-rank change of projections; also rsLoRA and DoRA.

Idea: `W` (o, i) stays frozen, its change is a product of two thin matrices.
Points: any `linear` points; a slice of a fused q/k/v is a point of its own, a convolution is the matrix that it is (`convolved`).

    y = W x + b + s * B A dropout(x)        A (r, i), B (o, r), s = alpha / r   (rsLoRA: s = alpha / sqrt(r))

A ~ Kaiming-uniform(a = sqrt 5), B = 0, so the start is the pretrained function, to the bit. With `dora=True` (DoRA) direction
and length of each output row are trained apart: with V = W + s B A,

    y = m / ||V||_row * (V x) + b           m (o,), started at ||W||_row; the norm is not differentiated through

Defaults: r = 8, alpha = 8 (s = 1), on q and v, no dropout. Counts: r * (i + o) for each point; ViT-B/16 on q, v 294,912, on
q, k, v, o 589,824, on all six 1,327,104.
Source: Hu et al. 2021 (LoRA; microsoft/LoRA), Kalajdzievski 2023 (rsLoRA), Liu et al. 2024 (DoRA; NVlabs/DoRA).
Deviations: one dropout mask for all points that share their input (q, k, v of a fused projection), as there is one input.

In memory: backward needs x and the r numbers of A x. The points of one fused projection are computed together, and their
products are added into the projection's output in place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.adapters.base import Adapter
from zoo.adapters.parts.convolved import ConvLowRank
from zoo.adapters.parts.low_rank import LowRank, check_rank
from zoo.adapters.parts.starting import of_rank
from zoo.engine.second_order import surrogate, whole
from zoo.errors import AttachError
from zoo.points import LinearPoint, Points
from zoo.points.merger import Merger
from zoo.points.rows import is_conv
from zoo.registry import register_adapter


class DoRAWeight(nn.Module):
    """`W (o, i) -> m * (W + s B A) / ||W + s B A||_row`."""

    def __init__(self, frozen: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        dim_out, dim_in = frozen.shape
        self.lora_a = nn.Parameter(torch.empty(rank, dim_in))
        self.lora_b = nn.Parameter(torch.zeros(dim_out, rank))
        self.magnitude = nn.Parameter(frozen.norm(dim=1))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        """The reparametrized weight; the row norm is a constant for the gradient, as in the paper (section 4.3).

        Not so where derivatives of any order are asked for: a gradient with a constant in it has no derivative.
        """
        moved = weight + self.scale * (self.lora_b @ self.lora_a)
        # m / ||V|| is formed first: at the start it is exactly 1, so the pretrained function is kept to the bit.
        if whole("the row norm of DoRA"):
            return (self.magnitude / moved.norm(dim=1))[:, None] * moved
        return surrogate((self.magnitude / moved.detach().norm(dim=1))[:, None] * moved)


@register_adapter("lora")
@dataclass
class LoRA(Adapter):
    """Low-rank adaptation.

    Args:
        rank: r; more than the widest target's change can have is refused (but not of a saved adapter, or one of peft's).
        alpha: numerator of the scale; None sets it to the rank, so that the scale is 1.
        targets: roles or names of linear points; "all-linear" is q, k, v, o, in, out, gate, up, down. The default is `in` on a
            backbone without attention.
        dropout: on the input, while training.
        rslora: scale alpha / sqrt(r) instead of alpha / r.
        dora: train length and direction of the rows apart (no dropout).
        learn_scale: train s, one number for each point, from its value (LAE).
        ranks, alphas: other values at some points, by selector: `ranks={"v": 16, "blocks.0.attn.*": 4}`; a later entry wins.
    """

    rank: int = 8
    alpha: float | None = None
    targets: str | tuple[str, ...] = ("q", "v")
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    ranks: dict[str, int] | None = None
    alphas: dict[str, float] | None = None
    learn_scale: bool = False

    later = ("learn_scale",)
    translated = ("rank", "ranks", "alpha", "alphas", "rslora")
    default_lr = 1e-3
    paper = "Hu et al. 2021; Kalajdzievski 2023; Liu et al. 2024"
    looks_back = True
    taxonomy = "reparametrised"
    trial = {"rank": 2, "targets": "all-linear"}

    def __post_init__(self) -> None:
        super().__post_init__()
        for rank in (self.rank, *(self.ranks or {}).values()):
            self.check(type(rank) is int and rank >= 1, f"rank is {rank!r}; expected 1 or more.")
        for alpha in (*([] if self.alpha is None else [self.alpha]), *(self.alphas or {}).values()):
            self.check(type(alpha) in (int, float), f"alpha is {alpha!r}; expected a number.")
            self.check(alpha != 0, "alpha is 0; what is learned is multiplied by it, so it could never act.")
        self.check(0 <= self.dropout < 1, f"dropout is {self.dropout}; expected 0 <= dropout < 1.")
        self.check(
            not (self.dora and self.dropout), "DoRA changes the weight itself; dropout on its input is not defined."
        )
        self.check(not (self.dora and self.learn_scale), "DoRA trains the length of each row; learn_scale is for LoRA.")

    @property
    def scale(self) -> float:
        """s of the equations, where `ranks` and `alphas` name no other."""
        return self._scale(self.rank, self.alpha)

    def _scale(self, rank: int, alpha: float | None) -> float:
        return (rank if alpha is None else alpha) / (math.sqrt(rank) if self.rslora else rank)

    def attach(self, points: Points) -> None:
        """Add a low-rank delta at every selected linear point."""
        points.require("linear", "lora")
        check_rank(self, ((point, rank) for point, rank, _ in self.shapes(points)))
        for point, rank, scale in self.shapes(points):
            if is_conv(point.module) and not self.dora:
                self.check_groups(point)
                made = ConvLowRank(point.module, point.dim_out, rank, scale, self.dropout, self.learn_scale)
                point.add(made)
            elif self.dora:
                point.reparametrize(DoRAWeight(point.weight, rank, scale))
            else:
                point.add(LowRank(point.dim_in, point.dim_out, rank, scale, self.dropout, self.learn_scale))

    def check_groups(self, point: LinearPoint) -> None:
        """Raise AttachError for a grouped convolution: its weight is not one matrix of what goes in and comes out."""
        if point.module.groups > 1:  # type: ignore[operator]
            raise AttachError(
                f"point '{point.name}' is a convolution of {point.module.groups} groups, whose weight is no matrix from all "
                "channels to all channels: a low-rank change is not defined there. Leave it out of the targets."
            )

    def shapes(self, points: Points) -> list[tuple[LinearPoint, int, float]]:
        """The target points, with rank and scale of each."""
        selected = self.selected(points)
        ranks = self._by_point("ranks", points, selected)
        alphas = self._by_point("alphas", points, selected)
        at = [(point, int(ranks.get(point.name, self.rank))) for point in selected]
        return [(point, rank, self._scale(rank, alphas.get(point.name, self.alpha))) for point, rank in at]

    def _by_point(self, setting: str, points: Points, selected: list[LinearPoint]) -> dict[str, float]:
        """`ranks` or `alphas` as names of points -> value; an entry that concerns no target is an error."""
        found: dict[str, float] = {}
        targets = {p.name for p in selected}
        for key, value in (getattr(self, setting) or {}).items():
            names = targets.intersection(p.name for p in points.select(key, kind="linear"))
            self.check(bool(names), f"'{key}' of {setting} names no target; the targets are {self.targets!r}.")
            found |= dict.fromkeys(names, value)
        return found

    def selected(self, points: Points) -> list[LinearPoint]:
        """The target points; "all-linear" takes those of q, k, v, o, in, out, gate, up and down that the backbone has."""
        return points.linears(self.targets, LoRA.targets)  # type: ignore[arg-type]

    def low_rank(self, points: Points) -> dict[str, tuple[Tensor, Tensor]] | None:
        """A, and B with the scale in it; of DoRA, whose rows have a length of their own, None."""
        if self.dora:
            return None
        parts = {point.name: self.module_at(point) for point in self.selected(points)}
        return {n: (p.lora_a.detach(), (p.scale * p.scaled_b()).detach()) for n, p in parts.items()}

    def started(self, source: Adapter, tensors: dict[str, Tensor], points: Points) -> dict[str, Tensor]:
        """The change `s B A` of the source at this rank and scale: see `zoo.adapters.parts.starting.of_rank`."""
        assert isinstance(source, LoRA)
        own, theirs = self.state_dict(), {point.name: scale for point, _, scale in source.shapes(points)}
        for point, _, scale in self.shapes(points):
            names = (f"{point.name}.lora_a", f"{point.name}.lora_b")
            if not all(name in tensors for name in names) or point.name not in theirs:
                continue  # not at the same points: who fills says so
            a, b = of_rank(tensors[names[0]], tensors[names[1]], len(own[names[0]]), own[names[0]].cpu())
            ratio = 1.0 if self.learn_scale else theirs[point.name] / scale
            tensors |= {names[0]: a, names[1]: b if ratio == 1.0 else ratio * b}
        return tensors

    def merge(self, merger: Merger) -> None:
        """W <- W + s B A, or the DoRA weight."""
        for point in self.selected(merger.points):
            part = self.module_at(point)
            learned: Any = getattr(part, "lora_scale", None)
            change: Tensor = part.scale * (part.lora_b @ part.lora_a)  # type: ignore[operator]
            change = change if learned is None else learned * change
            if self.dora:
                moved = merger.weight(point) + change
                merger.set_weight(point, (part.magnitude / moved.norm(dim=1))[:, None] * moved)  # type: ignore[operator]
            else:
                merger.add_weight(point, change)
