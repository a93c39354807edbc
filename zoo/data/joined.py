"""Several data sets as one, one data set as several, and data with other labels: for regimes of many tasks and sessions.

both = join({"digits": digits, "flowers": flowers})          # labels one behind the other: 0..9, then 10..26
first, second = by_class(cifar, [5, 5])                      # sessions of five classes each
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from zoo.data.dataset import ImageDataset
from zoo.data.labels import bare
from zoo.data.sampling import known_labels
from zoo.data.seeds import mixed_seed
from zoo.errors import ConfigError, DataError, nearest

__all__ = [
    "ConcatRows",
    "JoinedRows",
    "RelabelledRows",
    "by_class",
    "join",
    "matched",
    "shuffled_labels",
    "with_classes",
]


class ConcatRows:
    """The rows of several data sets, one behind the other; the labels of part i are shifted by `offsets[i]`.

    `part` (n,) says to which each row belongs. A part keeps its own transform.
    """

    blocks: np.ndarray | None = None
    window = 1

    def __init__(self, datasets: Sequence[ImageDataset], offsets: Sequence[int] | None = None) -> None:
        self.datasets = [d._like(on_error="raise") for d in datasets]
        self.within = self.datasets[0]
        self.offsets = np.zeros(len(self.datasets), dtype=np.int64) if offsets is None else np.asarray(offsets)
        self.part = np.repeat(np.arange(len(self.datasets)), [len(d) for d in self.datasets])
        self._starts = np.concatenate([[0], np.cumsum([len(d) for d in self.datasets])])
        self.labels: np.ndarray | None = np.concatenate(
            [known_labels(d) + offset for d, offset in zip(self.datasets, self.offsets, strict=True)]
        )
        self.name = "+".join(dict.fromkeys(d.name for d in self.datasets))
        self.noun = self.datasets[0].noun

    def __len__(self) -> int:
        return len(self.part)

    def _place(self, index: int) -> tuple[ImageDataset, int, int]:
        part = int(self.part[index])
        return self.datasets[part], index - int(self._starts[part]), int(self.offsets[part])

    def read(self, index: int) -> tuple[Any, Any]:
        """(image, shifted label); with the part's own transform, if it has one."""
        dataset, place, offset = self._place(index)
        image, label = dataset[place]
        return image, int(label) + offset

    def where(self, index: int) -> str:
        """The place of a row in words."""
        dataset, place, _ = self._place(index)
        return dataset.where(place)


class JoinedRows(ConcatRows):
    """Data sets of different classes, which stand one behind the other too; `parts` are the names."""

    def __init__(self, datasets: Mapping[str, ImageDataset]) -> None:
        self.parts = list(datasets)
        self.sizes = [len(d.classes or ()) for d in datasets.values()]
        super().__init__(list(datasets.values()), [sum(self.sizes[:i]) for i in range(len(self.sizes))])


def join(datasets: Mapping[str, ImageDataset], *, on_error: Any = "raise") -> ImageDataset:
    """Several data sets as one; its classes are "<name>: <class>".

    Raises:
        ConfigError: none, or a name that is no word. DataError: data without known classes.
    """
    if not datasets:
        raise ConfigError("join needs at least one data set, by name.")
    for name, dataset in datasets.items():
        if not name.replace("_", "").replace("-", "").isalnum():
            raise ConfigError(f"'{name}' cannot name a task: use letters, digits, '-' and '_'.")
        if not dataset.classes:
            raise DataError(f"The classes of '{name}' ({dataset.name}) are not known. Open it with classes=[...].")
    classes = [f"{name}: {c}" for name, dataset in datasets.items() for c in dataset.classes or ()]
    return ImageDataset(JoinedRows(datasets), classes, on_error=on_error)


class RelabelledRows:
    """The rows of a data set, their labels mapped by a table (old label -> new one)."""

    def __init__(self, dataset: ImageDataset, table: np.ndarray) -> None:
        self.within, self.table = dataset._like(transform=None, on_error="raise"), table
        self.labels: np.ndarray | None = table[known_labels(dataset)]
        self.name, self.noun = dataset.name, dataset.noun
        self.blocks, self.window = dataset.blocks, dataset.rows.window

    def __len__(self) -> int:
        return len(self.within)

    def read(self, index: int) -> tuple[Any, Any]:
        """(image, new label)."""
        image, label = self.within[index]
        return image, int(self.table[int(label)])

    def where(self, index: int) -> str:
        """The place of a row in words."""
        return self.within.where(index)


def with_classes(dataset: ImageDataset, classes: Sequence[str]) -> ImageDataset:
    """The same data with these classes, in this order: labels follow their names.

    Raises:
        DataError: items of a class that is not among them.
    """
    names, labels = dataset.classes, known_labels(dataset)
    if names is None:
        raise DataError(f"The classes of '{dataset.name}' are not known. Open it with classes=[...].")
    place = {name: i for i, name in enumerate(classes)}
    for label in np.unique(labels):
        if names[label] not in place:
            raise DataError(
                f"{dataset.name}: '{names[label]}' is not among the classes. {nearest(names[label], place)}"
            )
    if list(names) == list(classes):
        return dataset
    table = np.asarray([place.get(name, -1) for name in names], dtype=np.int64)
    return ImageDataset(RelabelledRows(dataset, table), classes, transform=dataset.transform, on_error=dataset.on_error)


class ShuffledRows(RelabelledRows):
    """The rows of a data set, each with the label of another."""

    def __init__(self, dataset: ImageDataset, order: np.ndarray) -> None:
        super().__init__(dataset, np.arange(len(dataset.classes or ()) or int(known_labels(dataset).max()) + 1))
        self.labels = known_labels(dataset)[order]

    def read(self, index: int) -> tuple[Any, Any]:
        """(image, label of another row)."""
        assert self.labels is not None
        return self.within[index][0], int(self.labels[index])


def shuffled_labels(dataset: ImageDataset, seed: int = 0) -> ImageDataset:
    """The same items with their labels dealt out anew at random: a control, of which nothing about classes can be learned.

    As many items have each label as before.

    Raises:
        DataError: the items have no classes.
    """
    order = np.random.default_rng(mixed_seed(seed, "shuffled labels")).permutation(len(dataset))
    rows = ShuffledRows(dataset, order)
    return ImageDataset(rows, dataset.classes, transform=dataset.transform, on_error=dataset.on_error)


def matched(dataset: ImageDataset, names: Sequence[str] | None) -> ImageDataset:
    """Data that lack some of these named classes with all of them, labels by name; other data as they are."""
    own = dataset.classes
    if names is None or not own or bare(own) or len(own) >= len(names) or not set(own) <= set(names):
        return dataset
    return with_classes(dataset, list(names)) if dataset.targets is None else dataset


def by_class(
    dataset: ImageDataset, sizes: int | Sequence[int], order: Sequence[str] | None = None
) -> list[ImageDataset]:
    """A data set in sessions of disjoint classes.

    Args:
        sizes: how many classes each session has, or how many sessions there are (as equal as can be, the larger ones first).
        order: the classes in the order in which they come; by default that of the labels.

    Returns:
        The sessions; the classes of each are its own, its labels count from 0.

    Raises:
        ConfigError: sizes or an order that do not fit the classes.
    """
    names = dataset.classes
    if names is None:
        raise DataError(f"The classes of '{dataset.name}' are not known. Open it with classes=[...].")
    order = list(names if order is None else order)
    if sorted(order) != sorted(names):
        raise ConfigError(f"order must name each of the {len(names)} classes of '{dataset.name}' once.")
    if isinstance(sizes, int):
        if not 1 <= sizes <= len(names):
            raise ConfigError(f"{sizes} sessions of {len(names)} classes; expected 1 to {len(names)}.")
        sizes = [len(part) for part in np.array_split(np.arange(len(names)), sizes)]
    if min(sizes, default=0) < 1 or sum(sizes) != len(names):
        raise ConfigError(
            f"sizes are {list(sizes)}, {sum(sizes)} classes in all; '{dataset.name}' has {len(names)}, each session needs one."
        )
    labels, index = known_labels(dataset), {name: i for i, name in enumerate(names)}
    found, start = [], 0
    for size in sizes:
        own = order[start : start + size]
        start += size
        rows = np.flatnonzero(np.isin(labels, [index[name] for name in own]))
        found.append(with_classes(dataset.select(rows), own))
    return found
