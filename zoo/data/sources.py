"""Rows of data sets that are objects already: torch data sets, lists, rows of names, streams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, Subset, TensorDataset

from zoo.data.dataset import Skipped
from zoo.data.folders import read_file
from zoo.data.hub import is_hub
from zoo.data.labels import Labelled, bare, parsed, read_labels
from zoo.data.medium import IMAGES, Medium
from zoo.data.names import own_classes, placed, places
from zoo.data.seeds import kept_generators
from zoo.data.unwrap import held
from zoo.errors import DataError, nearest

__all__ = ["TorchRows", "labels_of"]

SCAN = 10_000  # so many items are read for their labels alone


class TorchRows(Labelled):
    """Any torch `Dataset` or sequence of pairs (item, label), or of rows {"image": ..., "label": ...}; a stream is read once.

    Items are what the medium accepts (PIL images, uint8 arrays, encoded bytes, paths), or what is ready for the model. Labels
    that are texts get numbers, in the order of `class_names` or of the alphabet.
    """

    blocks: np.ndarray | None = None
    window = 1

    def __init__(
        self,
        dataset: Any,
        *,
        medium: Medium = IMAGES,
        column: str | None = None,
        label_column: str | Sequence[str] | None = None,
        class_names: Sequence[str] | None = None,
        labels: str = "auto",
        name: str = "",
    ) -> None:
        _check_source(dataset)
        if _arrays(dataset):
            dataset = list(zip(*dataset, strict=True))
        self.medium, self.noun, self.kind = medium, medium.noun, labels
        self.column, self.label_column = column, label_column
        self.name = name or type(dataset).__name__
        own = own_classes(dataset, label_column, medium.label_columns)
        indexed = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        if isinstance(dataset, IterableDataset) or is_hub(dataset, "IterableDataset") or not indexed:
            dataset = held(dataset, self.name)
        self.dataset = dataset
        if len(self) == 0:
            raise DataError(f"{self.name}: the data set is empty.")
        if own is None and isinstance(label_column, (list, tuple)) and len(label_column) > 1:
            own = list(label_column)
        self.class_names = list(class_names) if class_names is not None else own
        self._own = own
        ordered = own is None or bare(own) or own == self.class_names
        self._places = (
            None if ordered else places(own or [], self.class_names or [])
        )  # of labels that only reading tells
        self._mapped = False
        self._know(labels_of(dataset), class_names is not None)
        self._positions = {name: i for i, name in enumerate(self.class_names or ())}

    def _know(self, values: Any, given: bool) -> None:
        """Labels, as far as they are known without reading every item."""
        names = self.class_names
        if values is None and not isinstance(self.dataset, (list, tuple)):
            first = self._first_label()
            if not isinstance(first, (str, bytes)) or (names is not None and not _digits(first)):
                return
            if len(self) > SCAN:
                raise DataError(
                    f"{self.where(0)}: the label is {first!r}, a text, and the data set does not say which there are. Name all "
                    "classes=[...], or give the data set an attribute `targets` with all labels."
                )
        if values is None:
            values = [self._label_of(i) for i in range(len(self))]
            if not all(isinstance(v, (str, bytes, bool, int, float, np.generic, list)) or _small(v) for v in values):
                bad = next((i for i, v in enumerate(values) if v is None), None)
                if bad is not None:
                    raise DataError(f"{self.where(bad)}: no label (None).")
                return  # targets of another kind, which a loss of the user's own understands
        if isinstance(values, list) and values and all(isinstance(v, bytes) for v in values):
            values = parsed([v.decode("utf-8", "replace") for v in values])
        array = isinstance(values, np.ndarray)
        found = read_labels(values, self.where, names, self.kind, given=given, own=self._own)
        self.take(found)
        if found.targets is None and found.classes is None:
            self.class_names = names
        # what an item itself says counts, which a transform of the data set may have changed; unless it has to be translated
        plain = array and (found.labels is None or np.array_equal(values.reshape(-1), found.labels))
        self._mapped = not plain or (
            array and values.ndim == 1 and found.targets is not None and found.targets.ndim == 2
        )

    def _first_label(self) -> Any:
        try:
            with kept_generators(cuda=False):
                return self._label_of(0)
        except Exception:
            return None  # reading it will say what is wrong, with its place

    def _label_of(self, index: int) -> Any:
        return self._pair(self._item(index), index)[1]

    def _item(self, index: int) -> Any:
        """What the data set gives.

        Raises:
            DataError: it fails as images fail that cannot be read.
        """
        try:
            item = self.dataset[index]
        except DataError:
            raise
        except (OSError, SyntaxError, EOFError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{self.where(index)}: {type(error).__name__}: {error}") from error
        if isinstance(item, Skipped):
            raise DataError(f"{item.where}: {item.reason}")
        return item

    def __len__(self) -> int:
        return len(self.dataset)

    def where(self, index: int) -> str:
        return f"{self.name}, item {index}"

    def raw(self) -> bool:
        """Whether items still need the backbone's preprocessing, as the first that can be read shows."""
        with kept_generators(cuda=False):
            for index in range(min(len(self), 8)):
                try:
                    return self.medium.raw(self.read(index)[0])
                except DataError:
                    continue
        return True

    def read(self, index: int) -> tuple[Any, Any]:
        where = self.where(index)
        value, label = self._pair(self._item(index), index)
        if isinstance(value, Mapping) and ("bytes" in value or "path" in value) and "array" not in value:
            data = value.get("bytes")
            value = read_file(value["path"]) if data is None and value.get("path") else (data or b"")
        if isinstance(value, (str, Path)):
            try:
                value = read_file(value)
            except DataError as error:
                raise DataError(f"{where}: {error}") from error
        if isinstance(value, (bytes, bytearray, memoryview)):
            value = self.medium.decode(value, where)
        elif value is None:
            raise DataError(f"{where}: there is no {self.medium.thing} (None).")
        else:
            value = self.medium.accept(value, where)
        return value, self.target(index) if self._mapped else self._placed(label, where)

    def _pair(self, item: Any, index: int) -> tuple[Any, Any]:
        if isinstance(item, Mapping):
            return self._from_row(item, index)
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            what = f"{type(item).__name__} of {len(item)}" if isinstance(item, (tuple, list)) else type(item).__name__
            raise DataError(
                f"{self.where(index)}: {what}; expected a pair ({self.medium.thing}, label), or a row with both by name."
            )
        return item[0], item[1]

    def _from_row(self, row: Mapping[str, Any], index: int) -> tuple[Any, Any]:
        names = list(row)
        wanted = self.label_column
        several: list[str | None] = list(wanted) if isinstance(wanted, (list, tuple)) else [cast("str | None", wanted)]
        for name, setting in ((self.column, self.medium.setting), *((n, "label_column") for n in several)):
            if name is not None and name not in row:
                raise DataError(f"{self.where(index)}: no '{name}' ({setting}) in the row. {nearest(name, names)}")
        key = self.column or next((k for k in self.medium.keys if k in row), None)
        if key is None:
            raise DataError(
                f"{self.where(index)}: which entry is the {self.medium.thing}? Name it with {self.medium.setting}=...; entries: "
                f"{', '.join(map(str, names))}."
            )
        others = [k for k in names if k != key and not str(k).startswith("__")]
        if len(several) > 1:
            return row[key], [row[name] for name in several if name is not None]
        label = several[0] or next((k for k in self.medium.label_columns if k in others), None)
        if label is None and len(others) == 1:
            label = others[0]
        if label is None:
            raise DataError(
                f"{self.where(index)}: which entry is the label? Name it with label_column=...; entries: "
                f"{', '.join(map(str, names))}."
            )
        return row[key], row[label]

    def _placed(self, label: Any, where: str) -> Any:
        """`_coerced`, and an index of the data's own classes as that of the user's."""
        found = self._coerced(label, where)
        if self._places is None or isinstance(label, (str, bytes)):
            return found
        return placed(found, self._places, self._own or [], self.class_names or [], where)

    def _coerced(self, label: Any, where: str) -> Any:
        """A label in the form in which batches hold it; of any kind but "any" and "auto", as the kind has it."""
        if label is None:
            raise DataError(f"{where}: no label (None).")
        if isinstance(label, (np.ndarray, np.generic)) and label.dtype.kind in "biuf":
            label = torch.as_tensor(label)
        if isinstance(label, bytes):
            label = label.decode("utf-8", "replace").strip()
        if isinstance(label, str):
            if label in self._positions:
                return self._positions[label]
            if not label.isdecimal():
                raise DataError(f"{where}: label '{label}' is not among the classes. {nearest(label, self._positions)}")
            label = int(label)
        if isinstance(label, list) and label and all(isinstance(v, (int, float)) for v in label):
            label = torch.as_tensor(label, dtype=torch.float32)
        if isinstance(label, Tensor) and label.dtype == torch.float64:
            label = label.float()
        if self.kind in ("classes", "tags", "numbers"):
            return _of_kind(label, self.kind, where)
        if isinstance(label, Tensor) and label.numel() == 1 and not label.is_floating_point() and self.kind == "auto":
            return int(label)
        if isinstance(label, float):
            return torch.tensor(label, dtype=torch.float32)
        return int(label) if isinstance(label, bool) else label


def _of_kind(label: Any, kind: str, where: str) -> Any:
    """A number or a tensor of them as a class, tags or numbers.

    Raises:
        DataError: it is none.
    """
    if isinstance(label, Tensor) and (label.ndim == 0 or (label.numel() == 1 and kind == "classes")):
        label = label.item()
    if isinstance(label, Tensor) and label.ndim > 1:
        return label  # a map of pixels, say, which the task may know
    if not isinstance(label, (Tensor, int, float)):
        raise DataError(f"{where}: the label is {label!r:.60} ({type(label).__name__}); expected {_WANTED[kind]}.")
    if not bool(torch.as_tensor(label, dtype=torch.float64).isfinite().all()):
        raise DataError(f"{where}: the label is {label!r:.60}; expected {_WANTED[kind]}.")
    if isinstance(label, Tensor):
        return label.float()
    if kind == "numbers":
        return torch.tensor(label, dtype=torch.float32)
    if label != int(label) and kind == "classes":
        raise DataError(
            f"{where}: the label is {label:g}; expected a class. Numbers are regressed: train with a task or loss for them, "
            f"or open "
            "the data with labels='numbers'."
        )
    if abs(label) >= 1 << 63:
        raise DataError(f"{where}: the label is {label:.60g}, which no class can have.")
    return int(label) if label == int(label) else torch.tensor(label, dtype=torch.float32)


_WANTED = {
    "classes": "a class: a whole number or a text",
    "tags": "tags: 0 or 1 for each class, or a list of names with classes=[...]",
    "numbers": "a number, or equally many of them in every item",
}


def _check_source(source: Any) -> None:
    """Raise DataError for tables in memory, and for classes."""
    if isinstance(source, type):
        raise DataError(f"{source.__name__} is a class; give a data set of it: {source.__name__}(...).")
    package = type(source).__module__.partition(".")[0]
    if package in ("pandas", "polars", "pyarrow"):
        rows = {"pandas": "to_dict('records')", "polars": "to_dicts()", "pyarrow": "to_pylist()"}[package]
        raise DataError(
            f"A {type(source).__name__} of {package} is a table in memory. Give its rows, with items that are images or "
            f"pathlib.Path: table.{rows}; or write it as labels.csv beside the files."
        )


def _arrays(source: Any) -> bool:
    """Whether it is a pair (items, labels) of arrays, as scikit-learn has data."""
    if not isinstance(source, tuple) or len(source) != 2 or not all(hasattr(a, "shape") for a in source):
        return False
    items, labels = source
    return len(items.shape) > 1 and len(labels.shape) in (1, 2) and len(items) == len(labels) and len(items) > 0


def _digits(label: str | bytes) -> bool:
    return (label.decode("utf-8", "replace") if isinstance(label, bytes) else label).strip().isdecimal()


def _small(value: Any) -> bool:
    """A label that is a tensor or an array of a few numbers, and no map of pixels."""
    return isinstance(value, (Tensor, np.ndarray)) and value.ndim <= 1


def labels_of(dataset: Any) -> Any:
    """All labels of a torch data set, where it holds them: an array (n,) or (n, K), or a list; None otherwise."""
    if isinstance(dataset, Subset):
        inner = labels_of(dataset.dataset)
        if inner is None:
            return None
        indices = np.asarray(dataset.indices, dtype=np.int64)
        return inner[indices] if isinstance(inner, np.ndarray) else [inner[i] for i in indices]
    values = dataset.tensors[1] if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2 else None
    for name in ("targets", "labels", "_labels"):
        values = getattr(dataset, name, None) if values is None else values
    try:
        if values is None or isinstance(values, (str, dict)) or len(values) != len(dataset):
            return None
        if isinstance(values, (list, tuple)) and all(isinstance(v, (str, list)) for v in values):
            return list(values)
        labels = np.asarray(values)
    except (TypeError, ValueError, RuntimeError):
        return None
    if labels.dtype.kind in "biuf" and labels.ndim in (1, 2):
        return labels
    return labels.tolist() if labels.dtype.kind in "OU" and labels.ndim == 1 else None
