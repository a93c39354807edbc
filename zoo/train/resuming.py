"""Going on with a run under other settings: more epochs, another batch size, another learning rate.

A run goes on by itself with the settings that it began with, to exactly the numbers of an unbroken one, and beyond its end where
it is asked for more epochs (or steps). Other changes are asked for by name: `zoo.fit(..., resume=["lr", "batch_size"])`.

What was trained so far, and the optimizer's state, stay. Beyond the end of a finished run a new leg begins, with a warm-up and a
schedule of its own. In the middle of a run the schedule goes on from the part of it that is done. With another batch size the
epoch in progress begins again. A run whose steps ended in the middle of an epoch goes on there: what was left of the epoch comes
first, and the epoch's record is that of all of it (its hooks at the end are called a second time). Every change stands in the
report (`settings["changes"]`).

`trainer` below is a `zoo.train.trainer.Trainer`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from zoo.errors import ConfigError
from zoo.train.checkpoint import LAST, Saved
from zoo.train.schedule import warmup_steps
from zoo.train.settings import CHANGEABLE

__all__ = ["asked", "batches_of_epoch", "length", "may_differ", "new_leg"]


def asked(resume: bool | Iterable[str], folder: Path | None) -> tuple[bool, tuple[str, ...]]:
    """Whether to go on at all, and which settings may differ.

    Raises:
        ConfigError: a name of nothing that may be changed, or no checkpoint to go on from under other settings.
    """
    if isinstance(resume, bool):
        return resume, ()
    names = tuple(resume)
    if wrong := [name for name in names if name not in CHANGEABLE]:
        raise ConfigError(
            f"resume names '{wrong[0]}', which a run that goes on keeps. It may change: {', '.join(CHANGEABLE)}."
        )
    if names and (folder is None or not (folder / LAST).is_file()):
        where = "no checkpoint= is given" if folder is None else f"'{folder}' holds no checkpoint"
        raise ConfigError(
            f"resume asks to go on under another {', '.join(names)}, and {where}: there is nothing to go on from. Name the "
            "folder of the run's checkpoints, or leave resume out to begin anew."
        )
    return True, names


def may_differ(saved: Saved, different: dict[str, str], names: tuple[str, ...], trainer: Any) -> list[str]:
    """Of what differs, the names that may: those asked for, and a larger number of epochs or steps of a finished run."""
    allowed = list(names)
    if saved.state["run"]["finished"]:
        former, now = saved.state["identity"]["settings"], trainer.settings
        longer = now.epochs > former["epochs"] if now.steps is None else now.steps > (former["steps"] or 0)
        allowed += ["epochs", "steps"] if longer and (now.steps is None) == (former["steps"] is None) else []
    if set(different) & {"epochs", "steps", "batch_size", "drop_last"} & set(allowed):
        for name in trainer.model.active:
            if getattr(trainer.model.adapters[name], "plans_steps", False):
                raise ConfigError(
                    f"'{name}' planned its schedule over the steps of the run, and they would be others now. Train a saved "
                    "adapter further as a run of its own (another checkpoint folder)."
                )
    return allowed


def length(trainer: Any) -> tuple[int, int]:
    """(steps, epochs) of the whole run, by the present settings from where they began."""
    run, batches, settings = trainer.run, trainer.plan.batches, trainer.settings
    total = settings.steps or run.leg_step + max(0, settings.epochs - run.leg_epoch) * batches
    return total, run.leg_epoch + math.ceil(max(0, total - run.leg_step) / batches)


def batches_of_epoch(trainer: Any) -> int:
    """How many batches the present epoch has: the last one ends with the run."""
    run, batches = trainer.run, trainer.plan.batches
    return min(batches, trainer.total - run.leg_step - (run.epoch - run.leg_epoch) * batches)


def new_leg(trainer: Any, saved: Saved, rates: Mapping[str, float]) -> None:
    """Adapt a run that was read from a checkpoint, and its learning rates, to the settings that changed.

    Args:
        rates: the multiplier of each parameter's learning rate by the present settings.

    Raises:
        ConfigError: nothing is left to do by what was asked for.
    """
    run, service, changed = trainer.run, trainer.service, saved.different.keys()
    done: float = run.epoch + run.batch / max(1, run.batches)
    other_batches = changed & {"batch_size", "drop_last"}
    if run.finished and run.cut and "steps" in changed and not other_batches:
        run.epoch, run.batch, run.sums = run.epoch - 1, run.cut["batch"], run.cut["sums"]
        run.epoch_seconds = run.cut["epoch_seconds"]
        run.history.pop()
        run.layers = [entry for entry in run.layers if entry["epoch"] <= run.epoch]
    if other_batches and run.batch:  # the batches that are left are not those of the new size
        run.batch, run.epoch_seconds, run.sums = 0, 0.0, [0.0] * len(run.sums)
        done = run.epoch
    if run.finished and changed & {"epochs", "steps", "patience"}:
        run.leg_step, run.leg_epoch, run.begun = run.step - run.batch, run.epoch, [run.epoch, run.step]
        run.finished, run.stopped, run.waited = False, False, 0
    elif other_batches:
        run.leg_step, run.leg_epoch = run.step, run.epoch
    trainer.total, trainer.epochs = length(trainer)
    if trainer.total <= run.step and not run.finished:
        raise ConfigError(
            f"{run.epoch} epochs and {run.step} steps are done, and no more are asked for. Ask for more epochs, or take the "
            "saved adapter."
        )
    if changed & {"epochs", "steps", "batch_size", "drop_last", "schedule", "warmup", "patience"}:
        _schedule(trainer, done)
    if "lr" in changed:
        service.lr = trainer.base_lr
        for name, scale in rates.items():
            if name in service.parameters:
                service.scale_lr(name, scale)
    if "precision" in changed:
        run.scale = {}
    run.changes.append({"epoch": run.epoch, "step": run.step, **saved.different})
    trainer.bar.line(f"going on from epoch {run.epoch}, step {run.step}: {'; '.join(saved.different.values())}")


def _schedule(trainer: Any, done: float) -> None:
    """Let the schedule stand where so many epochs of the present settings would have brought it, and end with the run.

    Groups that came in later (`OptimizerService.add`) keep their own beginning.
    """
    run, service, settings = trainer.run, trainer.service, trainer.settings
    epoch, step = run.begun
    if settings.steps is None:
        part = (done - epoch) / max(1, settings.epochs - epoch)
    else:
        part = (run.step - step) / max(1, settings.steps - step)
    left = trainer.total - run.step
    former, run.birth = run.birth, run.step - round(left * part / (1 - part)) if part < 1 else run.step
    service.total_steps = trainer.total
    for group in service.groups:
        if group["birth"] == former and group["schedule"] is not None:
            group["birth"], group["schedule"] = run.birth, settings.schedule
            group["warmup"] = warmup_steps(settings.warmup, trainer.total - run.birth)
