"""Rows of data sets of the library `datasets`: from the Hub by name, or given as an object."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zoo.data.folders import read_file
from zoo.data.labels import Labelled, read_labels
from zoo.data.medium import IMAGES, Medium
from zoo.data.names import names_of
from zoo.errors import DataError, MissingPackageError, nearest

__all__ = ["HubRows", "is_hub", "one_split"]

_NAME = re.compile(r"([\w.-]+/)?[\w.-]+", re.ASCII)  # what the Hub may have; a few old data sets have no owner


class HubRows(Labelled):
    """A data set of the library `datasets` (the extra `data`), by its name on the Hub or as an object; one split of it."""

    blocks: np.ndarray | None = None
    window = 1

    def __init__(
        self,
        source: Any,
        split: str | None = None,
        *,
        medium: Medium = IMAGES,
        column: str | None = None,
        label_column: str | Sequence[str] | None = None,
        class_names: Sequence[str] | None = None,
        labels: str = "auto",
        sought: bool = False,
    ) -> None:
        """`sought`: a file or folder of this name was looked for first, and there is none."""
        self.medium, self.noun = medium, medium.noun
        absent = f"There is no file or folder '{source}' here (in {Path.cwd()}). " if sought else ""
        if sought and not _NAME.fullmatch(str(source)):
            raise DataError(f"{absent}Nor can it be a data set of the Hub, which is named 'owner/name'.")
        try:
            import datasets
        except ImportError as error:
            raise MissingPackageError(
                f"{absent}Reading '{source}' from the Hub needs the package datasets: pip install 'adapter-zoo[data]'."
            ) from error
        loaded: Any = source
        if isinstance(source, str):
            self.name = source
            try:
                loaded = datasets.load_dataset(source, split=split)
            except Exception as error:
                reason = f"{error} ({error.__cause__})" if error.__cause__ is not None else str(error)
                raise DataError(
                    f"{absent}The Hub data set '{source}' (split {split!r}) could not be loaded: {reason}"
                ) from error
        else:
            own = getattr(getattr(source, "info", None), "dataset_name", None) or "dataset"
            part = str(getattr(source, "split", None) or "")
            self.name = f"{own}/{part}" if part.isidentifier() else str(own)
        if isinstance(loaded, dict):
            loaded = one_split(loaded, None, f"'{self.name}'")
        features = loaded.features
        kind: Any = getattr(datasets, medium.feature)
        fitting = [k for k, f in features.items() if isinstance(f, kind)]
        self.column = _column(self.name, column, fitting, list(features), medium.setting)
        if self.column not in fitting:
            found = type(features[self.column]).__name__
            raise DataError(
                f"'{self.name}': {medium.setting} '{self.column}' is of type {found}; expected {medium.feature}."
            )
        wanted = [label_column] if label_column is None or isinstance(label_column, str) else list(label_column)
        chosen = [self._label(name, features, datasets.ClassLabel) for name in wanted]
        self._data = loaded.cast_column(self.column, kind(decode=False))
        if not len(loaded):
            raise DataError(f"'{self.name}' (split {split!r}) is empty.")
        columns = [list(loaded[name]) for name in chosen]
        own = chosen if len(chosen) > 1 else names_of(features[chosen[0]])
        values = columns[0] if len(columns) == 1 else [list(row) for row in zip(*columns, strict=True)]
        self._know(values, class_names, labels, own)

    def _know(
        self, values: list[Any], names: Sequence[str] | None, labels: str, own: Sequence[str] | None = None
    ) -> None:
        self.take(read_labels(values, self.where, names, labels, given=names is not None, own=own))

    def _label(self, wanted: str | None, features: Mapping[str, Any], kind: Any) -> str:
        others = [name for name in features if name != self.column]
        classes = [k for k in others if isinstance(features[k], kind)]
        usual = [name for name in self.medium.label_columns if name in others]
        fitting = classes or usual[:1]
        return _column(self.name, wanted, fitting, list(features), "label_column")

    def __len__(self) -> int:
        return len(self._data)

    def where(self, index: int) -> str:
        return f"{self.name}, row {index}"

    def read(self, index: int) -> tuple[Any, Any]:
        value = self._data[int(index)][self.column] or {}
        data, path = value.get("bytes"), value.get("path")
        if data is None and path and Path(path).exists():
            data = read_file(path)
        return self.medium.decode(data, self.where(index)), self.target(index)


def is_hub(source: Any, kind: str = "Dataset") -> bool:
    """Whether an object is of that class of the library `datasets`, which is not imported for it."""
    return any(c.__name__ == kind and c.__module__.partition(".")[0] == "datasets" for c in type(source).__mro__)


def one_split(splits: Mapping[Any, Any], split: str | None, name: str) -> Any:
    """The split of a `DatasetDict` or dict that is meant.

    Raises:
        DataError: there are several, or none of this name.
    """
    if split is not None:
        if split not in splits:
            raise DataError(f"{name} has no split '{split}'. {nearest(split, map(str, splits))}")
        return splits[split]
    if len(splits) != 1:
        raise DataError(f"{name} has the splits {', '.join(map(str, splits))}; choose one with split=...")
    return next(iter(splits.values()))


def _column(name: str, wanted: str | None, fitting: list[str], known: list[str], setting: str) -> str:
    if wanted is not None:
        if wanted not in known:
            raise DataError(f"'{name}' has no column '{wanted}' ({setting}). {nearest(wanted, known)}")
        return wanted
    if len(fitting) != 1:
        raise DataError(f"'{name}': name one of its columns with {setting}=...; columns: {', '.join(known)}.")
    return fitting[0]
