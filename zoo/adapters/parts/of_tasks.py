"""What methods have in common whose bottlenecks are made by a network, for a task: hyperformer, polyhistor, polyhistor-lite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo import registry
from zoo.adapters.base import Adapter
from zoo.adapters.parts.bottleneck import ACTIVATIONS, bottleneck, width_at
from zoo.adapters.parts.hypernetwork import HyperNetwork, Weights, normed
from zoo.errors import MergeError, UnknownNameError, nearest
from zoo.host import Host
from zoo.points import Points, SublayerPoint
from zoo.points.merger import Merger


class MadeBottleneck(nn.Module):
    """`y (..., d) -> y + LN(W_up f(W_down y + b_down) + b_up)` with the weights that were made for this pass.

    `sequential=False` leaves out the first y: what stands beside a sublayer.
    """

    def __init__(self, made: Any, hyper: nn.Module, name: str, activation: str, sequential: bool = True) -> None:
        super().__init__()
        self.made, self.shared = made, (hyper,)
        self.point, self.activation, self.sequential = name, activation, sequential

    def forward(self, y: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        weights: Weights = self.made.get()[self.point]
        out = normed(bottleneck(y, *weights[:4], self.activation), weights)
        return y + out if self.sequential else out


class OfTasks(Adapter):
    """Base of such methods: the checks of the settings they share, the bottlenecks at the points, and how a task is taken out.

    A method is a dataclass with the fields below; its `attach` calls `place`. What it makes stands under the name `hyper`.
    """

    if TYPE_CHECKING:  # fields of the methods
        tasks: tuple[str, ...]
        rank: int | None
        reduction: float | None
        targets: str | tuple[str, ...] | None
        activation: str

    merges = False
    identity = False
    sequential = True  # behind the sublayer; else beside it, from its residual stream

    def check_settings(self, reduction: float, *sizes: str) -> None:
        """Check the fields above and `sizes`, names of fields that are 1 or more (or None); fill in `reduction`."""
        self.tasks = tuple(self.tasks)
        if self.rank is None and self.reduction is None:
            self.reduction = reduction
        self.check(bool(self.tasks), "tasks is empty; name at least one.")
        self.check(all(self.tasks), "a task has an empty name.")
        twice = sorted({name for name in self.tasks if self.tasks.count(name) > 1})
        self.check(not twice, f"tasks names one twice: {', '.join(self.tasks)}. Name '{''.join(twice[:1])}' once.")
        self.check(self.rank is None or self.reduction is None, "rank and reduction are both given; give one of them.")
        for name in ("rank", *sizes):
            value = getattr(self, name)
            self.check(value is None or value >= 1, f"{name} is {value}; expected 1 or more.")
        self.check(self.reduction is None or self.reduction > 0, f"reduction is {self.reduction}; expected above 0.")
        self.check(
            self.activation in ACTIVATIONS, f"activation is {self.activation!r}; known: {', '.join(ACTIVATIONS)}."
        )

    def bottleneck_at(self, dim: int) -> int:
        """b at a point of width `dim`."""
        return width_at(dim, self.rank, self.reduction)

    def chosen(self, points: Points, roles: Sequence[str] | None = None) -> list[SublayerPoint]:
        """The sublayers of `targets`; None takes all but cross-attention, of `roles` only where the backbone has one of them."""
        points.require("sublayer", self.method)
        if self.targets is not None:
            return points.select(self.targets, kind="sublayer")
        known = [r for r in points.roles("sublayer") if r != "cross"]
        return points.select(kind="sublayer", role=[r for r in known if r in (roles or known)] or known)

    def place(self, points: Points, chosen: Sequence[SublayerPoint], hyper: HyperNetwork) -> None:
        """At every chosen sublayer the bottleneck that `hyper` makes for the task of the pass."""
        many = len(self.tasks) > 1
        task = points.context("task", "batch", required=many, choices=self.tasks, example=self.tasks[0])
        made = points.generate("hyper", hyper, task)
        for point in chosen:
            module = MadeBottleneck(made, hyper, point.name, self.activation, self.sequential)
            if self.sequential:
                point.after(module)
            else:
                point.parallel(module, source="residual")

    def extract(self, model: Host, task: str, name: str | None = None) -> tuple[str, ...]:
        """Attach a task's bottlenecks to the model as a plain `adapter` (switched off), and return its name in the model.

        It gives what this adapter gives for the task; `model.save_adapter(folder, adapters=names)` writes it. Where this adapter
        trains norms of the backbone too, they come as a second adapter, `norm`, whose name is returned as well.

        Raises:
            UnknownNameError: this adapter has no such task.
        """
        if task not in self.tasks:
            raise UnknownNameError(f"'{self.method}' has no task '{task}'. {nearest(task, self.tasks)}")
        hyper: Any = self.hyper
        with torch.no_grad():
            made: dict[str, Weights] = hyper(task)
        if name is None and task != "default":  # which is no name for an adapter: it becomes "adapter"
            name = task
        place: dict[str, Any] = {"form": "houlsby"} if self.sequential else _BESIDE
        plain = registry.adapter(
            "adapter", **place, **self.widths(), targets=list(made), activation=self.activation, norm="out"
        )
        with model.all_or_nothing(), torch.no_grad():
            twin = model.add_adapter(plain, name, activate=False)
            names = [next(n for n, one in model.adapters.items() if one is twin)]
            for point, weights in made.items():
                part = twin.module_at(point)
                parts = (part.adapter_down, part.adapter_up, part.adapter_norm)
                for layer, weight, bias in zip(parts, weights[::2], weights[1::2], strict=True):
                    layer.weight.copy_(weight)
                    layer.bias.copy_(bias)
            if getattr(self, "train_norms", False):
                names.append(f"{names[0]}-norm")
                norms = model.add_adapter("norm", names[1], activate=False)
                trained = dict(self.named_parameters())
                for key, parameter in norms.named_parameters():
                    parameter.copy_(trained[key])
        return tuple(names)

    def widths(self) -> dict[str, Any]:
        """The settings of an `adapter` whose bottlenecks are as wide as these."""
        return {"rank": self.rank, "reduction": self.reduction}

    def merge(self, merger: Merger) -> None:
        """Never.

        Raises:
            MergeError: always.
        """
        raise MergeError(
            f"'{self.method}' cannot be merged: it is a network of its own at the sublayer, not a change of the weights. Take a "
            "task out as a plain adapter (extract), or keep the model as it is."
        )


# an `adapter` that stands beside the sublayer and adds what it computes as it is
_BESIDE: dict[str, Any] = {"form": "adaptformer", "scale": 1.0, "dropout": 0.0, "source": "residual"}
