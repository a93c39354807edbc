"""Tasks: what a model is trained and evaluated for.

A task opens data of its kind, turns a batch into a loss, and says which numbers describe the result. `zoo.fit` and `zoo.evaluate`
do everything else. A model with a classification head is trained to classify; the others for what their family is for
(`Backbone.task`). Another package adds a task through the entry points `zoo.tasks`.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from zoo.data.labels import bare
from zoo.data.seeds import kept_generators
from zoo.errors import ConfigError, MismatchError
from zoo.fields import check_fields

if TYPE_CHECKING:
    from zoo.data.dataset import ImageDataset
    from zoo.host import Host

__all__ = ["Task", "call", "check_names", "check_whole", "seen_targets"]


def call(model: Any, inputs: Any, **options: Any) -> Any:
    """`model` on a batch's inputs: a tuple or list is spread over its arguments, a dict over its keywords."""
    if isinstance(inputs, (tuple, list)):
        return model(*inputs, **options)
    return model(**inputs, **options) if isinstance(inputs, dict) else model(inputs, **options)


def as_loss(loss: Any) -> Tensor:
    """What somebody's loss gives, which may be anything.

    Raises:
        ConfigError: it is no tensor of numbers.
    """
    if not isinstance(loss, Tensor) or not loss.is_floating_point():
        what = f"tensor of {str(loss.dtype)[6:]}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ConfigError(
            f"The loss gave a {what}; expected a tensor with a gradient, (outputs, targets) -> mean loss. Compute "
            "it with torch, without item(), float() or numpy."
        )
    return loss


def seen_targets(model: Any, targets: Any) -> dict[str, Any]:
    """The keyword with which a model is called, if its head sees targets and is being trained."""
    sees = model.training and getattr(getattr(model, "head", None), "sees_targets", False)
    return {"targets": targets} if sees else {}


class Task:
    """Base of all tasks. An instance may hold settings; of a run it holds the modules of its own, if it has some."""

    name: ClassVar[str] = ""
    noun: ClassVar[str] = ""  # what the items of the data are called in reports; "": as the backbone calls them
    hub: ClassVar[str | None] = None  # the Hub's name of the task
    monitor: ClassVar[str] = "loss"  # by which number of an evaluation the best epoch is chosen
    own: nn.Module | None = None  # what `modules` gave, in a run
    on_head: ClassVar[bool] = False  # whether it trains a head, with an output for each class of the data
    labels: ClassVar[str] = "auto"  # what labels it is trained on (`zoo.data.labels`)
    measures: ClassVar[bool] = False  # it measures only: there is no loss to report
    evaluated_loss: ClassVar[bool] = True  # whether its loss is a number in evaluation, too
    head: ClassVar[str | None] = None  # the kind of head that the command line gives a model for it; None: a linear one
    # Of a task that trains no head: how many outputs the command line gives a model for it; None: as many as it has
    head_width: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        """Of a task that is a dataclass: check the types of its settings. A subclass calls `super().__post_init__()` first."""
        check_fields(self, f"The task '{self.name or type(self).__name__}': {{}}")
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"The task '{self.name}': {field.name} is {value}; expected a finite number.")

    def open(
        self, model: Host, data: Any, *, train: bool, split: str | None = None, augment: str | None = None
    ) -> ImageDataset:
        """A data set of (inputs, target); where it has no transform of its own, with the backbone's preprocessing."""
        labels = {} if self.labels == "auto" else {"labels": self.labels}
        dataset = model.family.open_dataset(data, split=split, **labels)
        if dataset.transform is None and not _ready(dataset):
            options = {"augment": augment} if train and augment is not None else {}
            return dataset.with_transform(model.family.preprocess(train, **options))
        if train and augment not in (None, "none"):
            warnings.warn(
                f"augment is left out: '{dataset.name}' brings a transform of its own, or tensors that are ready for the model.",
                stacklevel=4,
            )
        _check_normalised(model, dataset)
        return dataset

    @classmethod
    def source(cls, data: Any, *, classes: list[str] | None = None, **options: Any) -> ImageDataset:
        """Data for a task whose `head` is not a linear one, before there is a model: with its classes.

        `classes` are those of the data that it is trained on, where these are others.

        Raises:
            TypeError: a task without.
        """
        raise TypeError(f"{cls.__name__} does not implement source.")

    def items(self, model: Host) -> str:
        """What the items of the data are called: "images", "sounds", "pairs"."""
        return self.noun or model.family.noun

    def check(self, model: Host, dataset: ImageDataset, what: str = "data set") -> None:
        """Raise a ZooError unless model and data fit together."""

    def check_batch(self, model: Host, dataset: ImageDataset, targets: Any) -> None:
        """Raise a ZooError if a batch's targets do not fit the model."""

    def loss(self, model: Host, inputs: Any, targets: Any, label_smoothing: float = 0.0) -> tuple[Tensor, Any]:
        """(mean loss over the batch, the outputs that metrics and `extra_loss` see)."""
        raise TypeError(f"{type(self).__name__} does not implement loss.")

    def example(self, model: Host, inputs: Any, targets: Any) -> Any:
        """What the model is called with for a batch (`call`); by default its inputs. Its kept bytes are counted on that."""
        return inputs

    def context(self, model: Host, inputs: Any, targets: Any, *, training: bool) -> dict[str, Any]:
        """Values for the forward passes of a batch (`zoo.engine.context`); those that no adapter reads are left out.

        By default the labels while training, for a single tensor of targets. An adapter that reads `labels` must not require
        them, since evaluation has none.
        """
        return {"labels": targets} if training and isinstance(targets, Tensor) else {}

    @classmethod
    def together(cls, data: Mapping[str, ImageDataset]) -> Any:
        """How several data sets of such tasks are learnt at once, for the regime `multitask`.

        A task with `data` (all of them as one), `classes` ("<name>: <class>"), `head` (the kind of its head) and
        `single(name)`, one of the tasks on the same model. A data set says its task as `dataset.rows.task`.

        Raises:
            ConfigError: it is for one task only.
        """
        raise ConfigError(f"The task '{cls.name}' is not learnt together with others.")

    def modules(self, model: Host) -> nn.Module | None:
        """Modules of the task's own (proxies, a decoder that aids), made anew for each run; None: it has none.

        They are trained with the model, as `task/<name>`, and checkpointed; `loss` finds them as `self.own`. They are not saved
        with adapters and not published.
        """
        return None

    def metrics(self, model: Host) -> Mapping[str, Any]:
        """Numbers of an evaluation, by name: objects with `update(outputs, targets)`, `compute()` and `reset()`.

        `compute` may return a dict, whose entries then stand beside the others.
        """
        return {}


def _ready(dataset: ImageDataset) -> bool:
    """Whether a data set of the user's yields what the model takes already, rather than PIL images."""
    rows: Any = dataset.rows
    while (within := getattr(rows, "within", None)) is not None:  # data sets made of others
        if within.transform is not None:
            return True
        rows = within.rows
    return hasattr(rows, "raw") and not rows.raw()


def _check_normalised(model: Host, dataset: ImageDataset) -> None:
    """Say so if images are given that look as `ToTensor` makes them, and the backbone was trained on normalised ones."""
    from zoo.data.preprocess import ImageTransform

    config = model.family.data_config()
    if "input_size" not in config or not config.get("mean"):
        return
    mean, std = tuple(config["mean"]), tuple(config.get("std") or ())
    plain = not any(mean) and all(s == 1 for s in std)
    if plain or isinstance(dataset.transform, ImageTransform):
        return
    largest = 0.0
    with kept_generators(cuda=False):
        for index in range(min(len(dataset), 4)):
            try:
                image = dataset[index][0]
            except Exception:  # what is wrong with it is said where it is read in earnest
                return
            if not isinstance(image, Tensor) or image.ndim != 3 or not image.is_floating_point() or image.min() < 0:
                return
            largest = max(largest, float(image.max()))
    if largest > 0:
        scale = "0..1, as torchvision's ToTensor makes them" if largest <= 1 else f"0..{largest:g}"
        warnings.warn(
            f"The images of '{dataset.name}' are not normalised: their values are {scale}, and '{model.backbone_name}' was "
            f"trained with mean {mean} and std {std}. Give PIL images or uint8 tensors, which are preprocessed; or end the "
            "transform with torchvision.transforms.Normalize(model.mean, model.std).",
            stacklevel=5,
        )


def check_whole(model: Host, task: str, outputs: int | None) -> None:
    """Raise ConfigError if the model's head says something of every pixel, and the task is of whole items."""
    if "maps" in getattr(getattr(model, "head", None), "needs", ()):
        raise ConfigError(
            f"The task '{task}' is of whole {model.family.noun}, and the model's head says something of every pixel. Load it "
            f"with num_classes={outputs or '<number of outputs>'} and without head=..., or pass data with maps and a task of "
            "them: task='segment' (or 'edges', 'depth', 'normals')."
        )


def check_names(
    model: Host,
    dataset: ImageDataset,
    what: str,
    mend: str = "Open the data with classes=model.classes, so that equal labels mean equal classes.",
) -> None:
    """Raise MismatchError if equal labels mean other classes for the model than in the data; bare numbers mean nothing.

    `mend` says what to do if they are in another order.
    """
    known, own = model.classes, dataset.classes
    if not known or not own or bare(known) or bare(own) or list(known) == list(own):
        return
    if len(known) != len(own):
        raise MismatchError(
            f"The model names {len(known)} classes, and the {what} '{dataset.name}' has {len(own)}. Name those of the head in "
            "use: model.classes = [...], or None."
        )
    first = next(i for i, (a, b) in enumerate(zip(known, own, strict=True)) if a != b)
    raise MismatchError(
        f"Class {first} is '{known[first]}' for the model, '{own[first]}' in the {what} '{dataset.name}'. {mend}"
    )
