"""Samplers: which items make a batch, where a shuffle is not what is wanted.

    zoo.fit(model, train, sampler=PerClass(classes=8, each=4))
    zoo.fit(model, train, sampler="balanced")                             # Balanced(): all classes equally often
    zoo.fit(model, train, sampler=torch.utils.data.WeightedRandomSampler(weights, len(train)))

A sampler decides the indices of an epoch in the order in which they are cut into batches. It depends on the seed and the epoch
alone, as a shuffle does, so that processes, parts and resuming change nothing.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zoo.data.dataset import ImageDataset
from zoo.data.sampling import known_labels
from zoo.data.seeds import kept_generators, mixed_seed, seed_everything
from zoo.errors import ConfigError, DataError, nearest

__all__ = ["Balanced", "Mixed", "OnePart", "PerClass", "Sampled", "Sampler", "as_sampler"]


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


@dataclass(frozen=True)
class Balanced(Sampler):
    """Every item of a class drawn with probability p_c ~ n_c^tau, whatever classes a batch holds then.

    `tau` 0 draws all classes equally often, 1 is a shuffle's share. The items of a class are all drawn before one is drawn
    again; an epoch has as many as a shuffle's. Items with tags or numbers have no class and are refused.
    """

    tau: float = 0.0

    def over(self, dataset: ImageDataset, batch_size: int, seed: int) -> Sampled:
        """See `Sampler`."""
        labels = known_labels(dataset)
        members = [np.flatnonzero(labels == c) for c in np.unique(labels)]
        weights = np.asarray([float(len(m)) ** self.tau for m in members])

        def order(epoch: int) -> np.ndarray:
            random = np.random.default_rng(mixed_seed(seed, "balanced", epoch))
            return _spread(members, weights / weights.sum(), len(dataset), random)

        return Sampled(len(dataset), order)


@dataclass(frozen=True, repr=False)
class OfTorch(Sampler):
    """A sampler of torch (`WeightedRandomSampler`, `SubsetRandomSampler` ...), seeded anew for each epoch."""

    sampler: Any

    def over(self, dataset: ImageDataset, batch_size: int, seed: int) -> Sampled:
        """See `Sampler`; raises ConfigError for indices that the data set does not have, or batches of them."""

        def order(epoch: int) -> np.ndarray:
            found = getattr(self.sampler, "generator", None)
            own = found if isinstance(found, torch.Generator) else None
            state = None if own is None else own.get_state()
            if hasattr(self.sampler, "set_epoch"):
                self.sampler.set_epoch(epoch)
            with kept_generators(cuda=False):
                seed_everything(seed, "sampler", epoch, cuda=False)
                if own is not None:
                    own.manual_seed(mixed_seed(seed, "sampler", epoch))
                try:
                    return self._indices(list(self.sampler), len(dataset))
                finally:
                    if own is not None and state is not None:
                        own.set_state(state)

        return Sampled(len(order(0)), order)

    def _indices(self, found: list[Any], size: int) -> np.ndarray:
        name = type(self.sampler).__name__
        if not found or any(isinstance(i, (list, tuple)) for i in found):
            raise ConfigError(
                f"the sampler {name} gives {'batches' if found else 'nothing'}; expected indices of items."
            )
        indices = np.asarray([int(i) for i in found], dtype=np.int64)
        if indices.min() < 0 or indices.max() >= size:
            raise ConfigError(
                f"the sampler {name} gives the index {indices.max() if indices.max() >= size else indices.min()}, and the "
                f"data set has {size} items. (A part of it set aside to choose on leaves fewer: pass val=...)"
            )
        return indices

    def __repr__(self) -> str:
        held = {
            k: v for k, v in vars(self.sampler).items() if isinstance(v, (bool, int, float, str, Tensor, list, tuple))
        }
        plain = {k: np.asarray(v).tolist() for k, v in held.items()}
        return f"{type(self.sampler).__name__}({zlib.crc32(repr(plain).encode()):08x})"


NAMED: dict[str, type[Sampler]] = {"balanced": Balanced}


def as_sampler(given: Any) -> Sampler | None:
    """A sampler by its name, one of torch's, or one as it is.

    Raises:
        ConfigError: it is none.
    """
    if given is None or isinstance(given, Sampler):
        return given
    if isinstance(given, str) and given in NAMED:
        return NAMED[given]()
    if isinstance(given, torch.utils.data.Sampler):
        return OfTorch(given)
    raise ConfigError(
        f"sampler is {given!r}; expected one of zoo.train: PerClass, Balanced, Mixed, OnePart; 'balanced', or a sampler of torch."
    )


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


def _spread(members: list[np.ndarray], p: np.ndarray, size: int, random: np.random.Generator) -> np.ndarray:
    """`size` items, each of part i with probability p_i, in an order without repetition within the part."""
    parts = random.choice(len(members), size, p=p)
    found = np.empty(size, dtype=np.int64)
    for i, own in enumerate(members):
        if places := int((parts == i).sum()):
            found[parts == i] = _drawn(own, places, random)
    return found


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
            return _spread(members, p, len(dataset), random)

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
