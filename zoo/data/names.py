"""Names that data themselves have for their classes, and labels that follow these names into another order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from zoo.errors import DataError, nearest

__all__ = ["names_of", "not_among", "own_classes", "placed", "places"]


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


def names_of(feature: Any) -> list[str] | None:
    """The class names of a column of the library `datasets`, or of the items of its lists."""
    found = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
    return [str(name) for name in found] if found else None


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
