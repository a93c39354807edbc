"""Tasks: what a model is trained and evaluated for.

A task opens data of its kind, turns a batch into a loss, and says which numbers describe the result. `zoo.fit` and `zoo.evaluate`
do everything else. A model with a classification head is trained to classify; the others for what their family is for
(`Backbone.task`). Another package adds a task through the entry points `zoo.tasks`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ConfigError, DataError, MismatchError

if TYPE_CHECKING:
    from zoo.data.dataset import ImageDataset
    from zoo.model import Model

__all__ = ["Classify", "Custom", "Task", "call", "resolve"]


def call(model: Any, inputs: Any) -> Any:
    """`model` on a batch's inputs: a tuple or list is spread over its arguments, a dict over its keywords."""
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


class Task:
    """Base of all tasks. An instance may hold settings; it holds no state of a run."""

    name: ClassVar[str] = ""
    noun: ClassVar[str] = ""  # what the items of the data are called in reports; "": as the backbone calls them
    hub: ClassVar[str | None] = None  # the Hub's name of the task
    monitor: ClassVar[str] = "loss"  # by which number of an evaluation the best epoch is chosen
    on_head: ClassVar[bool] = False  # whether it trains a head, with an output for each class of the data

    def open(
        self, model: Model, data: Any, *, train: bool, split: str | None = None, augment: str | None = None
    ) -> ImageDataset:
        """A data set of (inputs, target); where it has no transform of its own, with the backbone's preprocessing."""
        dataset = model.family.open_dataset(data, split=split)
        if dataset.transform is None and not _ready(dataset):
            options = {"augment": augment} if train and augment is not None else {}
            dataset = dataset.with_transform(model.family.preprocess(train, **options))
        return dataset

    def items(self, model: Model) -> str:
        """What the items of the data are called: "images", "sounds", "pairs"."""
        return self.noun or model.family.noun

    def check(self, model: Model, dataset: ImageDataset, what: str = "data set") -> None:
        """Raise a ZooError unless model and data fit together."""

    def check_batch(self, model: Model, dataset: ImageDataset, targets: Any) -> None:
        """Raise a ZooError if a batch's targets do not fit the model."""

    def loss(self, model: Model, inputs: Any, targets: Any, label_smoothing: float = 0.0) -> tuple[Tensor, Any]:
        """(mean loss over the batch, the outputs that metrics and `extra_loss` see)."""
        raise TypeError(f"{type(self).__name__} does not implement loss.")

    def example(self, model: Model, inputs: Any, targets: Any) -> Any:
        """What the model is called with for a batch (`call`); by default its inputs. Its kept bytes are counted on that."""
        return inputs

    def metrics(self, model: Model) -> Mapping[str, Any]:
        """Numbers of an evaluation, by name: objects with `update(outputs, targets)`, `compute()` and `reset()`.

        `compute` may return a dict, whose entries then stand beside the others.
        """
        return {}


class Classify(Task):
    """One of the head's classes for each item: cross-entropy; accuracy and top-5 accuracy."""

    name, monitor, on_head = "classify", "accuracy", True

    def check(self, model: Model, dataset: ImageDataset, what: str = "data set") -> None:
        """Raise unless the head and the data set have the same classes."""
        if not model.num_classes:
            raise ConfigError(
                "The model has no classification head (num_classes=0). Load it with num_classes="
                f"{len(dataset.classes) if dataset.classes else '<number of classes>'}, or pass a loss of your own."
            )
        labels = dataset.labels
        if dataset.classes is not None and len(dataset.classes) != model.num_classes:
            raise MismatchError(
                f"The {what} '{dataset.name}' has {len(dataset.classes)} classes, the model's head {model.num_classes}. "
                f"Load the model with num_classes={len(dataset.classes)}, or open the data with classes=[...] (all "
                f"{model.num_classes} names, in the order of the labels)."
            )
        if labels is not None and len(labels) and not 0 <= labels.min() <= labels.max() < model.num_classes:
            wrong = int(((labels < 0) | (labels >= model.num_classes)).argmax())
            raise DataError(
                f"{dataset.where(wrong)}: label {labels[wrong]} is outside the model's {model.num_classes} classes "
                f"(0..{model.num_classes - 1})."
            )
        named = [c for c in (model.classes, dataset.classes) if c and not all(str(n).isdigit() for n in c)]
        if len(named) == 2 and named[0] != named[1]:
            first = next(i for i, (a, b) in enumerate(zip(*named, strict=True)) if a != b)
            raise MismatchError(
                f"Class {first} is '{named[0][first]}' for the model, '{named[1][first]}' in the {what} '{dataset.name}'. Open "
                "the data with classes=model.classes, so that equal labels mean equal classes."
            )

    def check_batch(self, model: Model, dataset: ImageDataset, targets: Tensor) -> None:
        """Raise DataError for labels that the head has no output for."""
        from zoo.train.batches import class_range

        classes = model.num_classes
        if classes and (found := class_range(targets)) is not None and not 0 <= found[0] <= found[1] < classes:
            wrong = found[0] if found[0] < 0 else found[1]
            raise DataError(
                f"{dataset.name}: a label {wrong} is outside the model's {classes} classes (0..{classes - 1}). Mend the "
                f"labels, or load the model with num_classes={max(found[1] + 1, classes)}."
            )

    def loss(self, model: Model, inputs: Any, targets: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """Cross-entropy; targets (B,) class indices or (B, num_classes) probabilities."""
        outputs = call(model, inputs).float()
        return F.cross_entropy(outputs, targets, label_smoothing=label_smoothing), outputs


class Custom(Task):
    """A loss of the user's own on the model's outputs."""

    name = "custom"

    def __init__(self, function: Callable[[Any, Any], Tensor]) -> None:
        self.function = function

    def loss(self, model: Model, inputs: Any, targets: Any, label_smoothing: float = 0.0) -> tuple[Tensor, Any]:
        """`function(outputs, targets)`, averaged."""
        outputs = call(model, inputs)
        outputs = outputs.float() if isinstance(outputs, Tensor) else outputs
        return self.function(outputs, targets).mean(), outputs


def resolve(model: Model, task: str | Task | None = None, loss: Callable[[Any, Any], Tensor] | None = None) -> Task:
    """The task that is meant: a loss of the user's own, a task or its name, or what the model is for.

    Raises:
        ConfigError: both a task and a loss. UnknownNameError: no such task.
    """
    if loss is not None:
        if task is not None:
            raise ConfigError("Give task= or loss=, not both: a task has its own loss.")
        return Custom(loss)
    if isinstance(task, Task):
        return task
    if task is None:
        task = "classify" if model.num_classes else model.family.task
    from zoo import registry

    return registry.task(task)


def _ready(dataset: ImageDataset) -> bool:
    """Whether a torch data set yields what the model takes already, rather than PIL images."""
    from zoo.data.sources import TorchRows
    from zoo.train.seeds import kept_generators

    if not isinstance(dataset.rows, TorchRows):
        return False
    with kept_generators(cuda=False):
        item = dataset[0]
    return isinstance(item, tuple) and not hasattr(item[0], "convert")
