"""FacT: one pair of factors for all projections of the network, and a small core for each.

Idea: the changes of all W are redundant across layers, too. Cut into d x d slices (q, k, v, o one each, up and down four) they
are one tensor, whose decomposition has the two large factors U and V once for the whole network.
Points: `linear`, by default q, k, v, o, up, down (in, out, gate where a backbone has those).

    y = W x + b + s * V dropout(K_j^T U x)            U (r, d), V (d, r), core K_j (r, r) of slice j of J
    up (4d, d):    K (r, 4r), K^T U x is read as 4 vectors of r, each through V
    down (d, 4d):  x is read as 4 vectors of d, each through U, and K (r, 4r) takes the 4r numbers to r
    "tt":  every K is a parameter (tensor train)
    "tk":  K_j = sum_k C[:, :, k] P[k, j]             C (r, r, r), P (r, J) (Tucker)

Defaults: "tk", r = 32 ("tt": 16), s = 1 (theirs is chosen for each task from .01 ... 100), dropout 0.1. V = 0, so the start
is the pretrained function, to the bit; U and the cores as `nn.Linear`'s weights, C and P Xavier-uniform. AdamW, 1e-3, weight
decay 1e-4.
Counts: 2 d r + J r^2 (tt), 2 d r + J r + r^3 (tk); ViT-B/16 (J = 144) at r = 8, 16, 32: tt 21,504, 61,440, 196,608; tk
13,952, 30,976, 86,528.
Source: Jie and Deng, "FacT: Factor-Tuning for Lightweight Adaptation on Vision Transformer", AAAI 2023 (JieShibo/PETL-ViT,
`FacT/fact_tt.py`, `fact_tk.py`).
Deviations: none on ViT. In "tk" the four slices of up (and of down) are read from C P as their code reads them, (r, r, 4)
reshaped to (r, 4r), which mixes the columns of a core with its slices; the equation has them apart, with the same counts.
Theirs is for one width: here every width of a tower (the stages of Swin) has factors of its own, and a projection whose
widths are no multiples of each other is one slice of a group of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import Adapter, LinearPoint, Merger, Points, register_adapter


class Factors(nn.Module):
    """What the slices of one width have in common: U (r, dim_in), V (dim_out, r), and for "tk" C (r, r, r), P (r, J)."""

    def __init__(self, dim_in: int, dim_out: int, rank: int, columns: int) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.empty(rank, dim_in))
        self.v = nn.Parameter(torch.zeros(dim_out, rank))
        nn.init.kaiming_uniform_(self.u, a=math.sqrt(5))
        if columns:
            self.c = nn.Parameter(nn.init.xavier_uniform_(torch.empty(rank, rank, rank)))
            self.p = nn.Parameter(nn.init.xavier_uniform_(torch.empty(rank, columns)))

    def core(self, first: int, count: int) -> Tensor:
        """K (r, count * r) of the slices from column `first` of P."""
        return (self.c @ self.p[:, first : first + count]).flatten(1)


class Core(nn.Module):
    """x (..., dim_in) -> s V dropout(K^T U x), (..., dim_out), for one projection of `count` slices.

    `wide`: the side on which the slices lie, "out" (up) or "in" (down). `first`: its first column of P; None: K is its own.
    """

    def __init__(
        self, factors: Factors, count: int, wide: str, first: int | None, scale: float, dropout: float
    ) -> None:
        super().__init__()
        self.shared = (factors,)
        self.count, self.wide, self.first, self.scale = count, wide, first, scale
        self.drop = nn.Dropout(dropout)
        if first is None:
            rank = len(factors.u)
            bound = 1 / math.sqrt(count * rank if wide == "in" else rank)  # that of nn.Linear
            self.core = nn.Parameter(torch.empty(rank, count * rank).uniform_(-bound, bound))

    def kernel(self) -> Tensor:
        """K (r, count * r)."""
        return self.core if self.first is None else self.shared[0].core(self.first, self.count)

    def forward(self, x: Tensor) -> Tensor:
        """The delta alone."""
        u, v, kernel = self.shared[0].u, self.shared[0].v, self.kernel()
        if self.wide == "in":
            hidden = F.linear(x.unflatten(-1, (self.count, -1)), u).flatten(-2)
            return self.scale * F.linear(self.drop(F.linear(hidden, kernel)), v)
        hidden = self.drop(F.linear(F.linear(x, u), kernel.T)).unflatten(-1, (self.count, -1))
        return self.scale * F.linear(hidden, v).flatten(-2)

    def delta(self) -> Tensor:
        """The change of W (dim_out, dim_in)."""
        u, v, kernel = self.shared[0].u, self.shared[0].v, self.kernel().unflatten(-1, (self.count, -1))
        if self.wide == "in":
            return self.scale * torch.einsum("oa,asn,ni->osi", v, kernel, u).flatten(1)
        return self.scale * torch.einsum("on,asn,ai->soi", v, kernel, u).flatten(0, 1)

    @staticmethod
    def add_group(parts: tuple[tuple[Core, int, int], ...], x: Tensor, y: Tensor) -> Tensor:
        """`y[..., start:stop] + delta(x)` for all parts of one projection at once."""
        pieces, at = [], 0
        for module, start, stop in parts:
            if start > at:
                pieces.append(y.new_zeros(*y.shape[:-1], start - at))
            pieces.append(module(x).to(y.dtype))
            at = stop
        if at < y.shape[-1]:
            pieces.append(y.new_zeros(*y.shape[:-1], y.shape[-1] - at))
        return y + (pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1))


@register_adapter("fact")
@dataclass
class FacT(Adapter):
    """Factor-tuning.

    Args:
        form: "tk" (Tucker) or "tt" (tensor train). rank: r; None is 32 for "tk" and 16 for "tt".
        scale: s. dropout: between core and V, while training.
        targets: roles or names of linear points; "all-linear" is q, k, v, o, in, out, gate, up and down, those that there are.
    """

    form: Literal["tk", "tt"] = "tk"
    rank: int | None = None
    scale: float = 1.0
    dropout: float = 0.1
    targets: str | tuple[str, ...] = "all-linear"

    default_lr = 1e-3
    default_weight_decay = 1e-4
    paper = "Jie and Deng 2023"
    taxonomy = "reparametrised"
    trial = {"rank": 2, "dropout": 0.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.form in ("tk", "tt"), f"form is {self.form!r}; expected 'tk' or 'tt'.")
        self.check(self.rank is None or self.rank >= 1, f"rank is {self.rank}; expected 1 or more.")
        self.check(self.scale > 0, f"scale is {self.scale}; expected more than 0.")
        self.check(0 <= self.dropout < 1, f"dropout is {self.dropout}; expected 0 <= dropout < 1.")

    def attach(self, points: Points) -> None:
        """Factors for each width of a tower, and a core at every selected linear point."""
        points.require("linear", "fact")
        rank = self.rank or (32 if self.form == "tk" else 16)
        groups: dict[tuple[str, int, int], list[tuple[LinearPoint, int, str]]] = {}
        for point in points.linears(self.targets):
            dim_in, dim_out, count, wide = _slices(point)
            groups.setdefault((point.tower, dim_in, dim_out), []).append((point, count, wide))
        for (tower, dim_in, dim_out), members in groups.items():
            columns = sum(count for _, count, _ in members) if self.form == "tk" else 0
            width = str(dim_in) if dim_in == dim_out else f"{dim_in}x{dim_out}"
            name = "_".join(filter(None, ("factors", tower.replace(".", "_"), width)))
            factors = points.share(name, Factors(dim_in, dim_out, rank, columns))
            first = 0
            for point, count, wide in members:
                column = first if self.form == "tk" else None
                point.add(Core(factors, count, wide, column, self.scale, self.dropout))
                first += count

    def merge(self, merger: Merger) -> None:
        """W <- W + s V K^T U, slice by slice."""
        for point in merger.points.linears(self.targets):
            merger.add_weight(point, self.module_at(point).delta())


def _slices(point: LinearPoint) -> tuple[int, int, int, str]:
    """(width in, width out) of the slices of a projection, how many there are, and on which side they lie."""
    dim_in, dim_out = point.dim_in, point.dim_out
    if dim_out % dim_in == 0:
        return dim_in, dim_in, dim_out // dim_in, "out"
    if dim_in % dim_out == 0:
        return dim_out, dim_out, dim_in // dim_out, "in"
    return dim_in, dim_out, 1, "out"
