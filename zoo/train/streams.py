"""Further streams of data beside the training data: what is replayed, what a second level is tuned on.

    zoo.fit(model, train, streams={"replay": old, "val": Stream(val, batch_size=16, ends="refuse")})

and, in a method that got `optimizer` in `fit_start`, at any moment of a step: `inputs, targets = optimizer.stream("replay")`.

Batch number n of a stream depends on the seed, the stream's name and n alone, so a resumed run needs no memory of how far
its streams were. It is whole on every process and for every part of a batch, so that a loss on it in `extra_loss` counts once.

A stream that ends begins again, each time in another order: that is what a replay or a validation stream beside a longer
training wants. `ends="refuse"` is for data of which every item may be seen once at most; a run that would need more is
refused before it begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from zoo.data.dataset import ImageDataset
from zoo.data.seeds import kept_generators, mixed_seed
from zoo.errors import ConfigError, DataError
from zoo.tasks import Task
from zoo.train.batches import Batch, BatchPlan, make_loader
from zoo.train.evaluation import input_dtype, to_device
from zoo.train.settings import Settings

if TYPE_CHECKING:
    import torch

    from zoo.model import Model

__all__ = ["Stream"]


class Stream:
    """Data for one stream.

    Args:
        data: what `zoo.open_dataset` takes, or a data set of it.
        batch_size: items of a batch; by default that of the training.
        ends: "restart" or "refuse".
    """

    dataset: ImageDataset

    def __init__(
        self, data: Any, *, batch_size: int | None = None, ends: Literal["restart", "refuse"] = "restart"
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size of a stream is {batch_size}; expected 1 or more.")
        if ends not in ("restart", "refuse"):
            raise ConfigError(f"ends is {ends!r}; expected 'restart' or 'refuse'.")
        self.data, self.batch_size, self.ends = data, batch_size, ends
        self._live: Iterator[Batch] | None = None
        self._next = -1
        self._held: tuple[int, Any, Any] | None = None

    @classmethod
    def of(cls, data: Any) -> Stream:
        """`data` itself if it is a stream, else a stream of it."""
        return data if isinstance(data, Stream) else cls(data)

    def open(self, name: str, model: Model, task: Task, augment: str | None = None) -> Stream:
        """A stream of its own for one run, its data opened as the task opens training data.

        Raises:
            DataError, MismatchError: data that do not fit the model.
        """
        twin = Stream(self.data, batch_size=self.batch_size, ends=self.ends)
        twin.name, twin.model, twin.task = name, model, task
        twin.dataset = task.open(model, self.data, train=True, augment=augment)
        task.check(model, twin.dataset, f"stream '{name}'")
        return twin

    name: str
    model: Model
    task: Task

    def begin(self, device: torch.device, settings: Settings, steps: int) -> None:
        """A run of so many steps is about to begin.

        Raises:
            ConfigError: it would need more batches than a stream that may not begin again has.
        """
        size = self.batch_size or settings.batch_size
        self._device, self._dtype = device, input_dtype(self.model, settings.precision)
        self._plan = BatchPlan(
            len(self.dataset),
            size,
            seed=mixed_seed(settings.seed, "stream", self.name),
            blocks=self.dataset.blocks,
            window=self.dataset.rows.window,
        )
        if self.ends == "refuse" and self._plan.batches < steps:
            raise ConfigError(
                f"The stream '{self.name}' ends after {self._plan.batches} batches of {size} and may not begin again, but the "
                f"run takes {steps} steps. Give it more data, a smaller batch_size, fewer steps, or ends='restart'."
            )

    def batch(self, number: int) -> tuple[Any, Any]:
        """(inputs, targets) number `number`, on the device."""
        if self._held is None or self._held[0] != number:
            found = self._read(number)
            if not found.count:
                raise DataError(
                    f"The stream '{self.name}': nothing of a batch could be read; first: {found.skipped[0][1]}"
                )
            self.task.check_batch(self.model, self.dataset, found.targets)
            inputs = to_device(found.inputs, self._device, self._dtype)
            self._held = (number, inputs, to_device(found.targets, self._device))
        return self._held[1], self._held[2]

    def _read(self, number: int) -> Batch:
        plan = self._plan
        epoch, place = divmod(number, plan.batches)
        with kept_generators(cuda=False):  # what is drawn for a batch here leaves the step's own random numbers alone
            if self._live is None or self._next != number or place == 0:
                plan.epoch, plan.start = epoch, place
                self._live = iter(make_loader(self.dataset, plan, workers=0, device=self._device, seed=plan.seed))
            self._next = number + 1
            return next(self._live)
