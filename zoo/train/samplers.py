"""Samplers: which items make a batch, where a shuffle is not what is wanted.

    zoo.fit(model, train, sampler=PerClass(classes=8, each=4))

A sampler decides the indices of an epoch in the order in which they are cut into batches. It depends on the seed and the epoch
alone, as a shuffle does, so that processes, parts and resuming change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from zoo.data.dataset import ImageDataset
from zoo.data.sampling import known_labels
from zoo.data.seeds import mixed_seed
from zoo.errors import ConfigError, DataError, nearest

__all__ = ["Mixed", "OnePart", "PerClass", "Sampled", "Sampler"]


class Sampled(NamedTuple):
    """What a sampler makes of a data set: indices in an epoch, and epoch -> (size,) indices."""

    size: int
    order: Callable[[int], np.ndarray]


class Sampler:
    """Base of all samplers: dataclasses, whose `repr` says which one it is."""

    def over(self, dataset: ImageDataset, batch_size: int, seed: int) -> Sampled:
        """The sampler on a data set, for batches of this size.

        Raises:
            ConfigError, DataError: they do not go together.
        """
        raise TypeError(f"{type(self).__name__} does not implement over.")


@dataclass(frozen=True)
class PerClass(Sampler):
    """Every batch has `each` items of each of `classes` classes drawn at random (metric learning).

    An epoch has as many batches as a shuffle's. A class with fewer than `each` items gives some of them twice.
    """

    classes: int
    each: int

    def over(self, dataset: ImageDataset, batch_size: int, seed: int) -> Sampled:
        """See `Sampler`."""
        labels = known_labels(dataset)
        members = [np.flatnonzero(labels == c) for c in np.unique(labels)]
        if self.classes < 1 or self.each < 1 or self.classes * self.each != batch_size:
            raise ConfigError(
                f"PerClass(classes={self.classes}, each={self.each}) makes batches of {self.classes * self.each}, and "
                f"batch_size is {batch_size}. Make them equal."
            )
        if len(members) < self.classes:
            raise DataError(
                f"{dataset.name} has {len(members)} classes; PerClass wants {self.classes} of them in every batch."
            )
        batches = math.ceil(len(dataset) / batch_size)

        def order(epoch: int) -> np.ndarray:
            random = np.random.default_rng(mixed_seed(seed, "per class", epoch))
            rows = []
            for _ in range(batches):
                for c in random.permutation(len(members))[: self.classes]:
                    few = len(members[c]) < self.each
                    rows.append(random.choice(members[c], self.each, replace=few))
            return np.concatenate(rows)

        return Sampled(batches * batch_size, order)


def shares(dataset: ImageDataset, given: Mapping[str, float] | None, tau: float) -> tuple[list[np.ndarray], np.ndarray]:
    """The items of each part of a joined data set, and how often each is drawn: as given, or p ~ n^tau.

    Raises:
        ConfigError: not a joined data set, unknown parts, or shares that are not above 0.
    """
    names: list[str] = getattr(dataset.rows, "parts", None) or []
    if not names:
        raise ConfigError(
            f"'{dataset.name}' is one data set; this sampler chooses among the parts of zoo.data.join(...)."
        )
    part = dataset.rows.part[dataset.indices]  # type: ignore[attr-defined]
    members = [np.flatnonzero(part == i) for i in range(len(names))]
    if given is None:
        weights = np.asarray([float(len(m)) ** tau if len(m) else 0.0 for m in members])
    else:
        if wrong := [n for n in given if n not in names]:
            raise ConfigError(f"'{dataset.name}' has no part '{wrong[0]}'. {nearest(wrong[0], names)}")
        weights = np.asarray([float(given.get(n, 0.0)) for n in names])
    if (weights < 0).any() or not weights.sum() > 0 or any(w and not len(m) for w, m in zip(weights, members)):
        raise ConfigError(
            f"The shares of the parts are {weights.tolist()}; expected numbers above 0 of parts with items."
        )
    return members, weights / weights.sum()


def _drawn(members: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """`count` items in an order without repetition, begun anew when all have been drawn."""
    rounds = math.ceil(count / len(members))
    return np.concatenate([random.permutation(members) for _ in range(rounds)])[:count]


@dataclass(frozen=True)
class Mixed(Sampler):
    """Every item of a batch from a part of a joined data set, part i with probability p_i, as given or ~ n_i^tau.

    `tau` 1 is a shuffle's share, 0 an equal share of every part. An epoch has as many batches as a shuffle's.
    """

    shares: Mapping[str, float] | None = None
    tau: float = 1.0

    def over(self, dataset: ImageDataset, batch_size: int, seed: int) -> Sampled:
        """See `Sampler`."""
        members, p = shares(dataset, self.shares, self.tau)

        def order(epoch: int) -> np.ndarray:
            random = np.random.default_rng(mixed_seed(seed, "mixed", epoch))
            parts = random.choice(len(members), len(dataset), p=p)
            found = np.empty(len(dataset), dtype=np.int64)
            for i, own in enumerate(members):
                if places := int((parts == i).sum()):
                    found[parts == i] = _drawn(own, places, random)
            return found

        return Sampled(len(dataset), order)


@dataclass(frozen=True)
class OnePart(Sampler):
    """Every batch from one part of a joined data set (one task), part i with probability p_i, as given or ~ n_i^tau.

    An epoch has as many batches as a shuffle's. A part with fewer items than a batch gives some of them twice.
    """

    shares: Mapping[str, float] | None = None
    tau: float = 1.0

    def over(self, dataset: ImageDataset, batch_size: int, seed: int) -> Sampled:
        """See `Sampler`."""
        members, p = shares(dataset, self.shares, self.tau)
        batches = math.ceil(len(dataset) / batch_size)

        def order(epoch: int) -> np.ndarray:
            random = np.random.default_rng(mixed_seed(seed, "one part", epoch))
            parts = random.choice(len(members), batches, p=p)
            own = [
                iter(_drawn(m, int((parts == i).sum()) * batch_size, random)) if (parts == i).any() else iter(())
                for i, m in enumerate(members)
            ]
            return np.asarray([next(own[i]) for i in parts for _ in range(batch_size)], dtype=np.int64)

        return Sampled(batches * batch_size, order)
