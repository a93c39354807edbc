"""Small data sets by name, each with items to train on and items to test on.

    sets = named_sets(cls, "cifar10", root=Path("data/"), shots=50)

A name is that of a folder below `root` (or below `ZOO_TEST_DATA`), or else whatever the backbone's data may be (a path,
"hf:owner/name"). It needs the splits `train` and `test`. A few sets have labels or splits of another kind, which stand in
`RECIPES`; `digits` comes with scikit-learn.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.data.dataset import ImageDataset
from zoo.data.digest import content
from zoo.data.sampling import few_shot, known_labels, split_train_val
from zoo.errors import DataError, MissingPackageError
from zoo.tasks import Classify

__all__ = ["RECIPES", "Sets", "named_sets", "ready"]

LARGEST = 2 << 30  # bytes of prepared items that are kept


@dataclass(frozen=True)
class Recipe:
    """How a named set is opened: its folder, and what `open_dataset` is given for all items, for training and for testing."""

    folder: str
    both: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=lambda: {"split": "train"})
    test: Mapping[str, Any] = field(default_factory=lambda: {"split": "test"})


RECIPES = {
    "cifar100": Recipe("cifar100", {"label_column": "label"}),
    "orl_faces": Recipe("orl_faces", {"label_column": "subject"}),
    "fsdd": Recipe("fsdd", {"label_column": "digit"}),
    "fsdd-speakers": Recipe("fsdd", {"label_column": "speaker"}),
    "esc10": Recipe("esc10", {}, {"only": {"fold": [1, 2, 3]}}, {"only": {"fold": [4]}}),
}


@dataclass(frozen=True)
class Sets:
    """Items of one data set: `train` for the final runs; `part` and `val`, which `train` was cut into, for the search."""

    name: str
    train: ImageDataset
    part: ImageDataset
    val: ImageDataset
    test: ImageDataset
    _digests: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False, compare=False)

    def digest(self, part: str) -> dict[str, Any]:
        """What the items of a part are, by their labels and contents (`zoo.data.digest`)."""
        if part not in self._digests:
            found = content(getattr(self, part))
            self._digests[part] = {key: found[key] for key in ("items", "labels", "contents")}
        return self._digests[part]

    @property
    def classes(self) -> list[str]:
        """The names of the classes."""
        assert self.train.classes is not None
        return self.train.classes


def named_sets(
    cls: Any,
    name: str,
    *,
    root: Path | None = None,
    shots: int | None = None,
    test_items: int | None = None,
    val_fraction: float = 0.2,
) -> Sets:
    """Open a data set by its name.

    Args:
        cls: the family of the backbone, which says what its data are.
        shots: train on so many items of every class, or as many as the smallest has. test_items: test on at most so many, drawn
            once for all.
        val_fraction: of the training items, for the search of learning rates.

    Raises:
        DataError: no such data, no training or test split, items without one class each.
    """
    train, test = _digits(cls) if name == "digits" else _opened(cls, name, root)
    if not train.classes or train.targets is not None:
        raise DataError(f"'{name}' has no single class for each item, and what is compared here are classifiers.")
    if shots is not None:
        smallest = int(np.bincount(known_labels(train), minlength=len(train.classes)).min())
        train = few_shot(train, min(shots, max(1, smallest)), seed=0)
    if test_items is not None and test_items < len(test):
        test = test.select(np.sort(np.random.default_rng(0).permutation(len(test))[:test_items]))
    part, val = split_train_val(train, val_fraction, seed=0)
    return Sets(name, train, part, val, test)


def _opened(cls: Any, name: str, root: Path | None) -> tuple[ImageDataset, ImageDataset]:
    recipe = RECIPES.get(name, Recipe(name))
    source = _place(recipe.folder, root)
    if source is None and name in RECIPES:
        raise DataError(
            f"'{name}' is not found: there is no folder '{recipe.folder}' in {_roots(root) or 'any data folder'}. Name the "
            "folder that holds it with --data-root or in ZOO_TEST_DATA."
        )
    try:
        train = cls.open_dataset(str(source or name), **recipe.both, **recipe.train)
        classes = train.classes
        test = cls.open_dataset(str(source or name), classes=classes, **recipe.both, **recipe.test)
    except TypeError as error:  # an option of another kind of data
        raise DataError(f"'{name}' is no data for {cls.family}, which takes {cls.noun}.") from error
    except DataError as error:
        hint = "" if source else f" It is no folder in {_roots(root) or 'a data folder (--data-root, ZOO_TEST_DATA)'}."
        raise DataError(f"'{name}': {error}{hint} A data set needs the splits 'train' and 'test'.") from error
    return train, test


def _place(folder: str, root: Path | None) -> Path | None:
    if not folder or folder.startswith((".", "/", "~", "hf:")):
        return None
    for place in (root, os.environ.get("ZOO_TEST_DATA")):
        if place is not None and (found := Path(place).expanduser() / folder).is_dir():
            return found
    return None


def _roots(root: Path | None) -> str:
    return " or ".join(str(p) for p in (root, os.environ.get("ZOO_TEST_DATA")) if p is not None)


def _digits(cls: Any) -> tuple[ImageDataset, ImageDataset]:
    """scikit-learn's 1,797 scanned digits of 8 x 8 pixels: 1,000 to train on, 797 to test on."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingPackageError("'digits' are scikit-learn's digits: pip install 'adapter-zoo[demo]'.") from error
    from PIL import Image

    if "image" not in cls.modality:
        raise DataError(f"'digits' are images, and {cls.family} takes {cls.noun}.")
    pack = load_digits()
    images = [Image.fromarray(np.uint8(i * 255 / 16)).convert("RGB") for i in pack.images]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()  # that of `zoo demo`
    names = [str(i) for i in range(10)]
    train, test = (
        cls.open_dataset([(images[i], int(pack.target[i])) for i in part], classes=names)
        for part in (order[:1000], order[1000:])
    )
    return train, test


class _Prepared:
    """Rows whose items are prepared for one backbone; kept once they were read, up to `LARGEST` bytes."""

    window = 1
    blocks: np.ndarray | None = None
    targets: np.ndarray | None = None

    def __init__(self, dataset: ImageDataset, name: str) -> None:
        self.name, self.dataset = name, dataset
        self.labels: np.ndarray | None = known_labels(dataset)
        self.items: dict[int, tuple[Any, int]] = {}
        self.bytes = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Any, int]:
        if index in self.items:
            return self.items[index]
        item, label = self.dataset[index]
        size = item.numel() * item.element_size() if isinstance(item, Tensor) else LARGEST
        if self.bytes + size <= LARGEST:
            self.items[index] = item, int(label)
            self.bytes += size
        return item, int(label)

    def where(self, index: int) -> str:
        return self.dataset.where(index)


def _same(item: Any) -> Any:
    return item


def ready(model: Any, dataset: ImageDataset) -> ImageDataset:
    """The same items as the backbone takes them, without augmentation: all methods of a backbone are given the same tensors."""
    prepared = Classify().open(model, dataset, train=False)
    return ImageDataset(_Prepared(prepared, dataset.name), dataset.classes, transform=_same)
