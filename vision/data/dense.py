"""`open_dense`: images with a map each, for tasks that say something of every pixel.

    train = open_dense("camvid/train.parquet")
    edges = open_dense("camvid/train.parquet", "edges", derive="edges")
    rooms = open_dense("nyu", "depth", split="train")          # nyu/train/images/*.jpg, nyu/train/depth/*.png

Sources are folders of images beside folders of maps (files of one name), Parquet files with a column for each, and any torch data
set, data set of the library `datasets`, or list of pairs (image, map) or of rows {"image": ..., "mask": ...}.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vision.data.dense_rows import FolderPairs, ListedPairs, ParquetPairs
from vision.data.dense_transform import IGNORE
from vision.data.masks import DERIVED, KINDS, read_map
from zoo.data.dataset import ImageDataset, OnError, Skipped
from zoo.data.images import size_of
from zoo.data.locate import is_paths, locate
from zoo.data.names import listed_names
from zoo.errors import ConfigError, DataError, nearest

__all__ = ["IGNORE", "DenseDataset", "DenseRows", "open_dense"]

VOID = ("unlabelled", "unlabeled", "void", "ignore", "ignored", "unknown")
OUTPUTS = {"edges": ["edge"], "depth": ["depth"], "normals": ["x", "y", "z"]}


class DenseRows:
    """Pairs (image, map) of a source, checked. `task` is the kind of what is learnt.

    Args:
        pairs: the source (`vision.data.dense_rows`).
        kind: what is learnt; derive: what it is made of maps of classes by.
        classes: of the maps of a segmentation; ignore: stored values that are no class, or no measurement.
    """

    labels: np.ndarray | None = None
    noun = "images"

    def __init__(
        self, pairs: Any, kind: str, classes: Sequence[str] | None, ignore: Sequence[float], derive: str | None
    ) -> None:
        self.pairs, self.task, self.derive = pairs, kind, derive
        self.name, self.ignore = pairs.name, tuple(ignore)
        self.stored = "segment" if derive is not None else kind
        self.class_names = None if classes is None else list(classes)
        self.blocks: np.ndarray | None = getattr(pairs, "blocks", None)
        self.window: int = getattr(pairs, "window", 1)
        self.files = getattr(pairs, "files", ())

    def __len__(self) -> int:
        return len(self.pairs)

    def where(self, index: int) -> str:
        """The place of a pair in words."""
        return str(self.pairs.where(index))

    def load(self) -> None:
        """Read what is to be held in memory now, so that worker processes share it."""
        if hasattr(self.pairs, "load"):
            self.pairs.load()

    def read(self, index: int) -> tuple[Any, Tensor]:
        """(image, map): (H, W) int64 with `IGNORE` for no class; (H, W) or (H, W, 3) float32 with NaN for no measurement.

        Raises:
            DataError: a map of another size than its image, or with values outside the classes.
        """
        image, value = self.pairs.pair(index)
        where = self.where(index)
        found = read_map(value, self.stored, where)
        if (own := tuple(found.shape[:2])) != (size := size_of(image)):
            raise DataError(
                f"{where}: the map is {own[0]} x {own[1]} pixels (height x width), its image {size[0]} x {size[1]}. Each pixel "
                "needs a value of its own: make the map at the image's size, without smoothing it."
            )
        return image, self.known(found, where)

    def map(self, index: int) -> Tensor:
        """The map alone, at its own size."""
        where = self.where(index)
        return self.known(read_map(self.pairs.map(index), self.stored, where), where)

    def known(self, found: Tensor, where: str) -> Tensor:
        """Stored values with those marked that are no class and no measurement."""
        missing = torch.zeros(found.shape[:2], dtype=torch.bool)
        for value in self.ignore:
            missing |= (found == value).all(-1) if found.ndim == 3 else found == value
        if self.stored == "segment":
            return self._classes(found, missing, where)
        if self.stored == "edges":
            return found.masked_fill(missing, IGNORE)
        if self.stored == "normals":
            missing |= ~found.isfinite().all(-1) | (found.norm(dim=-1) < 0.5)
            return found.masked_fill(missing[..., None], float("nan"))
        return found.masked_fill(missing | ~found.isfinite(), float("nan"))

    def _classes(self, found: Tensor, missing: Tensor, where: str) -> Tensor:
        kept = found[~missing]
        count = len(self.class_names or ())
        if kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < count:
            value = int(kept.min()) if int(kept.min()) < 0 else int(kept.max())
            raise DataError(
                f"{where}: {int((kept == value).sum())} pixels of the map hold {value}, which is outside the {count} classes "
                f"(0..{count - 1}). If it means no class, say so: ignore={value}; else mend the map, or name all classes: "
                "classes=[...]."
            )
        return found.masked_fill(missing, IGNORE)


class DenseDataset(ImageDataset):
    """(transform(image, map)) pairs; see `ImageDataset`. The transform is a function of both (`vision.data.dense_transform`)."""

    def _item(self, index: int) -> Any:
        row = int(self.indices[index])
        try:
            image, value = self.rows.read(row)
            if self.transform is not None:
                image, value = self.transform(image, value)  # type: ignore[call-arg]
        except DataError as error:
            reason = str(error) if self.rows.where(row) in str(error) else f"{self.rows.where(row)}: {error}"
            skips = getattr(self.rows, "skips", None)  # of several data sets each its own
            if self.on_error == "skip" or (skips is not None and skips(row)):
                return Skipped(self.rows.where(row), reason)
            raise DataError(reason) from error
        return image, value

    def _like(self, **changes: Any) -> DenseDataset:
        settings = {"transform": self.transform, "indices": self.indices, "on_error": self.on_error, **changes}
        return DenseDataset(self.rows, settings.pop("classes", self.classes), **settings)


def open_dense(
    source: Any,
    kind: str = "segment",
    *,
    split: str | None = None,
    classes: Sequence[str] | None = None,
    least: int = 0,
    ignore: float | Sequence[float] | None = None,
    derive: str | None = None,
    image_column: str | None = None,
    mask_column: str | None = None,
    transform: Any = None,
    on_error: OnError = "raise",
) -> DenseDataset:
    """Images with a map each.

    Args:
        source: `<source>/images/*.jpg` and `<source>/masks/*.png`, files of one name ("labels", "annotations", "depth",
            "normals" and "edges" are understood as well), with a folder for each split above or below these; Parquet files
            (a file, a folder, a pattern) with columns "image" and "mask"; any torch data set or list of pairs (image, map), or
            of rows {"image": ..., "mask": ...}.
        kind: "segment", "edges", "depth" (one number for each pixel, whatever it means) or "normals"; what the maps must be is
            in `vision.data.masks`.
        split: a subfolder, or the beginning of the files' names. Needed where there are several.
        classes: of maps of classes, in the order of their indices; by default `classes.json` beside the files or in the folder
            above, else as many as the maps hold.
        least: how many classes there are at least, where they are counted: the maps of a split may lack the last ones.
        ignore: stored values that are no class or no measurement. By default 255 in maps of classes, and a last class that is
            called "unlabelled", "void" or the like; given, it replaces these.
        derive: what is made of maps of classes: "edges" (kind "edges"), or "distance" to the next edge (kind "depth").
        image_column, mask_column: of Parquet files and rows; by their usual names, if None.
        transform: (image, map) -> tensors; None leaves it to `zoo.fit` and `zoo.evaluate`.
        on_error: "skip" goes on without pairs that cannot be read: a file that is corrupt or has no map, a map of another size
            or outside the classes. They are counted as "skipped".

    Raises:
        DataError: no such source, several splits, an image without a map; maps of another size or outside the classes, when
        they are read.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}. {nearest(str(kind), KINDS)}")
    if isinstance(source, DenseDataset):
        return _again(source, kind, split, classes, transform)
    if derive is not None and derive not in DERIVED:
        raise ConfigError(
            f"derive is {derive!r}; expected one of {', '.join(DERIVED)}. {nearest(str(derive), DERIVED)}"
        )
    if derive is not None and DERIVED[derive][0] != kind:
        raise ConfigError(
            f"derive='{derive}' makes maps of the kind '{DERIVED[derive][0]}', and '{kind}' is asked for."
        )
    stored = kind if derive is None else "segment"
    lenient = on_error == "skip"
    pairs = _pairs(source, stored, split, image_column, mask_column, lenient)
    names, left_out = None, _numbers(ignore)
    if stored == "segment":
        names, left_out = _class_names(pairs, classes, left_out, lenient, least)
    elif classes is not None:
        raise ConfigError(f"classes are of maps of classes; '{kind}' has none.")
    outputs = names if kind == "segment" else OUTPUTS[kind]
    return DenseDataset(
        DenseRows(pairs, kind, names, left_out or (), derive), outputs, transform=transform, on_error=on_error
    )


def _again(data: DenseDataset, kind: str, split: str | None, classes: Any, transform: Any) -> DenseDataset:
    """A data set that is open already."""
    if (task := getattr(data.rows, "task", kind)) != kind:
        raise DataError(f"'{data.name}' is opened for '{task}', and '{kind}' is asked for. Open its source anew.")
    if split is not None:
        raise DataError(f"'{data.name}' is open already, and is one data set; leave split='{split}' out.")
    if classes is not None and list(classes) != data.classes:
        raise DataError(f"'{data.name}' is open already, with other classes; open its source with classes=[...].")
    return data if transform is None else data._like(transform=transform)


def _numbers(ignore: Any) -> tuple[float, ...] | None:
    if ignore is None:
        return None
    given = (ignore,) if isinstance(ignore, (int, float)) else ignore
    if not isinstance(given, (list, tuple)) or not all(
        isinstance(n, (int, float)) and not isinstance(n, bool) for n in given
    ):
        raise ConfigError(f"ignore is {ignore!r}; expected a number, or a list of them.")
    return tuple(given)


def _class_names(
    pairs: Any, given: Any, ignore: tuple[float, ...] | None, lenient: bool, least: int
) -> tuple[list[str], tuple[float, ...]]:
    """(names of the classes that are learnt, stored values that are none)."""
    if given is not None and (isinstance(given, (str, bytes)) or not isinstance(given, Sequence)):
        raise ConfigError(f"classes is {given!r:.60}; expected a list of names.")
    names = [str(n) for n in given] if given is not None else listed_names(pairs.folders)
    if names is None:
        largest = _largest(pairs, (IGNORE,) if ignore is None else ignore, lenient)
        names = [str(i) for i in range(max(largest + 1, least))]
    if double := [n for i, n in enumerate(names) if n in names[:i]]:
        raise DataError(f"{pairs.name}: the class '{double[0]}' is named twice.")
    if ignore is None:
        last = len(names) - 1
        ignore = (IGNORE, last) if len(names) > 1 and names[last].lower() in VOID else (IGNORE,)
        own = listed_names(pairs.folders) if given is not None else None
        if (
            own is not None and own[-1].lower() in VOID and names == own[:-1]
        ):  # the data's own classes, without that one
            ignore = (IGNORE, len(own) - 1)
    while names and len(names) - 1 in ignore:
        names = names[:-1]
    if inside := [int(i) for i in ignore if 0 <= i < len(names)]:
        raise DataError(
            f"{pairs.name}: ignore={inside[0]} is the class '{names[inside[0]]}' between others, and those behind it would be "
            "counted anew. Store it as 255, or as the last class."
        )
    if not 2 <= len(names) <= IGNORE:
        raise DataError(f"{pairs.name}: {_too_few_or_many(names, given is not None)}")
    return names, ignore


def _too_few_or_many(names: list[str], given: bool) -> str:
    if len(names) > IGNORE:
        return f"{len(names)} classes; expected 2 to {IGNORE}, since {IGNORE} in a map is no class."
    if not names:
        return "no class is left: every pixel of the maps is no class, or a value of ignore=. Name the classes: classes=[...]."
    found = (
        f"there is one class, '{names[0]}'"
        if given
        else f"there is one class, '{names[0]}' (of classes.json, or all that the maps hold)"
    )
    return (
        f"{found}, and of one there is nothing to tell apart. Expected 2 to {IGNORE}; if these maps merely lack the others, name "
        "all: classes=[...]."
    )


def _largest(pairs: Any, ignore: tuple[float, ...], lenient: bool) -> int:
    """The largest index in all maps, which are read for it once; -1: there is none. `lenient`: in those that can be read."""
    largest = -1
    for index in range(len(pairs)):
        try:
            found = read_map(pairs.map(index), "segment", pairs.where(index))
        except DataError:
            if lenient:
                continue
            raise
        for value in ignore:
            found = found[found != value]
        largest = max(largest, int(found.max())) if found.numel() else largest
    return largest


def _pairs(
    source: Any, stored: str, split: str | None, image_column: str | None, mask_column: str | None, lenient: bool
) -> Any:
    """The source of pairs that is meant."""
    if isinstance(source, (list, tuple)) and not source:
        raise DataError(
            "The data are an empty list; expected pairs (image, map), rows {'image': ..., 'mask': ...}, or Parquet files."
        )
    if not is_paths(source):
        if split is not None:
            raise DataError(f"split='{split}' chooses among files, and a {type(source).__name__} is one data set.")
        return ListedPairs(source, image_column, mask_column, stored)
    first = Path(str(source[0] if isinstance(source, (list, tuple)) and source else source)).expanduser()
    if first.is_dir() and not isinstance(source, (list, tuple)) and next(first.rglob("*.parquet"), None) is None:
        if image_column or mask_column:
            raise DataError("image_column and mask_column are of Parquet files and rows; a folder has none.")
        return FolderPairs(first, split, stored, lenient)
    found = locate(source, split)
    if found.kind != "parquet":
        absent = f"There is no file or folder '{source}' here (in {Path.cwd()}). " if found.sought else ""
        raise DataError(
            f"{absent}'{source}' holds no images with maps; expected a folder with 'images' and 'masks' in it, or Parquet "
            "files with a column for each. A data set of the Hub: open it with datasets.load_dataset, and hand it over."
        )
    return ParquetPairs(found.files, image_column, mask_column, stored)
