"""Several tasks of maps at once, for the regime `multitask`: each with its decoder, one backbone and adapter for all of them.

    data = {"parts": open_dense("camvid/train.parquet"), "edges": open_dense("camvid/train.parquet", "edges", derive="edges")}
    zoo.run(zoo.load("swin-b", "lora", num_classes=0), "multitask", data=data, test={...})

The loss of a batch is the mean over its items of the loss of each item's own task, on the logits of its decoder. A target is a
dict: "task" (B,), its number, and "map" (B, C, H, W) float32, C the most that a task has (classes are whole floats).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vision.data.dense import DenseDataset
from vision.data.dense_valued import check_valued
from zoo import registry
from zoo.errors import ConfigError, DataError
from zoo.host import Host
from zoo.tasks import Task, call

__all__ = ["ManyDense"]


class JoinedDense:
    """The pairs of several data sets, one behind the other; `part` (n,) says to which each belongs, `parts` their names."""

    labels: np.ndarray | None = None
    blocks: np.ndarray | None = None
    window = 1
    noun = "images"

    def __init__(self, datasets: Mapping[str, DenseDataset]) -> None:
        self.parts, self.datasets = list(datasets), [d._like(on_error="raise") for d in datasets.values()]
        self.on_error = [d.on_error for d in datasets.values()]
        sizes = [len(d) for d in self.datasets]
        self.part = np.repeat(np.arange(len(sizes)), sizes)
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self.name = "+".join(dict.fromkeys(d.name for d in self.datasets))

    def __len__(self) -> int:
        return len(self.part)

    def read(self, index: int) -> tuple[Any, Any]:
        """(image, {"task": its number, "map": the map}), or tensors where the part has a transform of its own."""
        number = int(self.part[index])
        image, value = self.datasets[number][index - int(self._starts[number])]
        return image, {"task": number, "map": value}

    def skips(self, index: int) -> bool:
        """Whether a pair that cannot be read is left out."""
        return self.on_error[int(self.part[index])] == "skip"

    def where(self, index: int) -> str:
        """The place of a pair in words."""
        number = int(self.part[index])
        return self.datasets[number].where(index - int(self._starts[number]))


class JoinedTransform:
    """The transform of each part; maps become float32 (channels, H, W)."""

    def __init__(self, transforms: Sequence[Any], channels: int) -> None:
        self.transforms, self.channels = list(transforms), channels

    def __call__(self, image: Any, target: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor]]:
        """See the class."""
        number = int(target["task"])
        transform = self.transforms[number]
        image, value = (image, target["map"]) if transform is None else transform(image, target["map"])
        planes = (value if value.ndim == 3 else value[None]).float()
        padded = F.pad(planes, (0, 0, 0, 0, 0, self.channels - len(planes)), value=float("nan"))
        return image, {"task": torch.tensor(number), "map": padded}

    def __repr__(self) -> str:
        return f"JoinedTransform({self.transforms!r})"


class ManyDense(Task):
    """All of them as one task. `single(name)` is one of them by itself, on the same model."""

    on_head = True
    head = "dense-tasks"
    noun = "images"
    weights: Mapping[str, float] = {}  # of the loss of an item in training, by task

    def __init__(self, data: Mapping[str, DenseDataset]) -> None:
        self.names = list(data)
        for name, dataset in data.items():
            if not name.replace("_", "").replace("-", "").isalnum():
                raise ConfigError(f"'{name}' cannot name a task: use letters, digits, '-' and '_'.")
            if not isinstance(dataset, DenseDataset):
                raise DataError(f"'{name}' is no data set of maps, and others are; open it with open_dense(...).")
        self.kinds = [getattr(d.rows, "task", "") for d in data.values()]
        # the Hub has no word for several
        self.hub = "image-segmentation" if "segment" in self.kinds else None  # type: ignore[misc]
        self.sizes = [len(d.classes or ()) for d in data.values()]
        self.classes = [f"{name}: {c}" for name, d in data.items() for c in d.classes or ()]
        self._tasks = {name: _One(name, kind, *self._place(i)) for i, (name, kind) in enumerate(zip(data, self.kinds))}
        self._joined = DenseDataset(JoinedDense(data), self.classes)

    def _place(self, number: int) -> tuple[int, int]:
        start = sum(self.sizes[:number])
        return start, start + self.sizes[number]

    @property
    def data(self) -> DenseDataset:
        """All data sets as one."""
        return self._joined

    def single(self, name: str) -> _One:
        """One of the tasks, on the logits of its decoder."""
        return self._tasks[name]

    def open(
        self, model: Host, data: Any, *, train: bool, split: str | None = None, augment: str | None = None
    ) -> DenseDataset:
        """The joined data with the preprocessing of each part."""
        if data.transform is not None:
            return data  # type: ignore[no-any-return]
        opened = [
            self._tasks[name].open(model, part, train=train, augment=augment).transform
            if part.transform is None
            else None
            for name, part in zip(self.names, data.rows.datasets, strict=True)
        ]
        channels = max(3 if kind == "normals" else 1 for kind in self.kinds)
        return data.with_transform(JoinedTransform(opened, channels))  # type: ignore[no-any-return]

    def check(self, model: Host, dataset: Any, what: str = "data set") -> None:
        """Raise unless the head has the outputs of all tasks."""
        model.family.check_wanted(("maps",), "this task")
        if model.num_classes != sum(self.sizes):
            raise ConfigError(f"The head has {model.num_classes} outputs, and the tasks {sum(self.sizes)} together.")
        joined = dataset.rows
        for name, part, on_error in zip(self.names, joined.datasets, joined.on_error, strict=True):
            check_valued(part._like(on_error=on_error), f"{what} of '{name}',")

    def check_batch(self, model: Host, dataset: Any, targets: Any) -> None:
        """Raise DataError for classes that a task does not have."""
        for name, rows, task in self._present(targets):
            self._tasks[name].check_batch(model, dataset, task.decoded(targets["map"][rows]))

    def loss(self, model: Host, inputs: Any, targets: Any, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """(mean over items, logits of all decoders)."""
        logits = call(model, inputs)
        total: Any = 0.0
        for name, rows, task in self._present(targets):
            loss, _ = task.of(model, logits[rows], task.decoded(targets["map"][rows]), label_smoothing)
            weight = self.weights.get(name, 1.0) if model.training else 1.0
            total = total + loss * (weight * len(rows) / len(logits))
        return total, logits

    def _present(self, targets: Any) -> list[tuple[str, Tensor, _One]]:
        """The tasks in a batch: (name, rows (n,), task)."""
        number = targets["task"]
        found = ((name, (number == i).nonzero()[:, 0]) for i, name in enumerate(self.names))
        return [(name, rows, self._tasks[name]) for name, rows in found if len(rows)]

    def context(self, model: Host, inputs: Any, targets: Any, *, training: bool) -> dict[str, Any]:
        """`task`: the batch's, or one for each sample."""
        found = [self.names[i] for i in targets["task"].tolist()]
        return {"task": found[0] if len(set(found)) == 1 else found}


class _One(Task):
    """A task of several: on the outputs `start` to `stop` of the head."""

    def __init__(self, name: str, kind: str, start: int, stop: int) -> None:
        self.task_name, self.start, self.stop = name, start, stop
        self._kind = cast("Any", registry.task(kind))
        self.monitor = self._kind.monitor  # type: ignore[misc]
        self._kind.width = stop - start

    def open(
        self, model: Host, data: Any, *, train: bool, split: str | None = None, augment: str | None = None
    ) -> DenseDataset:
        """As the task itself."""
        return self._kind.open(model, data, train=train, split=split, augment=augment)  # type: ignore[no-any-return]

    def check(self, model: Host, dataset: Any, what: str = "data set") -> None:
        """Raise unless there is something to measure; the head was made for these tasks."""
        check_valued(dataset, f"data set of '{self.task_name}',")

    def check_batch(self, model: Host, dataset: Any, targets: Any) -> None:
        """As the task itself."""
        self._kind.check_batch(model, dataset, targets)

    def decoded(self, planes: Tensor) -> Tensor:
        """The targets of the task itself, of maps (n, C, H, W)."""
        if self._kind.name == "normals":
            return planes
        return planes[:, 0] if self._kind.name == "depth" else planes[:, 0].long()

    def loss(self, model: Host, inputs: Any, targets: Any, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """(mean loss, the task's outputs)."""
        return self.of(model, call(model, inputs), targets, label_smoothing)

    def of(self, model: Host, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """Of the logits of all tasks."""
        return self._kind.of(model, logits[:, self.start : self.stop], targets, label_smoothing)  # type: ignore[no-any-return]

    def context(self, model: Host, inputs: Any, targets: Any, *, training: bool) -> dict[str, Any]:
        """Which task it is."""
        return {"task": self.task_name}

    def metrics(self, model: Host) -> Mapping[str, Any]:
        """Those of the task itself."""
        return self._kind.metrics(model)  # type: ignore[no-any-return]
