"""Small adapters that read values of the forward pass and carry tensors, for the tests of what that survives.

They are not registered: the names of methods are those of the package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import zoo
from zoo.tasks import Classify


class Scaled(nn.Module):
    """x (n, ..., i) -> quality * x A^T (+ the row of its task), (n, ..., o)."""

    def __init__(self, dim_in: int, dim_out: int, quality: Any, task: Any, tasks: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(dim_out, dim_in) / dim_in)
        self.rows = nn.Parameter(torch.randn(tasks, dim_out) / 10)
        self.quality, self.task = quality, task

    def forward(self, x: Tensor) -> Tensor:
        wide = (-1, *[1] * (x.dim() - 2))
        scale, shift = self.quality.rows(x), self.rows[self.task.rows(x)]
        return (x @ self.a.T) * scale.view(*wide, 1) + shift.view(*wide, shift.shape[-1])


@dataclass(eq=False)
class ScaledByQuality(zoo.Adapter):
    """Reads a number and a name for each sample, at linear points."""

    method = "scaled-by-quality"

    targets: str = "q,v,up"
    tasks: tuple[str, ...] = ("birds", "cars")

    def attach(self, points: zoo.Points) -> None:
        quality = points.context("quality", example=lambda n: torch.linspace(0.5, 1, n))
        task = points.context("task", choices=self.tasks, example=self.tasks[0])
        for point in points.select(self.targets, kind="linear"):
            point.add(Scaled(point.dim_in, point.dim_out, quality, task, len(self.tasks)))


class Named(nn.Module):
    """y + the vector of the batch's task; half of it while there are labels."""

    def __init__(self, dim: int, tasks: tuple[str, ...], task: Any, labels: Any) -> None:
        super().__init__()
        self.vectors = nn.ParameterDict({name: nn.Parameter(torch.randn(dim) / 10) for name in tasks})
        self.task, self.labels = task, labels

    def forward(self, y: Tensor) -> Tensor:
        return y + self.vectors[self.task.get()] * (0.5 if self.labels.given else 1.0)


@dataclass(eq=False)
class ByTask(zoo.Adapter):
    """Reads one name for the batch, and labels if there are any."""

    method = "by-task"

    tasks: tuple[str, ...] = ("birds", "cars")

    def attach(self, points: zoo.Points) -> None:
        task = points.context("task", "batch", choices=self.tasks)
        labels = points.context("labels", required=False)
        for point in points.select(kind="sublayer", role="mlp"):
            point.after(Named(point.dim_out, self.tasks, task, labels))


class Step(nn.Module):
    """h <- tanh(h + x A): reads the stream inside of a block, changes it a little, and hands h on."""

    def __init__(self, dim: int, width: int, carried: Any) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(dim, width) / dim**0.5)
        self.b = nn.Parameter(torch.randn(width, dim) / 10)
        self.carried = carried

    def forward(self, y: Tensor) -> Tensor:
        before = self.carried.get(y)
        h = y @ self.a
        h = h if before is None else before.reshape(h.shape) + h  # (n, H, W, width) or (n, N, width)
        h = torch.tanh(h)
        self.carried.put(h)
        return y + h @ self.b


@dataclass(eq=False)
class Stepping(zoo.Adapter):
    """Carries h (n, ..., width) from each sublayer to the next of its stage."""

    method = "stepping"

    width: int = 3

    def attach(self, points: zoo.Points) -> None:
        for point in points.select(kind="sublayer"):
            carried = points.carried(f"h{point.stage}")  # a later stage has fewer tokens
            point.after(Step(point.dim_out, self.width, carried))


class Graded(Classify):
    """Classification with the brightness of each image as its quality, and one task."""

    name = "graded"

    def context(self, model: Any, inputs: Any, targets: Any, *, training: bool) -> dict[str, Any]:
        values = super().context(model, inputs, targets, training=training)
        return {**values, "quality": inputs.mean(dim=(1, 2, 3)), "task": "cars"}
