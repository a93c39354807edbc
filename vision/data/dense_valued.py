"""Whether data say anything of any pixel: what says nothing has a loss of 0 whatever a model answers."""

from __future__ import annotations

from torch import Tensor

from vision.data.dense import DenseDataset, DenseRows
from vision.data.dense_transform import IGNORE, DenseTransform
from vision.data.masks import DERIVED
from zoo.data.seeds import kept_generators
from zoo.errors import DataError

__all__ = ["check_valued"]

NOTHING = {
    "segment": f"every pixel of its {{count}} maps is no class ({IGNORE}, or a value that is left out)",
    "edges": "there is no edge in any of its {count} maps",
    "depth": "no pixel of its {count} maps has a number (all are NaN, or a value that is left out)",
    "normals": "no pixel of its {count} maps has a direction (all are NaN, or of length 0)",
}


def check_valued(dataset: DenseDataset, what: str = "data set") -> None:
    """Raise if no map has a pixel with a value at the size at which it is learnt and measured.

    Maps are read up to the first that has one, which is mostly the first. A few without any are allowed.

    Raises:
        DataError: no pixel to learn of or to measure; or a map that cannot be read, if such are not skipped.
    """
    rows = dataset.rows
    if not isinstance(rows, DenseRows):
        return
    with kept_generators(cuda=False):
        for index in dataset.indices.tolist():
            try:
                found = rows.map(index)
            except DataError:
                if dataset.on_error == "skip":
                    continue
                raise
            if _says_something(dataset, rows, found):
                return
    reason = NOTHING[rows.task].format(count=len(dataset))
    raise DataError(
        f"The {what} '{dataset.name}' has no pixel with a value: {reason}, as the backbone sees them. There is nothing to learn "
        "or to measure; look at the maps, and at ignore= and classes= of open_dense."
    )


def _says_something(dataset: DenseDataset, rows: DenseRows, found: Tensor) -> bool:
    if isinstance(dataset.transform, DenseTransform):
        found = dataset.transform.whole(found)
    elif rows.derive is not None and rows.task == "edges":
        found = DERIVED[rows.derive][1](found, IGNORE)
    if rows.task == "edges":
        return bool((found == 1).any())
    return bool(found.isfinite().any() if found.is_floating_point() else (found != IGNORE).any())
