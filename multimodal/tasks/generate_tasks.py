"""Several tasks of writing at once, for the regime `multitask`: each with its prefix, one network and adapter for all of them.

    data = {"vqa": "easy_vqa/train_questions.parquet", "nlvr": pairs_of_images, "caption": "flickr8k/train.parquet"}
    zoo.run(zoo.load("vl-t5-micro", "vl-adapter"), "multitask", data, test={...})

Every batch is of one task, since tasks have answers of different lengths and see different numbers of images; its loss is that
of the task "generate". A task whose name is one of `PREFIXES` ("vqa", "gqa", "nlvr", "caption" ...) has that prefix in front of
its questions, any other its name. (VL-Adapter's own runs write "gpa: " in front of GQA's.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multimodal.families.seq2seq.family import PREFIXES
from zoo.data.dataset import ImageDataset, Skipped
from zoo.errors import ConfigError, DataError
from zoo.host import Host
from zoo.tasks import Task

__all__ = ["ManyTexts"]


class JoinedTexts:
    """The items of several data sets, one behind the other; `part` (n,) says to which each belongs, `parts` their names."""

    labels: np.ndarray | None = None
    blocks: np.ndarray | None = None
    window = 1
    noun = "questions"

    def __init__(self, datasets: Mapping[str, ImageDataset], ready: bool = False) -> None:
        self.parts, self.datasets, self.ready = list(datasets), list(datasets.values()), ready
        sizes = [len(d) for d in self.datasets]
        self.part = np.repeat(np.arange(len(sizes)), sizes)
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self.name = "+".join(dict.fromkeys(d.name for d in self.datasets))

    def __len__(self) -> int:
        return len(self.part)

    def _place(self, index: int) -> tuple[int, int]:
        number = int(self.part[index])
        return number, index - int(self._starts[number])

    def read(self, index: int) -> tuple[Any, Any]:
        """(inputs, {"task": its number, "text": the target}); as the data set has it, before it was opened for a network.

        Raises:
            DataError: of a data set that leaves out what cannot be read.
        """
        number, place = self._place(index)
        item = self.datasets[number][place]
        if isinstance(item, Skipped):
            raise DataError(item.reason)
        return (item[0], {"task": torch.tensor(number), "text": item[1]}) if self.ready else item

    def where(self, index: int) -> str:
        """The place of a question in words."""
        number, place = self._place(index)
        return self.datasets[number].where(place)


class ManyTexts(Task):
    """All of them as one task. `single(name)` is one of them by itself, on the same model.

    Args:
        data: of each task, by name. make: its task, of its prefix. front: what makes features of images for a network.
    """

    noun = "questions"
    head = None
    one_task_a_batch = True
    weights: Mapping[str, float] = {}  # of the loss in training, by task

    def __init__(
        self, data: Mapping[str, ImageDataset], make: Callable[[str], Any], front: Callable[[Host], Any]
    ) -> None:
        self.names = list(data)
        for name in data:
            if not name.replace("_", "").replace("-", "").isalnum():
                raise ConfigError(f"'{name}' cannot name a task: use letters, digits, '-' and '_'.")
        self.classes: list[str] = []
        self._front = front
        self._tasks = {name: _One(name, make(PREFIXES.get(name, f"{name}: "))) for name in data}
        self._joined = _joined(data)

    @property
    def data(self) -> ImageDataset:
        """All data sets as one."""
        return self._joined

    def single(self, name: str) -> _One:
        """One of the tasks."""
        return self._tasks[name]

    def open(
        self, model: Host, data: Any, *, train: bool, split: str | None = None, augment: str | None = None
    ) -> ImageDataset:
        """The joined data, each part as its task opens it; what sees images is made once for all of them."""
        if data.rows.ready:
            return data  # type: ignore[no-any-return]
        front = self._front(model)
        opened = {}
        for name, part in zip(self.names, data.rows.datasets, strict=True):
            task = self._tasks[name]
            task.see(front)
            opened[name] = task.open(model, part, train=train)
        whole = _joined(opened, ready=True)
        return whole.select(data.indices)

    def check(self, model: Host, dataset: ImageDataset, what: str = "data set") -> None:
        """Raise unless the model writes text."""
        for task in self._tasks.values():
            task.check(model, dataset, what)

    def loss(self, model: Host, inputs: Any, targets: Any, label_smoothing: float = 0.0) -> tuple[Tensor, Any]:
        """(mean loss of the task of the batch, what it measures)."""
        name = self._of(targets)
        loss, measured = self._tasks[name].loss(model, inputs, targets["text"], label_smoothing)
        return loss * (self.weights.get(name, 1.0) if model.training else 1.0), measured

    def _of(self, targets: Any) -> str:
        numbers = targets["task"].unique().tolist()
        if len(numbers) > 1:
            raise ConfigError("A batch holds several tasks; texts are learnt with one task for each batch.")
        return self.names[numbers[0]]

    def context(self, model: Host, inputs: Any, targets: Any, *, training: bool) -> dict[str, Any]:
        """`task`: the batch's."""
        return {"task": self._of(targets)}


class _One(Task):
    """A task of several, as itself and with its name for adapters that read it."""

    def __init__(self, name: str, kind: Any) -> None:
        self.task_name, self._kind = name, kind
        self.prefix, self.monitor, self.hub = kind.prefix, kind.monitor, kind.hub  # type: ignore[misc]
        self.noun = kind.noun  # type: ignore[misc]

    def see(self, front: Any) -> None:
        """Take visual input from what all tasks have in common, unless it has something of its own."""
        if self._kind.vision is None:
            self._kind.vision = front

    def open(
        self, model: Host, data: Any, *, train: bool, split: str | None = None, augment: str | None = None
    ) -> ImageDataset:
        """As the task itself."""
        return self._kind.open(model, data, train=train, split=split)  # type: ignore[no-any-return]

    def check(self, model: Host, dataset: Any, what: str = "data set") -> None:
        """As the task itself."""
        self._kind.check(model, dataset, what)

    def loss(self, model: Host, inputs: Any, targets: Any, label_smoothing: float = 0.0) -> tuple[Tensor, Any]:
        """As the task itself."""
        return self._kind.loss(model, inputs, targets, label_smoothing)  # type: ignore[no-any-return]

    def context(self, model: Host, inputs: Any, targets: Any, *, training: bool) -> dict[str, Any]:
        """Which task it is."""
        return {"task": self.task_name}

    def metrics(self, model: Host) -> Mapping[str, Any]:
        """Those of the task itself."""
        return self._kind.metrics(model)  # type: ignore[no-any-return]


def _joined(datasets: Mapping[str, ImageDataset], ready: bool = False) -> ImageDataset:
    """As one, which leaves out what cannot be read if a part does: what others cannot read was said when they were opened."""
    skips = any(d.on_error == "skip" for d in datasets.values())
    return ImageDataset(JoinedTexts(datasets, ready), None, on_error="skip" if skips else "raise")
