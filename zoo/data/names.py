"""Names that data themselves have for their classes, and labels that follow these names into another order."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from zoo.errors import DataError, nearest

__all__ = ["check_cells", "listed_names", "names_of", "not_among", "own_classes", "placed", "places", "warn_of_gaps"]

# What pandas and its like write, and read, where nothing is known
MISSING = ("nan", "NaN", "NAN", "-nan", "NA", "N/A", "n/a", "#N/A", "<NA>", "None", "NULL", "null", "NaT")


def places(own: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """(K,) where the names that data have stand among others; -1 of those that are not there."""
    table = {name: i for i, name in enumerate(names)}
    return np.asarray([table.get(name, -1) for name in own], dtype=np.int64)


def not_among(name: str, names: Sequence[str], where: str) -> DataError:
    """What is said of data with a class that the user did not name."""
    return DataError(
        f"{where}: the data call this class '{name}', and it is not among the {len(names)} classes. {nearest(name, names)} "
        "classes=[...] chooses the order of the names that data have, and may add to them; to call classes differently, "
        "open the data without it and set dataset.classes."
    )


def placed(found: Any, table: np.ndarray, own: Sequence[str], names: Sequence[str], where: str) -> Any:
    """An item's class index, or its (K,) tags or probabilities, of the data's own names as those of other names.

    Raises:
        DataError: it has a class that is not among these.
    """
    if isinstance(found, int) and 0 <= found < len(own):
        if (place := int(table[found])) < 0:
            raise not_among(own[found], names, where)
        return place
    if not isinstance(found, Tensor) or found.shape != (len(own),):
        return found
    there = table >= 0
    for index in np.flatnonzero(~there).tolist():
        if float(found[index]):
            raise not_among(own[index], names, where)
    ordered = found.new_zeros(len(names))
    ordered[torch.from_numpy(table[there])] = found[torch.from_numpy(there)]
    return ordered


def check_cells(cells: Sequence[Any], where: Callable[[int], str], kind: str) -> bool:
    """Whether labels of a text table are names with leading zeros (01, 02), and no numbers.

    Raises:
        DataError: a cell that programs write where nothing is known, or one number written in two ways.
    """
    texts = [cell.strip() if isinstance(cell, str) else "" for cell in cells]
    for row, text in enumerate(texts):
        if text in MISSING:
            raise DataError(
                f"{where(row)}: no label ('{text}'). Fill it in, or take the row out; if a class is called so, name all classes: "
                "classes=[...]."
            )
    words = {text: row for row, text in enumerate(texts) if text}
    if kind == "numbers" or not all(re.fullmatch(r"[+-]?\d+", word) for word in words):
        return False
    ways: dict[int, str] = {}
    for word, row in words.items():
        if (other := ways.setdefault(int(word), word)) != word:
            raise DataError(
                f"{where(row)}: the labels '{other}' and '{word}' are one number. Write it in one way, or name the classes: "
                "classes=[...]."
            )
    return any(re.fullmatch(r"0\d+", word) for word in words)


def warn_of_gaps(labels: np.ndarray, names: Sequence[str], where: Callable[[int], str]) -> None:
    """Numbers count from 0; say it where a class of them has no item."""
    there = set(np.unique(labels).tolist())
    if lost := [name for i, name in enumerate(names) if i not in there]:
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        warnings.warn(
            f"{where(0)}: labels are numbers from 0, so up to {names[-1]} they make {len(names)} classes, and no item has "
            f"{', '.join(lost[:5])}{more}. Number the classes from 0, or name all that there are: classes=[...].",
            stacklevel=5,
        )


def names_of(feature: Any) -> list[str] | None:
    """The class names of a column of the library `datasets`, or of the items of its lists."""
    found = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
    return [str(name) for name in found] if found else None


def listed_names(folders: Iterable[Path], column: str | None = None) -> list[str] | None:
    """The class names in `classes.json` of the first of these folders that has one; index = label.

    A list, or, unless `column` is None, an object of lists for several labellings: that whose key is in the name of the label
    column (`coarse` for `coarse_label`), else the first.

    Raises:
        DataError: the file is not readable, or holds something else.
    """
    file = next((file for folder in folders if (file := folder / "classes.json").is_file()), None)
    if file is None:
        return None
    try:
        names = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: not readable as JSON ({error}).") from error
    if column is not None and isinstance(names, dict) and names:
        names = next((v for k, v in names.items() if k in column), next(iter(names.values())))
    if not (isinstance(names, list) and names and all(isinstance(n, str) for n in names)):
        several = "" if column is None else " (or an object of such lists)"
        raise DataError(f"{file}: expected a JSON list of class names, index = label{several}.")
    return names


def own_classes(dataset: Any, label_column: str | Sequence[str] | None, columns: Sequence[str]) -> list[str] | None:
    """The class names that a data set has: of torchvision's kind, of the library `datasets`, of parts that agree.

    `columns` are usual names of a column of labels.

    Raises:
        DataError: parts that number other classes.
    """
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    if isinstance(dataset, ConcatDataset):
        parts = [own_classes(part, label_column, columns) for part in dataset.datasets]
        other = next((part for part in parts if part != parts[0]), parts[0])
        if other != parts[0]:
            raise DataError(
                f"The parts of the {type(dataset).__name__} do not number the same classes: {_few(parts[0])} and {_few(other)}. "
                "Open each with the same classes=[...], and put these together."
            )
        return parts[0]
    features = getattr(dataset, "features", None)
    if isinstance(features, Mapping) and not (isinstance(label_column, (list, tuple)) and len(label_column) > 1):
        wanted = label_column[0] if isinstance(label_column, (list, tuple)) else label_column
        key = wanted or next((k for k in columns if k in features), None)
        named = [key] if key is not None else [k for k in features if names_of(features[k])]
        return names_of(features.get(named[0])) if len(named) == 1 else None
    names = getattr(dataset, "classes", None)
    return None if names is None else [str(name) for name in names]


def _few(names: Sequence[str] | None) -> str:
    return "without names" if names is None else ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")
