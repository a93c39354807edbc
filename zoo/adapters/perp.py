"""PERP: prune a network once, then tune the few numbers that bring it back; the zeros stay zeros, merged too.

Idea: after pruning, biases, norms and a low-rank change that keeps the mask recover what retraining of all weights would.
Points: any `linear` points (a slice of a fused q/k/v is a point of its own, with a mask of its own); the biases of all `linear`
and the scales and shifts of all `norm` points.

    M = the largest scores of W (o, i) but for a part `sparsity`; `pattern="2:4"`: the 2 largest of every 4 neighbours in a row
        magnitude |W|      wanda |W_oj| ||x_j||      random
        sparsegpt W_oj^2 / [H^-1]_jj^2, H = X^T X + damping; what stays takes over what goes:  W <- W + D
        given     the zeros of a sparse backbone (zoo.sparsify)
    y = M . (W + (alpha / r) B A) x + b            update="mask" (MaskLoRA)     A (r, i), B (o, r)
    y = M . W . (B A) x + b                        update="scale" (ScaleLoRA)
    y = M . W x + b                                update="none"

"wanda" and "sparsegpt" see `samples` of the training data (zoo.fit shows them, or `calibrate` by hand): block by block, each
behind those that are pruned already. With `reconstruct` steps each block is also tuned then, until it answers as the dense
block does to the same tokens: min mean (block(x) - dense(x))^2 over what is trained inside of it, AdamW, warm-up over a
tenth of the steps, then linearly to 0. Training goes on from there.

A ~ Kaiming-uniform, B = 0; ScaleLoRA B A = 1. Both start as the pruned network, to the bit.
Defaults: sparsity 0.5 by magnitude, MaskLoRA of r = 16, alpha = 32 on all projections, biases and norms; 128 samples; AdamW
5e-4, no weight decay, linear schedule with a tenth of warm-up (theirs).
Counts: ViT-B/16 biases 102,912, with norms 122,112; r (o + i) for each point, 2,654,208 with r = 16.
Merged: W <- M . (W + (alpha / r) B A), or M . (W + D) . (B A): a dense tensor with the zeros of M.
Source: Zimmer, Andoni, Spiegel, Pokutta, "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", 2023
(ZIB-IOL/PERP). Wanda: Sun et al. 2024, here over a whole weight as theirs, not row by row. SparseGPT: Frantar, Alistarh 2023.
Deviations: (1) Theirs removes one entry more than asked for (a threshold with <=), in every weight, and takes for the mask what
is not 0: here it is exactly round(sparsity n), and M is kept. (2) Their ScaleLoRA calls a function that does not exist, and all
its directions start alike, so that they stay alike: B A never has more than rank 1. Here one direction is all ones and the
others are LoRA's. (3) LoRA that is pruned when it is merged, or not at all, is not offered: the merged network would not be
the trained one. (4) Their head gets a LoRA; a new head is trained whole. (5) SparseGPT goes 128 columns at a time; theirs as
many as there are samples (128). Tokens, positions and tables of relative positions stay frozen.

In memory: as LoRA. The gradient of a masked change is a full product for each projection, which LoRA has not: a step takes 1.44
times LoRA's of as many numbers (ViT-B/16's blocks on one CPU core, `benchmarks/step_speed.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

import zoo
from zoo.adapters.base import Adapter
from zoo.adapters.parts.blockwise import Samples, by_block, reconstruct, untouched
from zoo.adapters.parts.low_rank import check_rank
from zoo.adapters.parts.masked import UPDATES, Masked, folded, unfolded
from zoo.adapters.parts.pictured import filled
from zoo.adapters.parts.pruning import CRITERIA, Pruning, pattern_of
from zoo.engine.changes import BiasDelta
from zoo.errors import ConfigError, MismatchError
from zoo.host import Host
from zoo.points import LinearPoint, Points
from zoo.points.merger import Merger
from zoo.registry import register_adapter
from zoo.tasks.base import Task


@register_adapter("perp")
@dataclass
class PERP(Adapter):
    """Parameter-efficient retraining after pruning.

    Args:
        criterion: "magnitude", "wanda", "sparsegpt", "random", or "given": the zeros that the backbone has (zoo.sparsify).
        sparsity: the part of each weight that goes. pattern: "2:4", "4:8" and so on: how many of how many neighbours stay.
        update: "mask", "scale" or "none".
        rank: r. alpha: of MaskLoRA.
        targets: roles or names of linear points; "all-linear" is q, k, v, o, in, out, gate, up, down.
        bias: train the biases of all projections and norms. norm: train the scales and shifts of all norms.
        samples: of the training data, to prune and reconstruct by; whole batches.
        reconstruct: steps in which each block is tuned to answer as the dense one; 0: none. reconstruct_lr: their rate.
    """

    criterion: Literal["magnitude", "wanda", "sparsegpt", "random", "given"] = "magnitude"
    sparsity: float = 0.5
    pattern: str | None = None
    update: Literal["mask", "scale", "none"] = "mask"
    rank: int = 16
    alpha: float = 32.0
    targets: str | tuple[str, ...] = "all-linear"
    bias: bool = True
    norm: bool = True
    samples: int = 128
    reconstruct: int = 0
    reconstruct_lr: float = 5e-4

    default_lr = 5e-4
    default_weight_decay = 0.0
    paper = "Zimmer et al. 2023"
    taxonomy = "hybrid"
    identity = False
    trial = {"rank": 2, "alpha": 4.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(
            self.criterion in CRITERIA, f"criterion is {self.criterion!r}; expected one of {', '.join(CRITERIA)}."
        )
        self.check(self.update in UPDATES, f"update is {self.update!r}; expected one of {', '.join(UPDATES)}.")
        self.check(
            0 < self.sparsity < 1,
            f"sparsity is {self.sparsity}; expected more than 0 and less than 1, the part of each weight that goes.",
        )
        try:
            pattern = pattern_of(self.pattern)
        except ValueError:
            self.check(False, f"pattern is {self.pattern!r}; expected such as '2:4': 2 of every 4 neighbours stay.")
        if pattern is not None:
            kept, group = pattern
            self.check(
                abs(1 - kept / group - self.sparsity) < 1e-6,
                f"pattern {self.pattern} leaves {kept} of {group}, a sparsity of {1 - kept / group:g}, and sparsity is "
                f"{self.sparsity:g}. Give both alike.",
            )
        self.check(self.rank >= 1, f"rank is {self.rank}; expected 1 or more.")
        self.check(self.alpha != 0, "alpha is 0; what is learned is multiplied by it, so it could never act.")
        self.check(self.samples >= 1, f"samples is {self.samples}; expected 1 or more.")
        self.check(self.reconstruct >= 0, f"reconstruct is {self.reconstruct}; expected 0 or more steps.")
        self.check(self.reconstruct_lr > 0, f"reconstruct_lr is {self.reconstruct_lr}; expected more than 0.")
        self.check(
            self.update != "none" or self.bias or self.norm,
            "update, bias and norm are all off; nothing would be trained.",
        )
        self._how = Pruning("perp", self.criterion, self.sparsity, pattern)
        self.__dict__["needs_calibration"] = self._how.seen is not None or self.reconstruct > 0
        self._known: dict[str, Tensor] = {}  # masks and changes of the adapter that this is a copy of

    def fresh(self) -> Adapter:
        """An unattached adapter with the same settings; one that has seen data takes its masks along."""
        twin = super().fresh()
        assert isinstance(twin, PERP)
        if self.plan is not None:
            twin._known = self._known or {n: b.detach().clone() for n, b in self.named_buffers()}
        return twin

    # -- the mask -----------------------------------------------------------------------------------------------------

    def attach(self, points: Points) -> None:
        """Prune every selected projection, by data when these are there; train biases and norms."""
        points.require("linear", "perp")
        if self.update != "none":
            check_rank(self, ((point, self.rank) for point in points.linears(self.targets)))
        for point in points.linears(self.targets):
            mask = self._known.get(f"{point.name}.mask")
            shift = self._known.get(f"{point.name}.shift")
            if mask is None or mask.is_meta:
                mask = self._how.without_data(point)
                shift = torch.zeros_like(mask, dtype=torch.float32) if self.criterion == "sparsegpt" else None
            elif tuple(mask.shape) != (point.dim_out, point.dim_in):
                raise MismatchError(
                    f"perp: the mask of '{point.name}' is {tuple(mask.shape)}, and its weight is "
                    f"{(point.dim_out, point.dim_in)}: it was made for another backbone. Calibrate a new one on this."
                )
            point.reparametrize(Masked(mask, shift, self.update, self.rank, self.alpha / self.rank))
        self._known = {}
        kinds = [k for k in ("linear", "norm") if k in points.kinds]
        for point in points.select(None, kind=kinds):
            of_norm = point.kind == "norm" and self.norm
            names = [n for n, on in (("weight", of_norm), ("bias", self.bias or of_norm)) if on]
            names = [n for n in names if point.holder(n) is not None]
            if names:
                point.train(*names)

    def masks(self) -> dict[str, Tensor]:
        """By point, (dim_out, dim_in), true where the weight stays: as `zoo.sparsify(model, masks=...)` takes them."""
        return {n: m.mask for n, m in self._parts().items()}

    def zeros(self) -> float:
        """The part of the weights that is pruned."""
        masks = self.masks().values()
        return 1 - sum(int(m.sum()) for m in masks) / max(1, sum(m.numel() for m in masks))

    def by_layer(self, model: Host) -> dict[str, dict[str, float]]:
        """The part of each weight that stays."""
        return {"part left": {name: filled(mask) for name, mask in self.masks().items()}}

    @torch.no_grad()
    def _keep(self, point: str, mask: Tensor, change: Tensor | None = None) -> None:
        part = self.module_at(point)
        part.mask.copy_(mask)
        if part.shift is not None:
            part.shift.copy_(torch.zeros_like(part.shift) if change is None else change)

    def _parts(self) -> dict[str, Masked]:
        return {n: m for n, m in self.named_modules() if isinstance(m, Masked)}

    def calibrate(self, model: Host, batches: Iterable[Any], task: Task | None = None) -> None:
        """Prune by what passes in the first `samples`, block by block; reconstruct each block; all or nothing.

        Raises:
            ConfigError: the adapter is not in use. DataError: no batch, or numbers that are not finite.
            AttachError, CombinationError: blocks that cannot be run by hand, with `reconstruct`.
        """
        name = next((n for n, a in model.adapters.items() if a is self), None)
        if name is None or name not in model.active:
            raise ConfigError("perp: data pass an adapter that is in use: model.set_active(...), then calibrate.")
        points = model.points.linears(self.targets)

        @torch.no_grad()
        def prune(chosen: list[LinearPoint], run: Callable[[], None]) -> None:
            if self._how.seen is None:
                return
            with zoo.capture(model, chosen, "input", self._how.seen) as seen:
                run()
            for point in chosen:
                self._keep(point.name, *self._how.by_data(point, seen[point.name]))

        with untouched(self):
            with zoo.probing(model, task) as probe:
                samples = Samples.of(probe, batches, self.samples)
                for point in points if self._how.seen else ():  # if that was done before: anew
                    self._keep(point.name, self._how.without_data(point))
                errors = {}
                if self.reconstruct:
                    steps = self.reconstruct, self.reconstruct_lr
                    errors = reconstruct(model, self, points, samples, prune, *steps)
                else:
                    for _, chosen in by_block(model, points):
                        prune(chosen, samples.run)
                found = {n: b.clone() for n, b in self.named_buffers()}
            for n, buffer in self.named_buffers():  # a probe leaves no trace
                buffer.copy_(found[n])
            self.plan = {"samples": samples.count, "zeros": self.zeros(), "errors": errors}

    # -- merged and saved ---------------------------------------------------------------------------------------------

    def merge(self, merger: Merger) -> None:
        """W <- M . (W + (alpha / r) B A), or M . W . (B A); biases and norms are in the merged copy already."""
        for name, part in self._parts().items():
            point = merger.points[name]
            weight = merger.weight(point)
            merger.set_weight(point, part(weight.to(torch.promote_types(weight.dtype, torch.float32))))
        for name, shift in self.named_modules():
            if isinstance(shift, BiasDelta):  # a slice of a fused bias, which is kept as a difference
                merger.add_bias(merger.points[name], shift.bias - shift.frozen)  # type: ignore[operator]

    def saved(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Masks as bits, and changes of the entries that stay alone."""
        config, tensors = super().saved()
        return config, folded(tensors, self._parts())

    @classmethod
    def load_saved(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The inverse of `saved`."""
        return config, unfolded(tensors, cls.method)
