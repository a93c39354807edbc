"""Which task is meant: a name, an object, a loss of the user's own, or what the model is for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from zoo import registry
from zoo.errors import ConfigError
from zoo.tasks.base import Task, call

if TYPE_CHECKING:
    from zoo.host import Host

__all__ = ["Custom", "resolve"]


class Custom(Task):
    """A loss of the user's own on the model's outputs."""

    name, labels = "custom", "any"

    def __init__(self, function: Callable[[Any, Any], Tensor]) -> None:
        self.function = function

    def loss(self, model: Host, inputs: Any, targets: Any, label_smoothing: float = 0.0) -> tuple[Tensor, Any]:
        """`function(outputs, targets)`, averaged."""
        outputs = call(model, inputs)
        outputs = outputs.float() if isinstance(outputs, Tensor) else outputs
        return self.function(outputs, targets).mean(), outputs


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
