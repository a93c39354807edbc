"""Which task is meant: a name, an object, a loss of the user's own, or what the model is for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from zoo import registry
from zoo.errors import ConfigError
from zoo.tasks.base import Task, as_loss, call
from zoo.tasks.classify import Classify
from zoo.tasks.losses import Weighted

if TYPE_CHECKING:
    from zoo.data.dataset import ImageDataset
    from zoo.host import Host

__all__ = ["Custom", "objective", "of_classes", "resolve"]


class Custom(Task):
    """A loss of the user's own on the model's outputs."""

    name, labels = "custom", "any"

    def __init__(self, function: Callable[[Any, Any], Tensor]) -> None:
        self.function = function

    def loss(self, model: Host, inputs: Any, targets: Any, label_smoothing: float = 0.0) -> tuple[Tensor, Any]:
        """`function(outputs, targets)`, averaged.

        Raises:
            ConfigError: labels are to be smoothed, which only losses with a name do.
        """
        if label_smoothing:
            raise ConfigError("label_smoothing is part of the losses that have a name; smooth inside your own.")
        outputs = call(model, inputs)
        outputs = outputs.float() if isinstance(outputs, Tensor) else outputs
        return as_loss(self.function(outputs, targets)).mean(), outputs


def resolve(model: Host, task: str | Task | None = None, loss: Callable[[Any, Any], Tensor] | None = None) -> Task:
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
    return registry.task(task)


def objective(
    model: Host, task: str | Task | None, loss: str | Callable[[Any, Any], Tensor] | None, class_weights: Any = None
) -> Task:
    """The task that is meant, with the loss and the weights of classes that are asked for (`zoo.tasks.losses`).

    Raises:
        ConfigError: a task that has a loss of its own only. UnknownNameError: no such task.
    """
    if class_weights is None and (loss is None or (task is None and not isinstance(loss, str))):
        return resolve(model, task, None if isinstance(loss, str) else loss)
    what = resolve(model, task)
    if not isinstance(what, Weighted):
        given = "loss=" if loss is not None else "class_weights="
        raise ConfigError(
            f"The task '{what.name}' has a loss of its own; {given} is for classify, multilabel and regress."
        )
    return what.with_loss(loss, class_weights)


def of_classes(what: Task, model: Host, dataset: ImageDataset) -> Task:
    """The task itself; of a loss of the user's own on data of classes that the head has, the classification by that loss.

    So accuracy, class names and what is monitored stay, whatever the loss.
    """
    labels, count = dataset.labels, model.num_classes
    if type(what) is not Custom or labels is None or not len(labels) or count < 2:
        return what
    fits = len(dataset.classes) == count if dataset.classes else 0 <= labels.min() <= labels.max() < count
    return Classify().with_loss(what.function) if fits else what
