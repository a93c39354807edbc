"""`ImageDataset`: a selection of the rows of some source, with class names and a transform.

What the sources (`zoo.data.sources`, `zoo.data.parquet`) share is here once: decoding, selecting, labels, what happens
with an image that cannot be read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from zoo.data.augment import Called, is_albumentations
from zoo.errors import ConfigError, DataError

__all__ = ["ImageDataset", "OnError", "Rows", "Skipped", "Transform", "collate"]

OnError = Literal["raise", "skip"]
Transform = Callable[[Any], Any]


class Rows(Protocol):
    """Where images and labels come from. Rows with tags or numbers instead of labels have them as `targets`, float32."""

    name: str
    """A short name of the source, without the folders above it."""

    labels: np.ndarray | None
    """(n,) int64, or None where they are only known by reading every item."""

    blocks: np.ndarray | None
    """(n,) int64, or None: rows of one block are read together, so a shuffle should stay among `window` blocks."""

    window: int

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Any, Any]:
        """(image, label); raises DataError that names the place."""

    def where(self, index: int) -> str:
        """The place of a row in words: a path, or `file.parquet, row 17`."""


@dataclass(frozen=True)
class Skipped:
    """What a data set opened with on_error="skip" gives instead of an image that cannot be read."""

    where: str
    reason: str


class ImageDataset(Dataset[Any]):
    """(transform(image), label) pairs. `dataset.classes` are the class names, `dataset.labels` all labels (or None).

    Args:
        rows: the source.
        classes: names; the label is the index.
        transform: applied to the PIL image (or to what a wrapped torch data set yields); None gives it as it is.
        indices: which rows, in which order; None means all.
        on_error: "skip" yields a `Skipped` instead of raising DataError (`zoo.data.collate` drops those).
    """

    def __init__(
        self,
        rows: Rows,
        classes: Sequence[str] | None,
        *,
        transform: Transform | None = None,
        indices: np.ndarray | None = None,
        on_error: OnError = "raise",
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise ConfigError(f"on_error is {on_error!r}; expected 'raise' or 'skip'.")
        self.rows = rows
        self.classes = list(classes) if classes is not None else None
        self.transform = Called(transform) if is_albumentations(transform) else transform
        self.on_error: OnError = on_error
        self.indices = np.arange(len(rows)) if indices is None else np.asarray(indices, dtype=np.int64)

    @property
    def name(self) -> str:
        return self.rows.name

    @property
    def noun(self) -> str:
        """What the items are called in messages: "images", if the rows do not say another word."""
        return getattr(self.rows, "noun", "images")

    @property
    def labels(self) -> np.ndarray | None:
        """(n,) int64 labels of this selection."""
        return None if self.rows.labels is None else self.rows.labels[self.indices]

    @property
    def targets(self) -> np.ndarray | None:
        """(n, K) tags or (n,) or (n, k) numbers of this selection, float32; None where items have one label each."""
        targets = getattr(self.rows, "targets", None)
        return None if targets is None else targets[self.indices]

    @property
    def blocks(self) -> np.ndarray | None:
        """(n,) block of each item, see `Rows.blocks`."""
        return None if self.rows.blocks is None else self.rows.blocks[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int | slice) -> Any:
        """An item: (image, label), or what stands for an unreadable one; of a slice, the same data with these items alone."""
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        return self._item(index)

    def _item(self, index: int) -> Any:
        row = int(self.indices[index])
        try:
            image, label = self.rows.read(row)
        except DataError as error:
            if self.on_error == "skip":
                return Skipped(self.rows.where(row), str(error))
            raise
        if self.transform is not None and not isinstance(image, Skipped):
            try:
                image = self.transform(image)
            except DataError as error:  # a transform does not know what it is given
                where = self.where(index)
                reason = str(error) if where in str(error) else f"{where}: {error}"
                if self.on_error == "skip":
                    return Skipped(where, reason)
                raise DataError(reason) from error
        return image, label

    def where(self, index: int) -> str:
        """The place of an item: a path, or `file.parquet, row 17`."""
        return self.rows.where(int(self.indices[index]))

    def select(self, indices: Sequence[int] | np.ndarray) -> ImageDataset:
        """The same data, only these items, in this order."""
        return self._like(indices=self.indices[np.asarray(indices, dtype=np.int64)])

    def with_transform(self, transform: Transform | None) -> ImageDataset:
        """The same data with another transform."""
        return self._like(transform=transform)

    def _like(self, **changes: Any) -> ImageDataset:
        settings = {"transform": self.transform, "indices": self.indices, "on_error": self.on_error, **changes}
        return ImageDataset(self.rows, settings.pop("classes", self.classes), **settings)

    def __repr__(self) -> str:
        count = "unknown" if self.classes is None else len(self.classes)
        return f"ImageDataset({self.name!r}, {len(self)} {self.noun}, {count} classes)"


def collate(items: Sequence[Any]) -> tuple[Any, Any]:
    """For a torch DataLoader over an `ImageDataset`: (images (B, C, H, W), labels (B,)), without what was skipped.

    Raises:
        DataError: inputs of different sizes, or still PIL images (no transform was given), or nothing is left.
    """
    kept = [item for item in items if not isinstance(item, Skipped)]
    if not kept:
        raise DataError(f"Nothing of this batch could be read; first: {items[0].where}: {items[0].reason}")
    return stack(kept)


# What tensors of 1, 2, 3 and 4 dimensions are, and how they become equally large
_KINDS = {
    1: ("Waveforms", "a cut or padding"),
    2: ("Spectrograms", "a cut or padding"),
    3: ("Images", "a resize and a crop"),
    4: ("Clips", "a cut, a resize and a crop"),
}


def stack(items: Sequence[Any]) -> tuple[Any, Any]:
    """Batch (input, target) pairs; see `collate`. Inputs of a class with `together` (a class method) are put together by it."""
    first = items[0]
    if not isinstance(first, (tuple, list)) or len(first) != 2:
        raise DataError(
            f"The data set yields {type(first).__name__}; expected pairs (input, label). Wrap it so that dataset[i] gives both."
        )
    if isinstance(first[0], Image.Image):
        raise DataError(
            "The data set yields PIL images; expected tensors. Pass transform=model.preprocess(train=True), "
            "or leave the transform to zoo.fit and zoo.evaluate."
        )
    kinds = {type(item[0]).__name__: None for item in items if isinstance(item, (tuple, list))}
    if isinstance(first[0], Tensor) and not all(isinstance(item[0], Tensor) for item in items):
        raise DataError(f"Inputs of one batch are of different types: {', '.join(kinds)}. Let all items be of one.")
    if isinstance(first[0], Tensor) and any(item[0].shape != first[0].shape for item in items):
        shapes = sorted({tuple(item[0].shape) for item in items})
        what, mend = _KINDS.get(first[0].ndim, ("Inputs", "a cut"))
        raise DataError(
            f"{what} of one batch have different shapes: {', '.join(map(str, shapes[:4]))}. End the transform with {mend} to one "
            "size; model.preprocess(train=True) does."
        )
    together = getattr(type(first[0]), "together", None)  # inputs that know how they make a batch
    if together is not None:
        inputs = together([item[0] for item in items])
        items = [(0, item[1]) for item in items]
    if isinstance(first[1], Tensor) and len(sizes := {tuple(getattr(item[1], "shape", ())) for item in items}) > 1:
        raise DataError(f"Targets of one batch have different shapes: {', '.join(map(str, sorted(sizes)[:4]))}.")
    try:
        found, targets = default_collate([tuple(item) for item in items])
        inputs = found if together is None else inputs
        return inputs, targets if isinstance(targets, (Tensor, dict)) else torch.as_tensor(targets)
    except (TypeError, ValueError, RuntimeError) as error:
        what = " and ".join(f"{type(part).__name__}" for part in first)
        raise DataError(
            f"Items ({what}) cannot be put into a batch: {str(error).splitlines()[0]:.200}. Give tensors, arrays or numbers "
            f"of one "
            "shape, or a transform that makes them."
        ) from error
