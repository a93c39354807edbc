"""Rows of image folders, of `datasets` from the Hub, and of any torch data set."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from zoo.data.dataset import Skipped
from zoo.data.images import decode, picture
from zoo.errors import DataError, MissingPackageError, nearest

__all__ = ["FolderRows", "HubRows", "TorchRows", "labels_of"]

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


class FolderRows:
    """An image folder: one subfolder per class, images anywhere below it.

    Classes are the subfolders in alphabetical order, or `class_names`; then a subfolder of another name is an error. Folders of
    something else override how a file is decoded, the endings of its name, and what messages say.
    """

    decode: Callable[[Any, str], Any] = staticmethod(decode)
    extensions: tuple[str, ...] = EXTENSIONS
    expected = "<class>/<image>, or Parquet files with an image column"
    nothing = "the data set is empty; {} class folders hold no image"

    blocks: np.ndarray | None = None
    window = 1

    def __init__(self, folder: Path, class_names: Sequence[str] | None = None, name: str = "") -> None:
        self.folder = folder
        self.name = name or folder.name
        found = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        if not found:
            raise DataError(f"{folder}: no class subfolders. Expected {folder.name}/{self.expected}.")
        self.class_names = list(class_names) if class_names is not None else found
        positions = {name: i for i, name in enumerate(self.class_names)}
        self._paths: list[str] = []
        labels: list[int] = []
        for class_name in found:
            if class_name not in positions:
                raise DataError(
                    f"{folder / class_name}: '{class_name}' is not among the {len(positions)} classes. "
                    f"{nearest(class_name, positions)}"
                )
            files = _files_below(folder / class_name, self.extensions)
            self._paths += files
            labels += [positions[class_name]] * len(files)
        if not self._paths:
            raise DataError(f"{folder}: {self.nothing.format(len(found))} ({', '.join(self.extensions)}).")
        self.labels: np.ndarray | None = np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._paths)

    def where(self, index: int) -> str:
        return str(self.folder / self._paths[index])

    def read(self, index: int) -> tuple[Any, int]:
        assert self.labels is not None
        where = self.where(index)
        return self.decode(read_file(where), where), int(self.labels[index])


def read_file(path: str | Path) -> bytes:
    """What a file holds.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error


def _files_below(folder: Path, extensions: tuple[str, ...]) -> list[str]:
    """Paths relative to the folder above `folder`, sorted."""
    found = []
    for root, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        base = Path(root).relative_to(folder.parent)
        found += [str(base / f) for f in sorted(files) if f.lower().endswith(extensions) and not f.startswith(".")]
    return found


class HubRows:
    """A data set of the Hub, read by the `datasets` library (the extra `data`), one split of it.

    Data sets of something else than images override how it is decoded and what the library calls such a column.
    """

    decode: Callable[[Any, str], Any] = staticmethod(decode)
    feature, setting = "Image", "image_column"  # the library's class of the column, and what messages call its name

    blocks: np.ndarray | None = None
    window = 1

    def __init__(
        self,
        name: str,
        split: str | None,
        *,
        image_column: str | None = None,
        label_column: str | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        try:
            import datasets
        except ImportError as error:
            raise MissingPackageError(
                f"Reading '{name}' from the Hub needs the package datasets: pip install 'adapter-zoo[data]'. If a local "
                "folder was meant: there is none of this name."
            ) from error
        self.name = name
        try:
            loaded = datasets.load_dataset(name, split=split)
        except Exception as error:
            reason = f"{error} ({error.__cause__})" if error.__cause__ is not None else str(error)
            raise DataError(f"The Hub data set '{name}' (split {split!r}) could not be loaded: {reason}") from error
        if isinstance(loaded, dict):
            if len(loaded) > 1:
                raise DataError(f"'{name}' has the splits {', '.join(loaded)}; choose one with split=...")
            loaded = next(iter(loaded.values()))
        features = loaded.features
        kind: Any = getattr(datasets, self.feature)
        fitting = [k for k, f in features.items() if isinstance(f, kind)]
        classes = [k for k, f in features.items() if isinstance(f, datasets.ClassLabel)]
        self.image_column = _column(name, image_column, fitting, list(features), self.setting)
        if self.image_column not in fitting:
            found = type(features[self.image_column]).__name__
            raise DataError(
                f"'{name}': {self.setting} '{self.image_column}' is of type {found}; expected {self.feature}."
            )
        self.label_column = _column(name, label_column, classes, list(features), "label_column")
        self._data = loaded.cast_column(self.image_column, kind(decode=False))
        names = getattr(features[self.label_column], "names", None)
        labels = np.asarray(loaded[self.label_column])
        if not len(labels):
            raise DataError(f"'{name}' (split {split!r}) is empty.")
        if labels.dtype.kind not in "iu":
            values = sorted(set(labels.tolist()))
            labels, names = np.searchsorted(np.asarray(values), labels), names or [str(v) for v in values]
        self.labels: np.ndarray | None = labels.astype(np.int64)
        self.class_names = list(class_names or names or map(str, range(int(labels.max()) + 1)))
        check_labels(self, len(self.class_names))

    def __len__(self) -> int:
        return len(self._data)

    def where(self, index: int) -> str:
        return f"{self.name}, row {index}"

    def read(self, index: int) -> tuple[Any, int]:
        assert self.labels is not None
        value = self._data[int(index)][self.image_column]
        data, path = value.get("bytes"), value.get("path")
        if data is None and path and Path(path).is_file():
            data = read_file(path)
        return self.decode(data, self.where(index)), int(self.labels[index])


def _column(name: str, wanted: str | None, fitting: list[str], known: list[str], setting: str) -> str:
    if wanted is not None:
        if wanted not in known:
            raise DataError(f"'{name}' has no column '{wanted}' ({setting}). {nearest(wanted, known)}")
        return wanted
    if len(fitting) != 1:
        raise DataError(f"'{name}': name one of its columns with {setting}=...; columns: {', '.join(known)}.")
    return fitting[0]


class TorchRows:
    """Any torch `Dataset` of (image, label) pairs; images are PIL images, uint8 tensors (C, H, W), or ready tensors."""

    blocks: np.ndarray | None = None
    window = 1

    def __init__(self, dataset: Dataset[Any], name: str = "") -> None:
        if isinstance(dataset, IterableDataset) or not (
            hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        ):
            raise DataError(
                f"{type(dataset).__name__} has no length or cannot be indexed; expected a map-style data set with __len__ and "
                "__getitem__ (shuffling and exact resume need both). Put its items into a list first."
            )
        self.dataset = dataset
        self.name = name or type(dataset).__name__
        if len(self) == 0:
            raise DataError(f"{self.name}: the data set is empty.")
        self.labels = labels_of(dataset)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def where(self, index: int) -> str:
        return f"{self.name}, item {index}"

    def read(self, index: int) -> tuple[Any, Any]:
        item = self.dataset[index]
        if isinstance(item, Skipped):
            raise DataError(f"{item.where}: {item.reason}")
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise DataError(f"{self.where(index)}: {type(item).__name__}; expected a pair (image, label).")
        image, label = item
        try:
            return picture(image), label
        except DataError as error:
            raise DataError(f"{self.where(index)}: {error}") from error


def labels_of(dataset: Any) -> np.ndarray | None:
    """All labels (n,) of a torch data set, where it holds them as a list, array or tensor; None otherwise."""
    if isinstance(dataset, Subset):
        inner = labels_of(dataset.dataset)
        return None if inner is None else inner[np.asarray(dataset.indices, dtype=np.int64)]
    values = dataset.tensors[1] if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2 else None
    for name in ("targets", "labels", "_labels"):
        values = getattr(dataset, name, None) if values is None else values
    if values is None or isinstance(values, str) or len(values) != len(dataset):
        return None
    try:
        labels = np.asarray(values)
    except (TypeError, ValueError, RuntimeError):
        return None
    return labels.astype(np.int64) if labels.ndim == 1 and labels.dtype.kind in "iu" else None


def check_labels(rows: Any, num_classes: int) -> None:
    """Raise DataError naming the first row whose label is outside 0..num_classes - 1."""
    if rows.labels is None:
        return
    wrong = np.flatnonzero((rows.labels < 0) | (rows.labels >= num_classes))
    if len(wrong):
        raise DataError(
            f"{rows.where(int(wrong[0]))}: label {rows.labels[wrong[0]]} is outside the {num_classes} classes "
            f"(0..{num_classes - 1}); {len(wrong)} such rows. Pass all class names as classes=[...], or mend the labels."
        )
