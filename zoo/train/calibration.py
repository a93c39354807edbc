"""Batches for a calibration, before training; and a calibration by itself, for methods that need no more than that."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from zoo.arguments import DEVICE, FUNCTION, NOTHING, TEXT, typed, whole
from zoo.data.dataset import ImageDataset
from zoo.data.seeds import kept_generators, seed_everything
from zoo.engine.sharded import refuse
from zoo.errors import ConfigError
from zoo.tasks import Task
from zoo.tasks.resolve import resolve
from zoo.train.batches import BatchPlan, make_loader
from zoo.train.evaluation import MODEL, TASK, WORKERS, input_dtype, to_device
from zoo.train.hooks import Hooks
from zoo.train.processes import Processes

if TYPE_CHECKING:
    from zoo.model import Model

__all__ = ["Calibration", "calibrate"]


class Calibration:
    """Training batches for `calibrate`: (inputs, targets) on the device, the same on every process, from the start each time."""

    def __init__(
        self,
        model: Model,
        train: ImageDataset,
        task: Task,
        device: torch.device,
        *,
        size: int,
        seed: int,
        precision: str = "fp32",
        blocks: np.ndarray | None = None,
        window: int = 1,
        workers: int | None = 0,
    ) -> None:
        self.model, self.train, self.task, self.device = model, train, task, device
        self.size, self.seed, self.precision, self.workers = size, seed, precision, workers
        self.blocks, self.window = blocks, window

    @classmethod
    def of(cls, trainer: Any) -> Calibration:
        """Those of a fit, a `zoo.train.trainer.Trainer`."""
        settings, plan = trainer.settings, trainer.plan
        return cls(
            trainer.model,
            trainer.train,
            trainer.task,
            trainer.processes.device,
            size=max(1, settings.batch_size // settings.accumulate),
            seed=settings.seed,
            precision=settings.precision,
            blocks=plan.blocks,
            window=plan.window,
        )

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        return self.view(0)

    def view(self, number: int) -> Iterator[tuple[Any, Tensor]]:
        """The same items in the same order, augmented another time for each number; 0 is what iterating gives."""
        plan = self._plan()
        first = plan.order(0)
        plan.sampled, plan.epoch = (lambda epoch: first), number
        for batch in make_loader(self.train, plan, workers=self.workers, device=self.device, seed=self.seed):
            if batch.count:
                self.task.check_batch(self.model, self.train, batch.targets)
                yield (
                    to_device(batch.inputs, self.device, input_dtype(self.model, self.precision)),
                    to_device(batch.targets, self.device),
                )

    def _plan(self) -> BatchPlan:
        return BatchPlan(len(self.train), self.size, seed=self.seed, blocks=self.blocks, window=self.window)

    def __len__(self) -> int:
        return math.ceil(len(self.train) / self.size)


@typed(
    model=MODEL,
    task=TASK | NOTHING,
    batch_size=whole(1),
    augment=TEXT | FUNCTION | NOTHING,
    seed=whole(0),
    workers=WORKERS,
    device=DEVICE | NOTHING,
)
def calibrate(
    model: Model,
    train: Any,
    *,
    task: str | Task | None = None,
    batch_size: int = 64,
    augment: Any = None,
    seed: int = 0,
    workers: int | None = None,
    device: str | torch.device | None = None,
) -> None:
    """Let the active adapters see data as `zoo.fit` does in front of its first step, and train nothing.

    It is all that a method without training needs (`tip-adapter`); others choose here what they will train (`spt`). Adapters that
    were calibrated before are calibrated anew.

    Args:
        train: what `zoo.open_dataset` takes; never test data.
        task, batch_size, augment, seed, workers, device: as for `zoo.fit`.

    Raises:
        ConfigError: no adapter in use is calibrated. DataError, MismatchError: data that do not fit; the model is as it was.
    """
    adapters: list[Any] = [model.adapters[name] for name in model.active]
    chosen = [adapter for adapter in adapters if adapter.needs_calibration]
    if not chosen:
        have = ", ".join(f"'{a.method}'" for a in adapters) or "none"
        raise ConfigError(f"No adapter in use is calibrated (in use: {have}). Train them with zoo.fit.")
    refuse(model, ConfigError, "a calibration attaches anew", "Calibrate first, then call fully_shard.")
    what = resolve(model, task)
    dataset = what.open(model, train, train=True, augment=augment)
    what.check(model, dataset, "training data")
    if dataset.classes is not None and model.classes is None and len(dataset.classes) == model.num_classes:
        model.take_names(dataset.classes)
    processes = Processes(device, model)
    model.to(processes.device)
    batches = Calibration(
        *(model, dataset, what, processes.device),
        size=batch_size,
        seed=seed,
        blocks=dataset.blocks,
        window=dataset.rows.window,
        workers=workers,
    )
    hooks = Hooks(model)
    with kept_generators():
        seed_everything(seed, "calibrate")
        for adapter in chosen:
            hooks.calibrate_one(adapter, batches, what)
    processes.share_module(model)
    model.eval()
