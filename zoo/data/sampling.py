"""Choosing items by label: a few per class, a stratified split, how much each class weighs."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from zoo.data.dataset import ImageDataset, Skipped
from zoo.data.labels import read_labels
from zoo.errors import ConfigError, DataError

__all__ = ["class_weights", "few_shot", "known_labels", "split_train_val", "tag_weights", "warn_of_lost"]

FEW = 8


def few_shot(dataset: ImageDataset, shots: int, seed: int = 0) -> ImageDataset:
    """`shots` images of every class, drawn with `seed`, in the order of the data set.

    Raises:
        ConfigError: shots < 1.
        DataError: classes with fewer images; all of them are named.
    """
    if shots < 1:
        raise ConfigError(f"shots is {shots}; expected at least 1.")
    labels = known_labels(dataset)
    check_range(labels, dataset)
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

    Of items that have tags or numbers instead of one class each, about `fraction` of all are drawn.

    Raises:
        ConfigError: fraction is not between 0 and 1.
        DataError: no class has two images.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"val_fraction is {fraction}; expected a number between 0 and 1.")
    try:
        labels = known_labels(dataset)
    except NoClassesError:
        labels = np.zeros(len(dataset), dtype=np.int64)
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


def check_range(labels: np.ndarray, dataset: ImageDataset) -> None:
    """Raise DataError for labels below 0, or of more classes than can be meant."""
    read_labels(labels, dataset.where, dataset.classes, "classes")


def warn_of_lost(dataset: ImageDataset) -> None:
    """Warn of classes of which nothing can be read, so that nothing is left of them; those of up to 8 items are looked at."""
    labels, names = dataset.labels, dataset.classes
    if labels is None or names is None:
        return
    plain, lost = dataset.with_transform(None), []
    counts = np.bincount(labels, minlength=len(names))
    for label in np.flatnonzero((counts > 0) & (counts <= FEW)).tolist():
        if all(isinstance(plain[int(i)], Skipped) for i in np.flatnonzero(labels == label)):
            lost.append(names[label])
    if lost:
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        warnings.warn(
            f"{dataset.name}: no {dataset.noun} are left of the class{'es' * (len(lost) > 1)} {', '.join(lost[:5])}{more}: none "
            "there can be read, and all are skipped.",
            stacklevel=4,
        )


class NoClassesError(DataError):
    """Items have tags, numbers or something else instead of one class each."""


def known_labels(dataset: ImageDataset) -> np.ndarray:
    """(n,) labels; reads every item once where the source does not tell them.

    Raises:
        DataError: labels are no whole numbers.
    """
    if dataset.labels is not None:
        return dataset.labels
    if dataset.targets is not None:
        what = "several tags" if dataset.targets.ndim == 2 and dataset.classes is not None else "numbers"
        raise NoClassesError(f"{dataset.name}: items have {what} instead of one class each, which is asked for here.")
    plain = dataset.with_transform(None)
    labels = np.empty(len(dataset), dtype=np.int64)
    for i in range(len(dataset)):
        item = plain[i]
        if isinstance(item, Skipped):
            raise DataError(f"{item.where}: {item.reason}")
        label = item[1].tolist() if hasattr(item[1], "tolist") else item[1]
        if isinstance(label, bool) or not isinstance(label, int):
            raise NoClassesError(f"{dataset.where(i)}: the label is {label!r:.60}; expected a whole number.")
        labels[i] = label
    return labels


def class_weights(dataset: ImageDataset, count: int | None = None) -> Tensor:
    """(K,) float32, "balanced" as scikit-learn has it: n / (K n_c) of the K classes that occur, and 1 of the others.

    So all classes weigh equally in sum, and 1 on average over the items. Of tags it is how many items lack each for one
    that has it, the `pos_weight` of torch's binary cross-entropy.

    Raises:
        DataError: the items have no classes.
    """
    if dataset.targets is not None and dataset.targets.ndim == 2 and dataset.classes is not None:
        return torch.from_numpy(tag_weights(dataset.targets)).float()
    found = np.bincount(known_labels(dataset), minlength=count or len(dataset.classes or ()))
    share = found.sum() / (found > 0).sum()
    return torch.from_numpy(np.where(found > 0, share / np.maximum(found, 1), 1.0)).float()


def tag_weights(targets: np.ndarray) -> np.ndarray:
    """(n, K) of 0 and 1 -> (K,) noes for each yes; 1 of a class that no item has, or every one."""
    yes = targets.sum(0)
    mixed = (yes > 0) & (yes < len(targets))
    return np.where(mixed, (len(targets) - yes) / np.maximum(yes, 1), 1.0)
