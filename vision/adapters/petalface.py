"""PETALface: two low-rank changes of each projection, mixed for every image by how good it is.

Idea: sharp and blurred images of a face are two domains. So there are two changes, one for each, and an image gets as much of
either as its quality says.
Points: `linear`, by default q, k, v of every attention; and one low-rank change, without mixing, of the projection behind
the last block, where the backbone has one (role `project`).

    y = W x + b + s dropout(B_1 A_1 (1 - a) x) + s dropout(B_2 A_2 a x)      A (r, d), B (o, r)
    a = 1/2 + gain (quality - threshold)                                     one number for each image, all its tokens and windows
    z = W' x + b' + s dropout(B A x)                                         at the projection

q, k and v read one input: they share A_1 and A_2 (theirs is one change of the fused projection), and so do up and gate of
an MLP. Branch 2 is that of the good images. `quality` is a score of `vision.adapters.parts.quality`, from 0 (worst) to 1
(best); with the default threshold and gain (theirs has no gain) a is the quality itself. It is measured on the images that
the model is called with, as they were before they were normalised; `model(x, context={"quality": q})` gives it instead.

A ~ N(0, 1/r^2), B = 0, so the start is the pretrained function, to the bit. Defaults: r = 8, s = 1, dropout 0.1 (their
scripts and layers); AdamW, 5e-4, weight decay 0.1, 40-50 epochs, CosFace or ArcFace (heads `cosface`, `arcface`).
Counts: 2 r (d + sum of o) for each input, r (d' + o') for the projection; on their Swin (`swin-face`) r = 8 1,441,792,
r = 4 720,896. The 0.48 % of the abstract are not those of the released configuration (0.67 %).
Source: Narayan et al., "PETALface: Parameter Efficient Transfer Learning for Low-resolution Face Recognition", WACV 2025
(Kartik-3004/PETALface, `backbones/lora_layers.py`, `swin_models_iqa.py`, `train_iqa.py`).
Deviations: (1) There, the network initialises all its linear layers anew after the layers have done so themselves: A and B both
start as N(0, 0.02^2), truncated, and the pretrained function is lost; here B stays 0. (2) They take scores as they come:
BRISQUE is better when it is lower and goes to 100 and more, so a could be -50 or 50, with the branches exchanged; here all have
one sign and scale. (3) Scores are measured on images from 0 to 1; theirs are normalised to -1..1. (4) Their batch norms stay in
training mode, and the statistics drift; here the backbone is in evaluation. (5) An image that cannot be scored is an error, or
gets a = 1/2 (`unknown="middle"`). (6) Their shifted windows go without a mask: so does `swin-face`, no other Swin.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision.adapters.parts.graded import Mixing
from vision.adapters.parts.quality import SCORES
from zoo import Adapter, LinearPoint, Points, register_adapter
from zoo.adapters.parts.low_rank import check_rank
from zoo.adapters.parts.spread import spread
from zoo.errors import AttachError, ContextError

TARGETS = ("q", "k", "v")


class Down(nn.Module):
    """A_1 and A_2 of all projections that read one input: x (n, ..., d) -> ((1 - a) A_1 x, a A_2 x), (n, ..., 2r)."""

    def __init__(self, dim: int, rank: int, mixing: Any, generator: nn.Module) -> None:
        super().__init__()
        self.low_a = nn.Parameter(torch.randn(rank, dim) / rank)
        self.high_a = nn.Parameter(torch.randn(rank, dim) / rank)
        self.mixing, self.shared = mixing, (generator,)

    def forward(self, x: Tensor) -> Tensor:
        """Both branches side by side."""
        hidden = F.linear(x, torch.cat([self.low_a, self.high_a]))
        a = self.mixing.rows(hidden)[:, None]
        share = torch.cat([(1 - a).expand(-1, len(self.low_a)), a.expand(-1, len(self.high_a))], dim=1)
        return hidden * share.view(share.shape[0], *[1] * (hidden.dim() - 2), share.shape[1])


class Branches(nn.Module):
    """B_1 and B_2 of one projection."""

    def __init__(self, down: Down, dim_out: int, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.low_b = nn.Parameter(torch.zeros(dim_out, rank))
        self.high_b = nn.Parameter(torch.zeros(dim_out, rank))
        self.scale, self.drop, self.shared = scale, nn.Dropout(dropout), (down,)

    def forward(self, x: Tensor) -> Tensor:
        """The change alone: x (n, ..., d) -> (n, ..., o)."""
        return self.up(self.shared[0](x), self.low_b, self.high_b)

    def up(self, hidden: Tensor, low_b: Tensor, high_b: Tensor) -> Tensor:
        """(n, ..., 2r) -> (n, ..., o), by these B of all projections of a group."""
        if not (self.training and self.drop.p):
            return self.scale * F.linear(hidden, torch.cat([low_b, high_b], dim=1))
        low, high = hidden.chunk(2, dim=-1)
        return self.scale * (self.drop(F.linear(low, low_b)) + self.drop(F.linear(high, high_b)))

    @staticmethod
    def add_group(parts: tuple[tuple[Branches, int, int], ...], x: Tensor, y: Tensor) -> Tensor:
        """`y[..., start:stop] + change(x)` for all parts of one projection, whose A is the same."""
        first = parts[0][0]
        low_b, high_b = torch.cat([m.low_b for m, _, _ in parts]), torch.cat([m.high_b for m, _, _ in parts])
        change = first.up(first.shared[0](x), low_b, high_b)
        pieces = change.split([stop - start for _, start, stop in parts], dim=-1)
        return spread(y, ((start, stop, piece) for piece, (_, start, stop) in zip(pieces, parts)))


class Single(nn.Module):
    """x (..., d) -> s dropout(B A x), (..., o)."""

    def __init__(self, dim_in: int, dim_out: int, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, dim_in) / rank)
        self.b = nn.Parameter(torch.zeros(dim_out, rank))
        self.scale, self.drop = scale, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """The change alone."""
        return self.scale * self.drop(F.linear(F.linear(x, self.a), self.b))


@register_adapter("petalface")
@dataclass
class PetalFace(Adapter):
    """Two low-rank changes, mixed by the quality of each image.

    Args:
        rank: r. scale: s. dropout: on what each branch adds, while training.
        targets: roles or names of linear points.
        quality: "sharpness"; "cnniqa", "brisque" or "piqe", where pyiqa is installed; or "given": it must come with the call.
        threshold: of the quality at which both branches count alike. None: the mean of the training images, by calibration.
        gain: how much a difference of quality counts; 1 is theirs. Scores whose values lie close together want more.
        unknown: what becomes of an image without a quality: "refuse", or "middle" (half and half).
        projection: name or role of linear points that get a single change; "": none. The default is left out where there
            are none.
    """

    rank: int = 8
    scale: float = 1.0
    dropout: float = 0.1
    targets: str | tuple[str, ...] = TARGETS
    quality: Literal["sharpness", "cnniqa", "brisque", "piqe", "given"] = "sharpness"
    threshold: float | None = 0.5
    gain: float = 1.0
    unknown: Literal["refuse", "middle"] = "refuse"
    projection: str = "project"

    default_lr = 5e-4
    default_weight_decay = 0.1
    paper = "Narayan et al. 2025"
    taxonomy = "reparametrised"
    merges = False
    unmerged = (
        "what it adds depends on the quality of each image, so there is no one weight. Keep the model as it is, or save the "
        "adapter with model.save_adapter(folder)."
    )
    trial = {"rank": 2, "dropout": 0.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.rank >= 1, f"rank is {self.rank}; expected 1 or more.")
        self.check(self.scale > 0, f"scale is {self.scale}; expected more than 0.")
        self.check(0 <= self.dropout < 1, f"dropout is {self.dropout}; expected 0 <= dropout < 1.")
        known = (*SCORES, "given")
        self.check(self.quality in known, f"quality is {self.quality!r}; expected one of {', '.join(known)}.")
        self.check(
            self.threshold is None or 0 <= self.threshold <= 1,
            f"threshold is {self.threshold}; expected a quality, from 0 (worst) to 1 (best), or None.",
        )
        self.check(self.gain > 0, f"gain is {self.gain}; expected more than 0.")
        self.check(self.unknown in ("refuse", "middle"), f"unknown is {self.unknown!r}; expected 'refuse' or 'middle'.")
        self.__dict__["needs_calibration"] = self.threshold is None

    def attach(self, points: Points) -> None:
        """Two mixed changes at every target, a single one at the projection."""
        points.require("linear", "petalface")
        given, moments = self.quality == "given", points.normalised
        if not given and moments is None:
            raise AttachError(
                f"'petalface' measures how good images are, and {points.backbone} takes none. Where there is another quality, "
                "give it: zoo.adapter('petalface', quality='given'), model(x, context={'quality': ...})."
            )
        score = None if given else SCORES[self.quality]
        mixing = Mixing(score, moments, (self.plan or {}).get("threshold", self.threshold), self.gain, self.unknown)
        example = functools.partial(torch.linspace, 0.2, 0.8) if given else None
        values = [points.context("quality", required=given, example=example)]
        values += [] if given else [points.context("inputs")]
        made = points.generate("mixing", mixing, *values)
        readers = {r.name: s.name for s in points if s.kind == "sublayer" for r in points.readers(s)}
        downs: dict[str, Down] = {}
        check_rank(self, ((point, self.rank) for point in self._targets(points)))
        for point in self._targets(points):
            group = readers.get(point.name, point.name)
            if group not in downs:
                name = f"down_{group.replace('.', '_')}"
                downs[group] = points.share(name, Down(point.dim_in, self.rank, made, mixing))
            point.add(Branches(downs[group], point.dim_out, self.rank, self.scale, self.dropout))
        for point in self._projections(points):
            point.add(Single(point.dim_in, point.dim_out, self.rank, self.scale, self.dropout))

    def _targets(self, points: Points) -> list[LinearPoint]:
        """The target points; by default those of towers that see images."""
        found: list[LinearPoint] = points.linears(self.targets, TARGETS)
        texts = [p for p in found if p.tower == "text"]
        if self.targets == TARGETS:
            return [p for p in found if p.tower != "text"]
        self.check(not texts, f"'{texts[0].name if texts else ''}' sees texts, and images have a quality.")
        return found

    def _projections(self, points: Points) -> list[LinearPoint]:
        default = self.projection == "project"
        if not self.projection or (default and "project" not in points.roles("linear")):
            return []
        return points.select(self.projection, kind="linear")

    def calibrate(self, model: Any, batches: Iterable[Any], task: Any = None) -> None:
        """With threshold=None: the mean quality of the images of these batches.

        Raises:
            ContextError: of none of them is there a quality.
        """
        if self.threshold is not None:
            return
        mixing: Mixing = self.get_submodule("mixing")  # type: ignore[assignment]
        found = []
        for inputs, targets in batches:
            given = {} if task is None else task.context(model, inputs, targets, training=False)
            images = inputs
            if isinstance(inputs, dict):  # data that bring values of their own
                images, given = inputs["x"], {**given, **inputs.get("context", {})}
            found.append(mixing.quality(given.get("quality"), images))
        scores = torch.cat(found) if found else torch.empty(0)
        scores = scores[scores.isfinite()]
        if not len(scores):
            raise ContextError(
                "'petalface' has no threshold: none of the images that it was calibrated on has a quality."
            )
        self.plan = {"threshold": float(scores.mean())}
        mixing.threshold = self.plan["threshold"]
