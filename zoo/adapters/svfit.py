"""SVFit: only the singular values of a projection are trained.

Idea: W is split into its singular vectors, which stay, and its largest singular values, which learn: directions that the
pretrained network has already are made stronger or weaker, and none is added.
Points: any `linear` points; a slice of a fused q/k/v is a point of its own.

    W = U S V^T,    y = W x + b + U_r diag(sigma - S_r) V_r^T x         U_r (o, r), V_r (i, r) frozen; sigma (r,) trained

What is stored is `sigma_shift` = sigma - S_r, so weight decay draws sigma back to S_r and not to an empty W (and has none by
default). It starts at 0: the pretrained function, to the bit. `relative=True` trains sigma / S_r - 1 instead, in units of each
singular value.
Defaults: all min(o, i) singular values of q and v; `rank` takes the first r, `information` as many as hold that share of their
sum (the authors: more than 0.99), or of the sum of their squares with `squares=True`. Learning rate 1e-2: singular values are
few, and large beside LoRA's numbers.
Counts: r for each point. ViT-B/16 on q, v 24 * 768 = 18,432, a sixteenth of LoRA of rank 8.
Merged: W <- W + U_r diag(sigma - S_r) V_r^T.
Source: Sun et al., "SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values", 2024; no code of
the authors is public.
Deviations: none known; the paper writes (W - U_r S_r V_r^T) x + U_r diag(sigma) V_r^T x, which is the same without its rounding.

U_r and V_r, r (i + o) numbers for each point, are not saved: attaching decomposes the frozen weight, in float64 on the CPU. A
pair of singular vectors may change its sign, which changes nothing. Where two singular values are all but equal, another machine
may find other vectors; a few sums over them are saved, and loading refuses those. `save_vectors` writes them into the file.

In memory: backward needs r numbers of each token and not the input, since V is frozen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adapters.base import Adapter
from zoo.adapters.parts.spread import spread
from zoo.engine.memory import dropped, recomputable
from zoo.errors import AttachError, ConfigError, MismatchError
from zoo.points import LinearPoint, Points
from zoo.points.merger import Merger
from zoo.registry import register_adapter

CHECKS = 4  # sums that are saved of each pair of bases


class Singular(nn.Module):
    """`x (..., dim_in) -> U_r diag(sigma - S_r) V_r^T dropout(x) (..., dim_out)`."""

    left: Tensor
    right: Tensor
    check: Tensor

    def __init__(self, left: Tensor, right: Tensor, dropout: float, saved: bool, name: str) -> None:
        super().__init__()
        self.sigma_shift = nn.Parameter(left.new_zeros(left.shape[1]))
        self.register_buffer(
            "left", left, persistent=saved
        )  # U_r (dim_out, r), times S_r if what is learned is relative
        self.register_buffer("right", right, persistent=saved)  # V_r^T (r, dim_in)
        self.drop = nn.Dropout(dropout)
        self.name = name
        if not saved:
            self.register_buffer("check", self._sums())

    def _sums(self) -> Tensor:
        """(4,): sum_j cos(k j) (u_k . U_j)(v_k . V_j) with fixed u_k and v_k: no sign matters, every mixture of vectors does."""
        rank, device = self.left.shape[1], self.left.device
        rows, columns, order = (
            torch.arange(1, n + 1, dtype=torch.float64, device=device)
            for n in (len(self.left), self.right.shape[1], rank)
        )
        waves = torch.arange(1, CHECKS + 1, dtype=torch.float64, device=device)[:, None]
        ours = torch.cos(1.7 * waves * rows) @ self.left.double()  # (4, r)
        theirs = torch.cos(2.3 * waves * columns) @ self.right.double().T
        return (torch.cos(waves * order) * ours * theirs).sum(dim=1).to(self.left.dtype)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        saved = state_dict.get(f"{prefix}check")
        if saved is not None and "check" in self._buffers and self.left.device.type != "meta":
            mine = self._sums()
            size = mine.abs().max().clamp_min(1e-6)
            if bool(((saved.to(mine) - mine).abs() > (1e-3 if mine.element_size() >= 4 else 5e-2) * size).any()):
                raise MismatchError(
                    f"the singular vectors of '{self.name}' are others here than where this SVFit adapter was trained (two of "
                    "its singular values are all but equal, or the weight is another), and they were not saved with it. Save it "
                    "there with save_vectors=True."
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def behind(self, x: Tensor) -> Tensor:
        """x (..., dim_in), behind dropout -> the delta (..., dim_out)."""
        return F.linear(recomputable(torch.mul, F.linear(x, self.right), self.sigma_shift), self.left)

    def forward(self, x: Tensor) -> Tensor:
        """The delta alone."""
        return self.behind(dropped(x, self.drop))

    def delta(self) -> Tensor:
        """The change of W (dim_out, dim_in)."""
        return (self.left * self.sigma_shift) @ self.right

    @staticmethod
    def add_group(parts: tuple[tuple[Singular, int, int], ...], x: Tensor, y: Tensor) -> Tensor:
        """`y[..., start:stop] + delta(x)` for all parts of one projection."""
        x = dropped(x, parts[0][0].drop)
        return spread(y, ((start, stop, part.behind(x)) for part, start, stop in parts))


def leading(values: Tensor, information: float, squares: bool) -> int:
    """How many of the falling `values` (n,) hold this share of their sum, or of that of their squares; at least 1."""
    shares = (values.square() if squares else values).cumsum(0)
    return min(len(values), int((shares < information * shares[-1]).sum()) + 1)


@register_adapter("svfit")
@dataclass
class SVFit(Adapter):
    """Training of singular values.

    Args:
        rank: r, the largest singular values of each point; None: all of them, or those of `information`.
        information: instead, the share of the sum of singular values that the trained ones hold, above 0 and up to 1.
        squares: `information` is a share of the sum of squares.
        relative: what is learned is a factor of each singular value rather than a difference.
        targets: roles or names of linear points; "all-linear" is q, k, v, o, in, out, gate, up, down. The default is `in` on a
            backbone without attention.
        dropout: on the input, while training.
        save_vectors: write the singular vectors into the file, too; otherwise they are found again when it is loaded.
    """

    rank: int | None = None
    information: float | None = None
    squares: bool = False
    relative: bool = False
    targets: str | tuple[str, ...] = ("q", "v")
    dropout: float = 0.0
    save_vectors: bool = False

    default_lr = 1e-2
    default_weight_decay = 0.0
    paper = "Sun et al. 2024"
    taxonomy = "reparametrised"
    sums = True
    trial = {"rank": 6, "targets": "all-linear"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.rank is None or self.rank >= 1, f"rank is {self.rank}; expected 1 or more, or None.")
        self.check(
            self.rank is None or self.information is None,
            "rank and information both say how many singular values are trained; give one of them.",
        )
        share = self.information
        self.check(share is None or 0 < share <= 1, f"information is {share}; expected above 0, up to 1.")
        self.check(
            not self.squares or share is not None, "squares says how information is counted; give information, too."
        )
        self.check(0 <= self.dropout < 1, f"dropout is {self.dropout}; expected 0 <= dropout < 1.")

    def attach(self, points: Points) -> None:
        """Decompose the weight of every selected linear point."""
        points.require("linear", "svfit")
        chosen = self.selected(points)
        for point in chosen:
            full = min(point.dim_in, point.dim_out)
            self.check(
                self.rank is None or self.rank <= full,
                f"rank is {self.rank}, and '{point.name}' has {full} singular values. Take fewer, None for all, or information.",
            )
        if self.information is not None and self.plan is None and any(p.weight.is_meta for p in chosen):
            raise ConfigError(
                "svfit: information counts singular values, and weights on the meta device have none. Give rank."
            )
        bases = {point.name: self._bases(point) for point in chosen}
        if self.information is not None:
            self.plan = {**(self.plan or {}), "ranks": {name: left.shape[1] for name, (left, _) in bases.items()}}
        for point in chosen:
            point.add(Singular(*bases[point.name], self.dropout, self.save_vectors, point.name))

    def selected(self, points: Points) -> list[LinearPoint]:
        """The target points."""
        return points.linears(self.targets, SVFit.targets)  # type: ignore[arg-type]

    def _bases(self, point: LinearPoint) -> tuple[Tensor, Tensor]:
        """U_r (o, r), with S_r in it if what is learned is relative, and V_r^T (r, i)."""
        weight, full = point.weight, min(point.dim_in, point.dim_out)
        planned = ((self.plan or {}).get("ranks") or {}).get(point.name)
        if planned is not None and not (type(planned) is int and 1 <= planned <= full):
            raise MismatchError(
                f"The plan of 'svfit' trains {planned!r} singular values of '{point.name}', which has {full}. Load it as it was "
                "saved."
            )
        rank = planned if planned is not None else self.rank if self.rank is not None else full
        made: dict[str, Any] = {
            "device": torch.empty(0).device if weight.is_meta else weight.device,
            "dtype": torch.float32,
        }
        if weight.dtype == torch.float64:
            made["dtype"] = torch.float64
        if weight.is_meta:
            return torch.empty(point.dim_out, rank, device="meta"), torch.empty(rank, point.dim_in, device="meta")
        wide = weight.to("cpu", torch.float64)
        if not bool(wide.isfinite().all()):
            raise AttachError(
                f"the weight of '{point.name}' holds numbers that are not finite: it has no singular values."
            )
        left, values, right = torch.linalg.svd(wide, full_matrices=False)
        if self.information is not None and planned is None:
            rank = leading(values, self.information, self.squares)
        left = left[:, :rank] * values[:rank] if self.relative else left[:, :rank]
        return left.contiguous().to(**made), right[:rank].contiguous().to(**made)

    def merge(self, merger: Merger) -> None:
        """W <- W + U_r diag(sigma - S_r) V_r^T."""
        for point in self.selected(merger.points):
            merger.add_weight(point, self.module_at(point).delta())
