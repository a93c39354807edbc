"""An evaluation of a few items before the first step, so that what would fail after an hour fails now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zoo.data.dataset import ImageDataset
from zoo.errors import DataError
from zoo.tasks import Task
from zoo.train.evaluation import NotYet, run
from zoo.train.hooks import Unheard
from zoo.train.processes import Processes
from zoo.train.progress import Progress

if TYPE_CHECKING:
    from zoo.model import Model

__all__ = ["rehearsal"]


def rehearsal(
    model: Model, few: ImageDataset, processes: Processes, task: Task, precision: str, metrics: Mapping[str, Any]
) -> list[str] | None:
    """The names that an evaluation will give, found out on a few items; None if that is too few for one of them.

    Raises:
        ConfigError: a metric does not take the outputs and targets. Others as of an evaluation.
    """
    own = task.own.training if task.own is not None else False
    try:
        if task.own is not None:
            task.own.eval()
        result = run(
            model,
            few,
            processes,
            Unheard(model),
            batch_size=max(1, len(few)),
            task=task,
            precision=precision,
            workers=0,
            bar=Progress(False),
            metrics=metrics,
        )
    except NotYet:
        return None
    except DataError:
        if few.on_error == "raise":
            raise
        return None  # none of these few can be read
    finally:
        if task.own is not None:
            task.own.train(own)
    return list(result)
