"""Learning rates for those who do not know one: the default for few steps, and a short search (`lr="auto"`).

A method's `default_lr` is meant for a thousand steps or more. A few hundred images give fewer, and with Adam, whose steps are of
the size of the rate, they end before anything has moved far. So by default, over T steps,

    lr = default_lr * min(4, max(1, sqrt(1000 / T)))        but not above 0.01, or the method's own default if that is larger

and a batch is the largest power of two of at most a 16th of the items, from 8 to 64.

`lr="auto"` tries a third of the default, the default, and 3 and 10 times as much for equally many steps each (half of the run's,
at most 200), from the same start, and takes what has the least loss on the validation data, or on a fifth of the training data
set aside for the search; a task without a loss in evaluation (embeddings) is compared by what its epochs are chosen by. The
model is then as it was, and trained on everything.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from zoo.data.sampling import split_train_val
from zoo.errors import ConfigError
from zoo.train.choice import is_better_low
from zoo.train.failing import Before
from zoo.train.progress import Progress
from zoo.train.schedule import default_lr
from zoo.train.step import TrainingError

if TYPE_CHECKING:
    from zoo.model import Model

__all__ = ["default_batch_size", "few_steps", "search"]

ENOUGH, MOST, CEILING = 1000, 4.0, 1e-2
TRIED = (1 / 3, 1.0, 3.0, 10.0)
LEAST_STEPS, MOST_STEPS = 20, 200
PART = 0.2


def default_batch_size(items: int) -> int:
    """64, or less of few items: the largest power of two of at most a 16th of them, at least 8."""
    return max(8, min(64, 1 << max(0, (items // 16).bit_length() - 1)))


def few_steps(rate: float, total: int) -> float:
    """A method's default learning rate over so many steps."""
    return min(max(rate, CEILING), rate * min(MOST, max(1.0, math.sqrt(ENOUGH / max(1, total)))))


def search(trainer: Any) -> tuple[float | dict[str, float], list[dict[str, float]]]:
    """The learning rates for a run that is about to begin, and what was tried: "lr" and "loss", or what stands for it.

    Args:
        trainer: a `zoo.train.trainer.Trainer`; its model is as it was afterwards.

    Raises:
        ConfigError: every rate failed.
    """
    steps = max(1, min(trainer.total, max(LEAST_STEPS, min(MOST_STEPS, trainer.total // 2))))
    train, val = trainer.train, trainer.val
    if val is None:
        train, val = split_train_val(train, PART, trainer.settings.seed)
        val = val.with_transform(trainer.plain or val.transform)
    task = trainer.task
    what = "loss" if task.evaluated_loss else task.monitor
    sign = 1 if is_better_low(what, task.metrics(trainer.model)) else -1
    tried: list[dict[str, float]] = []
    for factor in TRIED:
        rates = _rates(trainer.model, factor)
        value = _try(trainer, train, val, rates, steps, what)
        first = rates if isinstance(rates, float) else rates["default"]
        tried.append({"lr": first, what: value if math.isfinite(value) else sign * math.inf})
        trainer.bar.line(f"lr auto: {first:g} gives a validation {what} of {value:.4f} after {steps} steps")
    best = min(range(len(tried)), key=lambda i: sign * tried[i][what])
    if not math.isfinite(tried[best][what]):
        names = ", ".join(format(trial["lr"], "g") for trial in tried)
        raise ConfigError(
            f"lr='auto' tried {names}, and the {what} is not finite with any of them. Look for NaN in the data."
        )
    trainer.bar.line(f"lr auto: {tried[best]['lr']:g}")
    return _rates(trainer.model, TRIED[best]), tried


def _rates(model: Model, factor: float) -> float | dict[str, float]:
    base = default_lr(model)
    adapters: Mapping[str, Any] = dict(model.adapters.items())
    own = {name: float(getattr(adapters[name], "default_lr", None) or base) for name in model.active}
    if all(rate == base for rate in own.values()):
        return base * factor
    return {"default": base * factor, **{name: rate * factor for name, rate in own.items()}}


def _try(trainer: Any, train: Any, val: Any, rates: Any, steps: int, what: str) -> float:
    """The validation loss, or what stands for it, after so many steps; NaN where it failed."""
    model = trainer.model
    before = Before(model, None)
    settings = replace(trainer.settings, lr=rates, steps=steps, ema=None, patience=None, keep="last")
    settings.monitor = trainer.task.monitor  # a trial has none of the further metrics, and chooses no epoch
    settings.accumulate = min(settings.accumulate, settings.batch_size)
    trial = type(trainer)(
        model,
        train,
        val,
        settings,
        trainer.processes,
        task=copy.copy(trainer.task),
        workers=trainer.workers,
        folder=None,
        every=None,
        callbacks=[],
        bar=Progress(False),
    )
    try:
        trial.prepare(False)
        while trial.run.step < trial.total:
            trial.one_epoch()
            trial.run.epoch, trial.run.batch = trial.run.epoch + 1, 0
        return float(trial.evaluate()[what])
    except TrainingError:
        return math.nan
    finally:
        before.undo()
