"""Choosing items by label: a few per class, or a stratified split."""

from __future__ import annotations

import numpy as np

from zoo.data.dataset import ImageDataset, Skipped
from zoo.errors import ConfigError, DataError

__all__ = ["few_shot", "known_labels", "split_train_val"]


def few_shot(dataset: ImageDataset, shots: int, seed: int = 0) -> ImageDataset:
    """`shots` images of every class, drawn with `seed`, in the order of the data set.

    Raises:
        ConfigError: shots < 1.
        DataError: classes with fewer images; all of them are named.
    """
    if shots < 1:
        raise ConfigError(f"shots is {shots}; expected at least 1.")
    labels = known_labels(dataset)
    classes = dataset.classes or [str(i) for i in range(int(labels.max()) + 1)]
    counts = np.bincount(labels, minlength=len(classes))
    if (counts < shots).any():
        short = [f"{classes[c]} ({counts[c]})" for c in np.flatnonzero(counts < shots)]
        listed = ", ".join(short[:8]) + (f" and {len(short) - 8} more" if len(short) > 8 else "")
        raise DataError(
            f"{dataset.name}: shots={shots} asks for more {dataset.noun} than these classes have: {listed}. "
            f"The largest possible value is {counts.min()}."
        )
    random = np.random.default_rng(seed)
    chosen = [random.permutation(np.flatnonzero(labels == c))[:shots] for c in range(len(classes))]
    return dataset.select(np.sort(np.concatenate(chosen)))


def split_train_val(dataset: ImageDataset, fraction: float = 0.1, seed: int = 0) -> tuple[ImageDataset, ImageDataset]:
    """(train, val): of every class about `fraction` of its images go to val, at least one of each class that has two.

    Raises:
        ConfigError: fraction is not between 0 and 1.
        DataError: no class has two images.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"val_fraction is {fraction}; expected a number between 0 and 1.")
    labels = known_labels(dataset)
    random = np.random.default_rng(seed)
    val = []
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        count = min(max(1, int(len(members) * fraction + 0.5)), len(members) - 1)
        val.append(members[:count])
    chosen = np.zeros(len(dataset), dtype=bool)
    chosen[np.concatenate(val)] = True
    if not chosen.any():
        raise DataError(
            f"{dataset.name}: no class has two {dataset.noun}, so none can be set aside. Pass val=..., or keep='last'."
        )
    return dataset.select(np.flatnonzero(~chosen)), dataset.select(np.flatnonzero(chosen))


def known_labels(dataset: ImageDataset) -> np.ndarray:
    """(n,) labels; reads every item once where the source does not tell them.

    Raises:
        DataError: labels are no whole numbers.
    """
    if dataset.labels is not None:
        return dataset.labels
    plain = dataset.with_transform(None)
    labels = np.empty(len(dataset), dtype=np.int64)
    for i in range(len(dataset)):
        item = plain[i]
        if isinstance(item, Skipped):
            raise DataError(f"{item.where}: {item.reason}")
        try:
            labels[i] = int(item[1])
        except (TypeError, ValueError) as error:
            raise DataError(f"{dataset.where(i)}: the label is {item[1]!r}; expected a whole number.") from error
    return labels
