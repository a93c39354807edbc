"""SCT, salient channel tuning: one small linear map on the few channels that the task's data excite most.

Idea: of the d channels of a frozen network a task needs some; those with the largest values on its data are found once, and are
mixed by a matrix of their own, the others stay.
Points: `sublayer` mlp (verb `enter`), or `linear` (verb `after`), by `at`:

    x_c <- x_c + (W x_C + b)_c       for the channels c of C, K of d            W (K, K), b (K,), x_C (K,)

| at     | x                                                     | channels by the size of    |
| ------ | ----------------------------------------------------- | -------------------------- |
| "attn" | the residual stream behind the attention's sum        | x                          |
| "mlp"  | the MLP's output                                      | the block's output         |
| "qkv"  | queries and values, each with channels of its own     | x                          |

Calibration: one pass over the training data without adapters; of a class, channel by channel, the L2 norm over all of its images
and patches (tokens in front of them are left out), averaged over the classes that occur. The K largest are taken.
Defaults: "attn", K = d / 8 (theirs 96 of 768); W ~ N(0, 0.02^2), cut at two units as torch's `trunc_normal_`, b = 0: near the
pretrained function, not equal to it (`std=0` starts there). AdamW; theirs has lr and weight decay for each task (CIFAR-100:
.013 and 1), label smoothing 0.1.
Counts: K^2 + K for each place; ViT-B/16 12 (96^2 + 96) = 111,744.
Merged: "mlp" and "qkv" into the rows C of the projection; "attn" changes the residual stream, which no weight holds.
Source: Zhao, Wang, Zhao, Luo, Wang, Shou, "SCT: A Simple Baseline for Parameter-Efficient Fine-Tuning via Salient Channels", 2023
(zhaohengyuan1/SCT, `train_model_sct.py`, `models/vision_transformer_sct.py`).
Deviations: where channels tie theirs may take fewer than K; here the first of them are taken. Their scale is read from the
settings and not used, so there is none. Their Swin has no calibration that runs; here each width has its own K. The choice is
saved with the adapter.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo
from zoo import Adapter, Merger, Points, Task, register_adapter
from zoo.errors import AttachError, ConfigError, DataError, MergeError, MismatchError
from zoo.host import Host
from zoo.tasks import call

PLACES = ("attn", "mlp", "qkv")


class Channels(nn.Module):
    """x (..., d) -> W x_C + b at the channels C and 0 elsewhere; `whole`: x itself is added."""

    def __init__(self, where: str, dim: int, count: int, std: float, whole: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, count))
        self.bias = nn.Parameter(torch.zeros(count))
        nn.init.trunc_normal_(self.weight, std=std) if std else nn.init.zeros_(self.weight)
        # what the plan says, where the adapter is
        self.register_buffer("index", torch.arange(count), persistent=False)
        self.where, self.dim, self.whole, self.chosen = where, dim, whole, False

    def choose(self, channels: list[int]) -> None:
        """Take these channels, in ascending order."""
        self.index.copy_(torch.tensor(channels))  # type: ignore[operator]
        self.chosen = True

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        if not self.chosen:
            raise ConfigError(
                f"'sct' does not know which channels of '{self.where}' to tune: it has to see training data first. zoo.fit does "
                "that, in a loop of your own call zoo.training_hooks(model).calibrate(batches)."
            )
        index: Any = self.index
        mixed = F.linear(x.index_select(-1, index), self.weight, self.bias)
        base = x if self.whole else torch.zeros_like(x)
        return base.index_add(-1, index, mixed.to(base.dtype))

    def change(self) -> tuple[Tensor, Tensor]:
        """The matrix (d, d) and vector (d,) of x <- x + M x + m."""
        index: Any = self.index
        matrix, vector = self.weight.new_zeros(self.dim, self.dim), self.weight.new_zeros(self.dim)
        matrix[index[:, None], index[None]] = self.weight.detach()
        vector[index] = self.bias.detach()
        return matrix, vector


@register_adapter("sct")
@dataclass
class SCT(Adapter):
    """Salient channel tuning.

    Args:
        channels: K; None: d / 8. at: "attn", "mlp" or "qkv". std: of W's start.
    """

    channels: int | None = None
    at: Literal["attn", "mlp", "qkv"] = "attn"
    std: float = 0.02

    needs_calibration = True
    default_lr = 1e-3
    default_weight_decay = 1e-4
    paper = "Zhao et al. 2023"
    taxonomy = "additive"
    identity, merges = False, False
    trial = {"channels": 5}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.channels is None or self.channels >= 1, f"channels is {self.channels}; expected 1 or more.")
        self.check(self.at in PLACES, f"at is {self.at!r}; expected one of {', '.join(PLACES)}.")
        self.check(self.std >= 0, f"std is {self.std}; expected 0 or more.")

    def places(self, points: Points) -> dict[str, tuple[Any, Any, str]]:
        """By the name of the point that changes: it, the point whose input or output is scored, and which of the two."""
        found: dict[str, tuple[Any, Any, str]] = {}
        if self.at == "qkv":
            return {p.name: (p, p, "output") for p in points.select(kind="linear", role=["q", "v"])}
        blocks = points.require("block", "sct")
        for point in points.select(kind="sublayer", role="mlp"):
            if self.at == "attn":
                norm = points.norm_before(point)
                if norm is None or point.stream is not None:
                    raise AttachError(
                        f"'sct' at 'attn' changes the residual stream in front of the MLP's norm, and '{point.name}' of "
                        f'{points.backbone} has none directly in front. Use at="mlp" or at="qkv".'
                    )
                found[point.name] = (point, norm, "input")
            else:
                block = next(b for b in blocks if point.name.startswith(f"{b.name}."))
                down = points.select(f"{point.name}.*", kind="linear", role="down")
                found.update({p.name: (p, block, "output") for p in down})
        return found

    def attach(self, points: Points) -> None:
        """A map of K channels at every place; which channels they are is what the plan says."""
        plan = self._read(points)
        for name, (point, _, _) in self.places(points).items():
            dim = point.dim_out
            count = max(round(dim / 8), 1) if self.channels is None else self.channels
            self.check(count <= dim, f"channels is {count}; '{name}' has {dim}.")
            made = Channels(name, dim, count, self.std, whole=self.at != "attn")
            if name in plan:
                chosen = plan[name]
                fits = len(chosen) == count and all(type(c) is int and 0 <= c < dim for c in chosen)
                if not fits or len(set(chosen)) != count:
                    raise ConfigError(f"the plan of 'sct' is damaged at '{name}': expected {count} channels of {dim}.")
                made.choose(chosen)
            point.enter(made) if self.at == "attn" else point.after(made)

    def _read(self, points: Points) -> dict[str, list[int]]:
        """The plan: channels by the name of a point."""
        if self.plan is None:
            return {}
        plan = self.plan.get("channels")
        names = set(self.places(points))
        if not isinstance(plan, dict) or set(plan) != names or not all(isinstance(c, list) for c in plan.values()):
            raise ConfigError(
                f"the plan of 'sct' is not one for {points.backbone}: expected channels of {len(names)} places."
            )
        return plan

    def calibrate(self, model: Host, batches: Iterable[Any], task: Task | None = None) -> None:
        """Choose the channels by (inputs, labels) of the training data.

        Raises:
            DataError: no batch, or targets that are no labels of classes.
        """
        places = self.places(model.points)
        sums: dict[str, dict[int, Tensor]] = {name: {} for name in places}
        labels: list[int] = []

        def add(name: str, prefix: int) -> Any:
            def seen(x: Tensor) -> Tensor:
                if x.dim() < 3:
                    raise MismatchError(
                        f"'sct' measures the tokens of each sample, and at '{name}' those of all samples stand in one sequence. "
                        "Name the blocks of another tower as targets, or use another method, such as lora."
                    )
                squares = x.flatten(1, -2)[:, prefix:].double().square().sum(dim=1).cpu()  # (B, d)
                for label, row in zip(labels, squares.view(len(labels), -1, squares.shape[-1]).sum(dim=1)):
                    sums[name][label] = sums[name].get(label, 0) + row
                return x.new_zeros(1)  # nothing that the capture itself would have to keep

            return seen

        host: Any = model
        with zoo.probing(host, task) as probe, host.disable(), torch.no_grad(), ExitStack() as stack:
            for name, (_, scored, what) in places.items():
                prefix = 0 if scored.layout is None else scored.layout.prefix
                stack.enter_context(zoo.capture(host, [scored], what, add(name, prefix)))
            for inputs, targets in batches:
                if not isinstance(targets, Tensor) or targets.dim() != 1 or targets.is_floating_point():
                    raise DataError(
                        "'sct' averages over classes, and the targets of this data are not one label for each sample. Use "
                        "another method, such as lora or spt."
                    )
                labels[:] = targets.tolist()
                call(host.features, probe.moved(inputs, cast=True))
        if not labels:
            raise DataError("'sct' got no batch to choose its channels by; give it training data.")
        plan: dict[str, list[int]] = {}
        for name, by_class in sums.items():
            score = torch.stack([s.sqrt() for s in by_class.values()]).mean(dim=0)
            part: Channels = self.module_at(name)
            order = torch.sort(score, descending=True, stable=True).indices
            plan[name] = sorted(order[: len(part.bias)].tolist())
            part.choose(plan[name])
        self.plan = {"channels": plan}

    def saved(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Settings and tensors.

        Raises:
            ConfigError: no data were seen, so that nobody could say which channels the numbers are of.
        """
        if self.plan is None:
            raise ConfigError(
                "'sct' has seen no data, and does not know which channels its numbers are for: there is nothing to save. Train "
                "it with zoo.fit, or choose the channels with zoo.calibrate(model, train)."
            )
        return super().saved()

    def merge(self, merger: Merger) -> None:
        """At "mlp" and "qkv": W_out <- (1 + M) W_out, b_out <- b_out + M b_out + m.

        Raises:
            MergeError: at "attn".
        """
        if self.at == "attn":
            raise MergeError(
                "'sct' at 'attn' cannot be merged: it changes the residual stream, which no weight holds. Keep the model as it "
                'is, or train with at="mlp" or at="qkv".'
            )
        for name, (point, _, _) in self.places(merger.points).items():
            matrix, vector = self.module_at(name).change()
            weight = merger.weight(point).to(matrix)
            bias = merger.bias(point) if point.holder("bias") is not None else weight.new_zeros(len(weight))
            merger.add_bias(point, matrix @ bias.to(matrix) + vector)
            merger.add_weight(point, matrix @ weight)
