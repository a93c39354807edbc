"""Which images make which batch, on which process.

A batch is the images of one optimizer step. It is cut into `accumulate * processes` parts that differ in size by at most one
image; process r computes the parts r, r + processes, ... one after the other. The order of an epoch depends on the seed and
the epoch alone, so neither the number of processes nor the number of parts changes what is learnt, and training can go
on in the middle of an epoch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from zoo.data.dataset import ImageDataset, Skipped, stack
from zoo.data.seeds import kept_generators, mixed_seed, seed_everything
from zoo.errors import ConfigError

__all__ = ["Batch", "BatchPlan", "make_loader"]

Key = tuple[int, int]  # (epoch, index)
MOST_WORKERS = 16  # beside few cores


@dataclass
class BatchPlan(Sampler[list[Key]]):
    """The batch sampler. Set `epoch` and `start` (the first batch of the epoch), then iterate over parts.

    Args:
        size: images in the data set.
        batch_size: images per optimizer step, over all processes and parts.
        parts: parts that each process computes one after the other.
        rank, world: this process and their number.
        drop_last: leave out a last batch that is not full.
        blocks, window: see `zoo.data.dataset.Rows`.
        sampled: epoch -> (size,) indices, instead of a shuffle (`zoo.train.samplers`).
    """

    size: int
    batch_size: int
    parts: int = 1
    rank: int = 0
    world: int = 1
    shuffle: bool = True
    seed: int = 0
    drop_last: bool = False
    blocks: np.ndarray | None = None
    window: int = 1
    sampled: Callable[[int], np.ndarray] | None = None
    epoch: int = field(default=0, init=False)
    start: int = field(default=0, init=False)
    stop: int | None = field(default=None, init=False)

    @property
    def batches(self) -> int:
        """Batches per epoch."""
        full, rest = divmod(self.size, self.batch_size)
        return full if self.drop_last or not rest else full + 1

    def batch_images(self, batch: int) -> int:
        """Images in a batch of the epoch, over all processes."""
        return min(self.batch_size, self.size - batch * self.batch_size)

    def order(self, epoch: int) -> np.ndarray:
        """(size,) indices in the order of an epoch."""
        if self.sampled is not None:
            return self.sampled(epoch)
        if not self.shuffle:
            return np.arange(self.size)
        random = np.random.default_rng(mixed_seed(self.seed, "order", epoch))
        if self.blocks is None:
            return random.permutation(self.size)
        # only rows of `window` blocks, which fit in memory together, are mixed
        names = random.permutation(np.unique(self.blocks))
        rank_of = np.empty(int(self.blocks.max()) + 1, dtype=np.int64)
        rank_of[names] = np.arange(len(names)) // max(1, self.window)
        mixed = random.permutation(self.size)
        return mixed[np.argsort(rank_of[self.blocks[mixed]], kind="stable")]

    def __iter__(self) -> Iterator[list[Key]]:
        order = self.order(self.epoch)
        pieces = self.parts * self.world
        for batch in range(self.start, self.batches if self.stop is None else min(self.stop, self.batches)):
            indices = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            split = np.array_split(indices, pieces)
            for part in range(self.rank, pieces, self.world):
                yield [(self.epoch, int(i)) for i in split[part]]

    def __len__(self) -> int:
        return (self.batches - self.start) * self.parts


@dataclass
class Batch:
    """A part of a batch: inputs (B, ...), targets (B,), how many images, and what could not be read."""

    inputs: Any
    targets: Any
    count: int
    skipped: list[tuple[str, str]]

    def pin_memory(self) -> Batch:
        pin = torch.utils.data._utils.pin_memory.pin_memory
        return Batch(pin(self.inputs), pin(self.targets), self.count, self.skipped)


class _Seeded(Dataset[Any]):
    """Gives every image random numbers of its own for its augmentation: (seed, epoch, index)."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitems__(self, keys: Sequence[Key]) -> list[Any]:
        items = []
        with kept_generators(cuda=False):
            for epoch, index in keys:
                seed_everything(self.seed, "image", epoch, index, cuda=False)
                items.append(self.dataset[index])
        return items


def _collate(items: Sequence[Any]) -> Batch:
    kept = [item for item in items if not isinstance(item, Skipped)]
    skipped = [(item.where, item.reason) for item in items if isinstance(item, Skipped)]
    if not kept:
        return Batch(None, None, 0, skipped)
    inputs, targets = stack(kept)
    return Batch(inputs, targets, len(kept), skipped)


def make_loader(
    dataset: ImageDataset, plan: BatchPlan, *, workers: int | None, device: torch.device, seed: int = 0
) -> DataLoader[Batch]:
    """A loader of `Batch`es in the order of `plan`. `workers` None: none beside a CPU model, up to 8 beside a GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers is not None and workers > max(MOST_WORKERS, 4 * cores):
        raise ConfigError(
            f"workers is {workers}, processes that would share {cores} cores; expected at most {max(MOST_WORKERS, 4 * cores)}."
        )
    if workers is None:
        workers = 0 if device.type == "cpu" else min(8, max(1, cores // plan.world - 1))
    if workers and hasattr(dataset.rows, "load"):
        dataset.rows.load()
    return DataLoader(
        _Seeded(dataset, seed),
        batch_sampler=plan,
        collate_fn=_collate,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=_one_thread if workers else None,
        generator=torch.Generator(),  # the loader draws a seed for its workers; not from the global generator
    )


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
