"""LoReFT: edit what passes between blocks, inside of a small subspace that is learned.

Idea: instead of weights, representations are changed. At some tokens of each block's output the part that lies in an
r-dimensional subspace is replaced by a linear function of the whole.
Points: `block` (verb `after`), all blocks.

    loreft    h + R^T (W h + b - R h)          R (r, d) with orthonormal rows, W (r, d), b (r,)
    direft    h + R^T (W h + b)                the same without taking out what was there
    noreft    h + P^T (W h + b - P h)          P (r, d) any matrix: the ablation of R's orthonormality
    nodireft  h + P^T (W h + b)

h (d,) is a token behind a block. `positions=n` changes the first n tokens only, in a ViT the class token, registers and then
patches; in maps (Swin) the first n places row by row. The same W, b, R serve all tokens of a block ("tied").

R stays orthonormal without any projection step: it is made from r Householder reflections, R^T = H_1 ... H_r [1; 0],
H_j = 1 - 2 v_j v_j^T / |v_j|^2, of which the vectors v_j = (0, ..., 0, 1, x_{j+1 j}, ...) are trained. With V = [v_1 ... v_r]
that is one small triangular system (the compact WY form):

    R^T = [1; 0] - V T V_r^T          T^-1 = strict upper part of V^T V + half of its diagonal;  V_r the first r rows of V

`init="identity"` starts at W = R (direft: W = 0), b = 0: the pretrained function, to the bit. `init="random"` is the authors'
start, W and b as of `nn.Linear`, which changes the features at once. R starts as a random orthonormal matrix (P as of
`nn.Linear`).
Defaults: r = 8, all tokens, no dropout, no weight decay (the authors choose r, positions and layers for each task).
Counts: 2 r d + r for each block, of which r (r + 1) / 2 (the triangle of R that orthonormality fixes) never move. ViT-B/16: r = 1
18,444, r = 8 147,552.
Source: Wu et al., "ReFT: Representation Finetuning for Language Models", NeurIPS 2024; stanfordnlp/pyreft, whose equations and
names these are.
Deviations: the start, see above. The authors' R is torch's orthogonal parametrisation, whose coordinates hang on a random (d, d)
matrix; here they are the reflections themselves, for the same R, W, b, outputs and gradients with respect to R. (Theirs takes
the signs of its rows from the whole part of trained numbers, which weight decay turns into zeros.) NoReFT has a second bias
there, which only adds to b. Positions at the beginning and the end of a prompt that a decoder goes on from (their prefix and
suffix) are left out: such a text has padding in front, and grows; all of its tokens can be changed.
Dropout, as theirs, is on the whole of what leaves, h included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adapters.base import Adapter
from zoo.errors import ConfigError
from zoo.points import BlockPoint, Points
from zoo.registry import register_adapter

FORMS = {"loreft": (True, True), "direft": (True, False), "noreft": (False, True), "nodireft": (False, False)}


def orthonormal(x: Tensor) -> Tensor:
    """Vectors of r reflections, the part of x (d, r) below its diagonal -> R (r, d) with orthonormal rows."""
    rank = x.shape[1]
    with torch.autocast(x.device.type, enabled=False):  # in half precision the rows would be orthonormal to two digits
        unit = torch.eye(len(x), rank, dtype=x.dtype, device=x.device)
        v = x.tril(-1) + unit
        gram = v.T @ v
        inverse = gram.triu(1) + torch.diag_embed(gram.diagonal() / 2)
        return (unit - v @ torch.linalg.solve_triangular(inverse, v[:rank].T, upper=True)).T


class Intervention(nn.Module):
    """`(x, y) -> y` with the tokens y (B, ..., d) of a block's output changed; x, its input, is not looked at."""

    def __init__(
        self, dim: int, rank: int, form: str, positions: int | None, identity: bool, dropout: float, name: str = ""
    ) -> None:
        super().__init__()
        self.orthogonal, self.subtract = FORMS[form]
        self.positions, self.name = positions, name
        rows = torch.empty(dim, rank) if self.orthogonal else torch.empty(rank, dim)
        if rows.device.type != "meta":
            if self.orthogonal:  # the reflections that make a random matrix triangular
                rows = torch.geqrf(rows.normal_())[0].tril(-1)
            else:
                nn.init.kaiming_uniform_(rows, a=math.sqrt(5))
        self.reft_r = nn.Parameter(rows)
        self.reft_source = nn.Linear(dim, rank)
        if identity:
            nn.init.zeros_(self.reft_source.bias)
            nn.init.zeros_(self.reft_source.weight)
            if self.subtract and rows.device.type != "meta":
                with torch.no_grad():
                    self.reft_source.weight.copy_(self.basis())
        self.drop = nn.Dropout(dropout)

    def basis(self) -> Tensor:
        """R or P (r, d)."""
        return orthonormal(self.reft_r) if self.orthogonal else self.reft_r

    def _apply(self, fn: object, recurse: bool = True) -> Intervention:
        """Cast or moved, R may be made with other last digits: W = R of the start remains so."""
        weight = self.reft_source.weight
        start = self.subtract and weight.device.type != "meta" and torch.equal(weight, self.basis())
        super()._apply(fn, recurse)
        if start and self.reft_source.weight.device.type != "meta":
            with torch.no_grad():
                self.reft_source.weight.copy_(self.basis())
        return self

    def edit(self, h: Tensor) -> Tensor:
        """h (..., d) -> what stands in its place."""
        rows = self.basis()
        weight = self.reft_source.weight
        moved = F.linear(h, weight - rows if self.subtract else weight, self.reft_source.bias)
        return self.drop(h + F.linear(moved, rows.T).to(h.dtype))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y with its first `positions` tokens edited, or all."""
        if self.positions is None:
            return self.edit(y)
        if y.dim() < 3:
            raise ConfigError(
                f"loreft: behind '{self.name}' the tokens of all samples are one sequence, so the first of each are not known. "
                "Take positions=None, which changes all, or leave these blocks out of the targets."
            )
        tokens = y.flatten(1, -2)
        if tokens.shape[1] < self.positions:
            raise ConfigError(
                f"loreft: positions is {self.positions}, and behind '{self.name}' there are {tokens.shape[1]} tokens. Expected "
                "at most as many, or None for all."
            )
        head, rest = tokens[:, : self.positions], tokens[:, self.positions :]
        return torch.cat([self.edit(head), rest], dim=1).view(y.shape)


@register_adapter("loreft")
@dataclass
class LoReFT(Adapter):
    """Representation fine-tuning in a low-rank linear subspace.

    Args:
        rank: r, dimensions of the subspace.
        form: "loreft", "direft", "noreft" or "nodireft", see the equations.
        positions: how many tokens of each block's output are changed, from the first; None: all.
        targets: selector among block points; None takes all.
        init: "identity" starts as the pretrained function, "random" as the authors do.
        dropout: on what leaves, while training.
    """

    rank: int = 8
    form: Literal["loreft", "direft", "noreft", "nodireft"] = "loreft"
    positions: int | None = None
    targets: str | tuple[str, ...] | None = None
    init: Literal["identity", "random"] = "identity"
    dropout: float = 0.0

    default_lr = 1e-3
    default_weight_decay = 0.0
    no_weight_decay = ("*.reft_r",)
    paper = "Wu et al. 2024"
    taxonomy = "additive"
    merges = False
    trial = {"rank": 2}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.rank >= 1, f"rank is {self.rank}; expected 1 or more.")
        self.check(self.form in FORMS, f"form is {self.form!r}; expected one of {', '.join(FORMS)}.")
        self.check(
            self.positions is None or self.positions >= 1,
            f"positions is {self.positions}; expected 1 or more, or None for all tokens.",
        )
        self.check(self.init in ("identity", "random"), f"init is {self.init!r}; expected 'identity' or 'random'.")
        self.check(0 <= self.dropout < 1, f"dropout is {self.dropout}; expected 0 <= dropout < 1.")

    def attach(self, points: Points) -> None:
        """One intervention behind every selected block."""
        points.require("block", "loreft")
        chosen: list[BlockPoint] = points.select(self.targets, kind="block")
        for point in chosen:
            self.check(
                self.rank <= point.dim_out,
                f"rank is {self.rank}, and tokens at '{point.name}' have {point.dim_out} dimensions. Expected at most as many.",
            )
            self.check(
                self.positions is None or point.layout is None or not point.layout.causal,
                f"positions is {self.positions}, and at '{point.name}' a text is written word by word, with padding in front: "
                "its first words are not always the first tokens. Expected None, for all tokens, or other targets.",
            )
            settings = self.form, self.positions, self.init == "identity", self.dropout, point.name
            point.after(Intervention(point.dim_out, self.rank, *settings))
