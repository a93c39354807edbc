"""Features of a frozen backbone, computed once for each item and kept, where nothing but a head and queries are trained.

    model = zoo.load("vit-b16", "linear", num_classes=17)
    report = zoo.fit(model, "flowers/train", "flowers/val", epochs=100, cache_features=True)
    report.data["features"]                # {"items": 1040, "bytes": 3203200, "seconds": 41.3}

The losses are those of a fit that runs the backbone in every step, `augment="none"`, up to the rounding of batches of another
composition. The features of an item stand still only if all in front of the head does: adapters that stand in the backbone,
augmentation, mixup and cutmix are refused. The default augmentation is left out instead.

Queries (`vqt`) change nothing in the backbone: the keys and values that they read in every block stand still as well, and are
kept beside the pooled features (`zoo.train.frozen`). They are thousands of times as many numbers: 2 N d for a block, 14.5 MB for
an image of ViT-B/16 in float32 (half of it with precision="bf16") against 3 kB, so that is for hundreds of images.

Features are held in memory, up to `LIMIT` bytes or as many as `cache_features=` says, on a GPU if it has room. Several processes
compute a part each. Within the run an item is its place in the table; what else calls the model meanwhile (a callback with
images of its own) gets the model itself.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from zoo.data.dataset import ImageDataset, Skipped, stack
from zoo.data.seeds import seed_everything
from zoo.errors import ConfigError, DataError
from zoo.heads import Head
from zoo.tasks import Classify, Task
from zoo.tasks.multilabel import MultiLabel
from zoo.tasks.regress import Regress
from zoo.tasks.resolve import Custom
from zoo.train.batches import BatchPlan, make_loader
from zoo.train.evaluation import autocast, input_dtype, to_device
from zoo.train.frozen import Frozen, only_asks
from zoo.train.processes import Processes
from zoo.train.progress import Progress
from zoo.train.settings import Settings

if TYPE_CHECKING:
    from zoo.model import Model
    from zoo.train.report import Report

__all__ = ["LIMIT", "Kept", "check_still"]

LIMIT = 4 << 30
TRIED = 8  # items that are read twice before all are read
CHUNK = 1 << 26  # bytes that processes exchange at a time


def check_still(model: Model, task: Task, settings: Settings, streams: Any, callbacks: Sequence[Any]) -> None:
    """Raise ConfigError, with the reason, unless the features of an item are the same in every step."""
    asking = {name for name in model.active if only_asks(model, name)}
    moving = [name for name in model.parameters_to_train() if name.partition("/")[0] not in ("head", *asking)]
    standing = [a.method for n in model.active if n not in asking and not (a := model.adapters[n]).stateless]  # type: ignore[union-attr]
    reason = None
    if moving:
        reason = f"'{moving[0]}' is trained in front of the head ({len(moving)} such parameters), so features change"
    elif standing:
        reason = (
            f"'{standing[0]}' stands in front of the head, and although nothing of it is trained it may draw (dropout) while "
            "the head is"
        )
    elif isinstance(model.head, Head):
        reason = f"the head, a {type(model.head).__name__}, reads {', '.join(model.head.needs)} and not pooled features alone"
    elif type(task).loss not in (Classify.loss, MultiLabel.loss, Regress.loss, Custom.loss):
        reason = f"the task '{task.name or type(task).__name__}' has a loss of its own, which may use the inputs"
    elif settings.mixup or settings.cutmix:
        reason = "mixup and cutmix make new images in every step"
    elif isinstance(settings.augment, str) and settings.augment != "none":
        reason = f"augment='{settings.augment}' makes an item another one in every epoch; leave it out, or 'none'"
    elif streams:
        reason = "streams bring images into the steps"
    elif any(hasattr(c, "calibrate") for c in callbacks):
        reason = "a callback calibrates on the inputs"
    elif getattr(model, "_compiled_call_impl", None) is not None:
        reason = "the model is compiled, backbone and head in one"
    if reason is not None:
        raise ConfigError(
            f"cache_features keeps what only heads and queries are trained on, and {reason}. Train without it."
        )


class Kept:
    """The features of a run: `sets` (training, validation data) and `task` for its `Trainer`.

    Args:
        limit: bytes that features may take; True is `LIMIT`.

    Raises:
        ConfigError: more bytes than that, or items that are others each time they are read.
        DataError: as of a fit.
    """

    tables: list[Tensor]  # (n, d), and two (n, W, h, N, c) for each block that is asked; `val` stands behind `train`
    targets: Tensor  # (n,) or (n, K)
    known: Tensor  # (n,) 1 where an item could be read

    def __init__(
        self,
        model: Model,
        task: Task,
        train: ImageDataset,
        val: ImageDataset | None,
        settings: Settings,
        processes: Processes,
        *,
        workers: int | None,
        bar: Progress,
        limit: bool | int = True,
    ) -> None:
        self.model, self.settings, self.processes, self.given = model, settings, processes, (train, val)
        self.frozen = Frozen(model)
        began = time.perf_counter()
        model.to(processes.device)
        processes.share_module(model)
        datasets = [d for d in (train, val) if d is not None]
        training = model.training
        model.eval()
        try:
            for dataset in datasets:
                _try(_still(dataset))
            self._allocate(task, datasets, LIMIT if limit is True else int(limit))
            starts = [0, len(train)][: len(datasets)]
            for dataset, start in zip(datasets, starts, strict=True):
                self._fill(task, dataset, start, workers, bar)
        finally:
            model.train(training)
        for table in (*self.tables, self.targets, self.known):
            _share(table, processes)
        rows = [_Places(d, start, self) for d, start in zip(datasets, starts, strict=True)]
        made = [ImageDataset(r, d.classes, on_error=d.on_error) for r, d in zip(rows, datasets, strict=True)]
        self.sets = (made[0], made[1] if val is not None else None)
        if _has_room(processes.device, self.bytes):
            self.tables = [table.to(processes.device) for table in self.tables]
        self.task = copy.copy(task)
        self.task.__class__ = type(type(task).__name__, (_OnKept, type(task)), {"kept": self})
        self.seconds = time.perf_counter() - began
        bar.line(
            f"features of {len(self.known)} {task.items(model)} kept: {self.bytes / 1e6:.1f} MB, {self.seconds:.0f} s; "
            "the backbone does not run again, and nothing is augmented"
        )

    @property
    def bytes(self) -> int:
        """What the features take."""
        return sum(table.numel() * table.element_size() for table in self.tables)

    def _take(self, inputs: Any) -> list[Tensor]:
        """What is kept of a batch, on the device."""
        with autocast(self.processes.device, self.settings.precision):
            return self.frozen.take(to_device(inputs, self.processes.device, self._dtype))

    def _allocate(self, task: Task, datasets: Sequence[ImageDataset], limit: int) -> None:
        """Tables for all items, by the features of one."""
        first = next((item for item in map(datasets[0].__getitem__, range(len(datasets[0]))) if _read(item)), None)
        if first is None:
            raise DataError(f"{datasets[0].name}: none of the {datasets[0].noun} could be read.")
        inputs, target = stack([first])
        task.check_batch(self.model, datasets[0], target)
        seed_everything(self.settings.seed, "features")
        before = _generators(self.processes.device)
        one = self._take(inputs)
        if _generators(self.processes.device) != before:
            raise ConfigError(
                f"cache_features: '{self.model.backbone_name}' draws random numbers in its forward pass, so the features of an "
                "item are others each time. Train without it."
            )
        count, size = sum(map(len, datasets)), sum(t[0].numel() * t.element_size() for t in one)
        if count * size > limit:
            raise ConfigError(
                f"cache_features: {count} {task.items(self.model)} with {size} bytes of features each take {count * size} bytes; "
                f"the bound is {limit}. Say how many they may take (cache_features={count * size}), or train without it."
            )
        self.tables = [torch.zeros(count, *t.shape[1:], dtype=t.dtype) for t in one]
        self.targets = torch.zeros(count, *target.shape[1:], dtype=target.dtype)
        self.known = torch.zeros(count, dtype=torch.int64)

    @property
    def _dtype(self) -> torch.dtype | None:
        return input_dtype(self.model, self.settings.precision)

    def _fill(self, task: Task, dataset: ImageDataset, start: int, workers: int | None, bar: Progress) -> None:
        """This process's part of the features of a data set."""
        device, world = self.processes.device, self.processes.world
        size = max(1, self.settings.batch_size // self.settings.accumulate)
        plan = BatchPlan(len(dataset), size * world, rank=self.processes.rank, world=world, shuffle=False)
        loader = make_loader(_still(dataset), plan, workers=workers, device=device, seed=self.settings.seed)
        for batch, keys in zip(bar.over(loader, "features", len(plan)), plan, strict=True):
            if not batch.count:
                continue
            broken = {where for where, _ in batch.skipped}
            places = [start + i for _, i in keys if not broken or dataset.where(i) not in broken]
            task.check_batch(self.model, dataset, batch.targets)
            for table, part in zip(self.tables, self._take(batch.inputs), strict=True):
                table[places] = part.to("cpu", table.dtype)
            self.targets[places] = batch.targets.to(self.targets.dtype)
            self.known[places] = 1

    def in_place(self) -> AbstractContextManager[None]:
        """While entered, what the backbone gives a batch of places is read from the tables."""

        def read(*inputs: Any, **kwargs: Any) -> list[Tensor] | None:
            places = inputs[0] if len(inputs) == 1 and not kwargs else None
            if isinstance(places, Tensor) and places.ndim == 1 and places.dtype == torch.int64:
                return [table[places.to(table.device)].to(places.device) for table in self.tables]
            return None

        return self.frozen.instead(read)

    def close(self, trainer: Any, report: Report) -> None:
        """The run is over: its data are those that were given again, and the report says what was kept."""
        trainer.train, trainer.val = self.given
        seconds = round(self.seconds, 3)
        report.data["features"] = {"items": len(self.known), "bytes": self.bytes, "seconds": seconds}


class _OnKept:
    """In front of a task's class: its loss, on features from the table."""

    kept: ClassVar[Kept]

    def loss(self, model: Any, inputs: Any, targets: Any, label_smoothing: float = 0.0) -> tuple[Tensor, Any]:
        """As the task's."""
        with self.kept.in_place():
            return super().loss(model, inputs, targets, label_smoothing)  # type: ignore[misc,no-any-return]


class _Places:
    """Rows that are places in the table; they stand for those of `stands_for`, with its order, labels and broken items."""

    def __init__(self, source: ImageDataset, start: int, kept: Kept) -> None:
        self.stands_for, self.start, self.kept = source._like(on_error="raise"), start, kept
        self.name, self.noun, self.labels = source.name, source.noun, source.labels
        self.targets, self.blocks, self.window = source.targets, source.blocks, source.rows.window

    def __len__(self) -> int:
        return len(self.stands_for)

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """(place, target).

        Raises:
            DataError: the item could not be read when its features were to be made.
        """
        place = self.start + index
        if not self.kept.known[place]:
            self.stands_for[index]  # says what is wrong with it
            raise DataError(f"{self.where(index)}: could not be read when the features were made, and now it can.")
        return torch.tensor(place), self.kept.targets[place]

    def where(self, index: int) -> str:
        """The place of a row in words."""
        return self.stands_for.where(index)

    def __getstate__(self) -> dict[str, Any]:
        """For loader processes that are started anew: what is read, without the model."""
        slim = copy.copy(self.kept)
        slim.__dict__ = {"known": self.kept.known, "targets": self.kept.targets}
        return {**self.__dict__, "kept": slim}


class _Still(ImageDataset):
    """A data set whose items must not draw random numbers."""

    def _item(self, index: int) -> Any:
        before = _generators()
        item = super()._item(index)
        if _generators() != before:
            raise ConfigError(
                f"cache_features: {self.where(index)} is read with random numbers (an augmentation, or a source that draws), so "
                "its features are others each time. Give a transform that draws none, or train without it."
            )
        return item


def _still(dataset: ImageDataset) -> _Still:
    return _Still(
        dataset.rows,
        dataset.classes,
        transform=dataset.transform,
        indices=dataset.indices,
        on_error=dataset.on_error,
    )


def _try(dataset: _Still) -> None:
    """Read a few items twice: what draws from a generator of its own shows here."""
    for index in range(min(TRIED, len(dataset))):
        first, second = (tree_flatten(dataset[index])[0] for _ in range(2))
        pairs = zip(first, second, strict=True)
        if any(isinstance(a, Tensor) and not torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs):
            raise ConfigError(
                f"cache_features: {dataset.where(index)} is another item each time it is read. Give a transform that draws "
                "nothing, or train without it."
            )


def _read(item: Any) -> bool:
    return not isinstance(item, Skipped)


def _generators(device: torch.device | None = None) -> tuple[Any, ...]:
    """The states of the global generators, to be compared."""
    numpy: Any = np.random.get_state()
    gpu = torch.cuda.get_rng_state(device) if device is not None and device.type == "cuda" else torch.empty(0)
    states = (torch.get_rng_state().numpy().tobytes(), gpu.numpy().tobytes())
    return (random.getstate(), numpy[1].tobytes(), numpy[2:], *states)


def _has_room(device: torch.device, size: int) -> bool:
    return device.type == "cuda" and size <= torch.cuda.mem_get_info(device)[0] // 4


def _share(table: Tensor, processes: Processes) -> None:
    """Fill in what other processes have: each has zeros there."""
    if processes.world == 1:
        return
    wide = table.dtype if table.dtype == torch.float64 else torch.float32 if table.is_floating_point() else torch.int64
    for part in table.split(max(1, CHUNK * len(table) // max(1, table.numel() * table.element_size()))):
        part.copy_(processes.add(part.to(processes.device, wide, copy=True)))
