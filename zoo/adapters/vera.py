"""VeRA: one frozen pair of random matrices for the whole network, and two trained vectors for each projection.

Idea: the low-rank change of every projection is made from the same random A and B; what is learned is which of their
directions count, and how much of each output they reach.
Points: any `linear` points; a slice of a fused q/k/v is a point of its own.

    y = W x + b + l_b * (B (l_d * (A dropout(x))))          A (r, i), B (o, r) frozen; l_d (r,), l_b (o,) trained

A and B are drawn once, for the widest input and the widest output of all chosen points; a narrower one reads the first i columns
of A and the first o rows of B. A ~ U(-v, v), v = sqrt(6 / i_max), B ~ U(-v, v), v = sqrt(6 / r) (Kaiming), from `seed`.
l_d = 0.1 and l_b = 0, so the start is the pretrained function, to the bit (l_b moves first: the gradient of l_d is a multiple of
it).
Defaults: r = 256, on q and v, no dropout; learning rate ten times that of LoRA, as the paper has it.
Counts: r + o for each point. ViT-B/16 on q, v 24,576, ViT-L/16 61,440; on RoBERTa-base with r = 1024 43,008.
Merged: W <- W + diag(l_b) B diag(l_d) A.
Source: Kopiczko, Blankevoort, Asano, "VeRA: Vector-based Random Matrix Adaptation", ICLR 2024; their code is peft's, which draws
the same A and B from the same seed.
Deviations: dropout has one mask for all points that share their input, as there is one input. Every adapter has a pair of its
own, where peft has the second adapter of a model read the pair of the first. (adapter-hub's method of this name trains full
matrices in the place of l_d and l_b.)

A and B are saved by default; with `save_projection=False` only a few of their numbers are, by which loading makes sure that the
seed has given the same pair again.

In memory: backward needs r numbers of each token and not the input, since A is frozen; A x is formed once for the points of one
fused projection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adapters.base import Adapter
from zoo.adapters.parts.spread import spread
from zoo.engine.memory import dropped, recomputable
from zoo.errors import MismatchError
from zoo.points import LinearPoint, Points
from zoo.points.merger import Merger
from zoo.registry import register_adapter


class Projections(nn.Module):
    """A (r, dim_in) and B (dim_out, r), drawn from a seed and never trained."""

    a: Tensor
    b: Tensor
    check: Tensor

    def __init__(self, dim_in: int, dim_out: int, rank: int, seed: int, saved: bool) -> None:
        super().__init__()
        here = torch.empty(0).device
        a, b = torch.empty(rank, dim_in, device=here), torch.empty(dim_out, rank, device=here)
        if here.type != "meta":  # always drawn on the CPU in float32, so that a seed is one pair everywhere
            generator = torch.Generator("cpu").manual_seed(seed)
            for matrix in (a, b):
                bound = math.sqrt(6 / matrix.shape[1])
                drawn = torch.empty(matrix.shape, device="cpu", dtype=torch.float32)
                matrix.copy_(drawn.uniform_(-bound, bound, generator=generator))
        self.register_buffer("a", a, persistent=saved)
        self.register_buffer("b", b, persistent=saved)
        self.seed = seed
        if not saved:
            self.register_buffer("check", self._corners())

    def _corners(self) -> Tensor:
        """First and last number of A and of B, (4,)."""
        return torch.stack([m.flatten()[i] for m in (self.a, self.b) for i in (0, -1)])

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        saved = state_dict.get(f"{prefix}check")
        mine = self._corners()
        known = saved is not None and mine.device.type != "meta"
        if known and not torch.allclose(saved.to(mine), mine, rtol=1e-2 if mine.element_size() < 4 else 1e-5):
            raise MismatchError(
                f"The seed {self.seed} gives other random matrices here than where this VeRA adapter was trained, and they were "
                "not saved with it. Save it there with save_projection=True."
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class Vectors(nn.Module):
    """`x (..., dim_in) -> l_b * (B (l_d * (A dropout(x)))) (..., dim_out)`."""

    def __init__(self, pair: Projections, dim_in: int, dim_out: int, start: float, dropout: float) -> None:
        super().__init__()
        self.shared = (pair,)
        self.vera_d = nn.Parameter(torch.full((len(pair.a),), start))
        self.vera_b = nn.Parameter(torch.zeros(dim_out))
        self.drop = nn.Dropout(dropout)
        self.dim_in, self.dim_out = dim_in, dim_out

    @property
    def down(self) -> Tensor:
        """A (r, dim_in)."""
        return self.shared[0].a[:, : self.dim_in]

    @property
    def up(self) -> Tensor:
        """B (dim_out, r)."""
        return self.shared[0].b[: self.dim_out]

    def behind(self, hidden: Tensor) -> Tensor:
        """A x (..., r) -> the delta (..., dim_out)."""
        chosen = recomputable(torch.mul, hidden, self.vera_d)
        return recomputable(F.linear, chosen, self.up) * self.vera_b

    def forward(self, x: Tensor) -> Tensor:
        """The delta alone."""
        return self.behind(F.linear(dropped(x, self.drop), self.down))

    def factors(self) -> tuple[Tensor, Tensor]:
        """diag(l_d) A (r, dim_in) and diag(l_b) B (dim_out, r)."""
        return self.vera_d[:, None] * self.down, self.vera_b[:, None] * self.up

    @staticmethod
    def add_group(parts: tuple[tuple[Vectors, int, int], ...], x: Tensor, y: Tensor) -> Tensor:
        """`y[..., start:stop] + delta(x)` for all parts of one projection, which read one A x."""
        first = parts[0][0]
        hidden = F.linear(dropped(x, first.drop), first.down)
        return spread(y, ((start, stop, part.behind(hidden)) for part, start, stop in parts))


@register_adapter("vera")
@dataclass
class VeRA(Adapter):
    """Vector-based random matrix adaptation.

    Args:
        rank: r, rows of A and columns of B.
        targets: roles or names of linear points; "all-linear" is q, k, v, o, in, out, gate, up, down. The default is `in` on a
            backbone without attention.
        d_init: where the trained factors l_d start.
        dropout: on the input, while training.
        seed: of A and B.
        save_projection: write A and B into the file, too; otherwise they are drawn anew when it is loaded.
    """

    rank: int = 256
    targets: str | tuple[str, ...] = ("q", "v")
    d_init: float = 0.1
    dropout: float = 0.0
    seed: int = 0
    save_projection: bool = True

    default_lr = 1e-2
    paper = "Kopiczko, Blankevoort and Asano 2024"
    taxonomy = "reparametrised"
    trial = {"rank": 6, "targets": "all-linear"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.rank >= 1, f"rank is {self.rank}; expected 1 or more.")
        self.check(self.d_init != 0, "d_init is 0; with l_b at 0 as well, neither would ever get a gradient.")
        self.check(0 <= self.dropout < 1, f"dropout is {self.dropout}; expected 0 <= dropout < 1.")
        self.check(0 <= self.seed < 2**63, f"seed is {self.seed}; expected 0 to 2^63 - 1.")

    def attach(self, points: Points) -> None:
        """One pair for all selected points, and two vectors at each."""
        points.require("linear", "vera")
        chosen = self.selected(points)
        if not chosen:
            return  # the model refuses what adds nothing
        widths = max(p.dim_in for p in chosen), max(p.dim_out for p in chosen)
        pair = points.share("projections", Projections(*widths, self.rank, self.seed, self.save_projection))
        for point in chosen:
            point.add(Vectors(pair, point.dim_in, point.dim_out, float(self.d_init), self.dropout))

    def selected(self, points: Points) -> list[LinearPoint]:
        """The target points."""
        return points.linears(self.targets, VeRA.targets)  # type: ignore[arg-type]

    @classmethod
    def of_size(cls, size: int) -> dict[str, Any] | None:
        """By its rank, up to the largest of the paper: beyond, the frozen pair costs more than the network itself."""
        return {"rank": size} if size <= 1024 else None

    def low_rank(self, points: Points) -> dict[str, tuple[Tensor, Tensor]] | None:
        """A and B with the vectors in them."""
        parts = {point.name: self.module_at(point) for point in self.selected(points)}
        return {name: tuple(f.detach() for f in part.factors()) for name, part in parts.items()}  # type: ignore[misc]

    def merge(self, merger: Merger) -> None:
        """W <- W + diag(l_b) B diag(l_d) A."""
        for point in self.selected(merger.points):
            down, up = self.module_at(point).factors()
            merger.add_weight(point, up @ down)
