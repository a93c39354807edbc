"""Batches for a calibration, before training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from zoo.train.batches import BatchPlan, make_loader
from zoo.train.evaluation import input_dtype, to_device

__all__ = ["Calibration"]


class Calibration:
    """Training batches for `calibrate`: (inputs, targets) on the device, the same on every process, from the start each time."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer  # a `zoo.train.trainer.Trainer`

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        trainer = self.trainer
        settings, device = trainer.settings, trainer.processes.device
        size = max(1, settings.batch_size // settings.accumulate)
        plan = BatchPlan(
            len(trainer.train), size, seed=settings.seed, blocks=trainer.plan.blocks, window=trainer.plan.window
        )
        for batch in make_loader(trainer.train, plan, workers=0, device=device, seed=settings.seed):
            if batch.count:
                trainer.task.check_batch(trainer.model, trainer.train, batch.targets)
                yield (
                    to_device(batch.inputs, device, input_dtype(trainer.model, settings.precision)),
                    to_device(batch.targets, device),
                )

    def __len__(self) -> int:
        size = max(1, self.trainer.settings.batch_size // self.trainer.settings.accumulate)
        return math.ceil(len(self.trainer.train) / size)
