"""Data sets of images with captions: Parquet files, tables beside image files, any torch `Dataset`, or images with labels.

    train = open_pairs("flickr8k/", split="train")
    train = caption_classes(zoo.open_dataset("cifar100/", split="train"), ["a photo of a {}.", "a small {}."])

The result is a `zoo.data.ImageDataset` whose items are (`Pair`, group); pairs of one group show the same, so they are no
negatives of each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from zoo.data.dataset import ImageDataset, OnError, Transform
from zoo.data.folders import read_file, shown
from zoo.data.hub import HubRows, is_hub, one_split
from zoo.data.images import decode
from zoo.data.locate import is_paths, locate
from zoo.data.medium import CAPTIONS, IMAGES
from zoo.data.open import folder_name, short_name
from zoo.data.parquet import ParquetRows
from zoo.data.shards import ShardRows
from zoo.data.sources import TorchRows
from zoo.data.tables import TABLES, choose_column, rows_of, tables_in
from zoo.data.unwrap import unwrapped
from zoo.errors import ConfigError, DataError, nearest

__all__ = ["Pair", "caption_classes", "open_pairs"]

PAIRS = replace(IMAGES, label_columns=(*CAPTIONS, "txt"))


@dataclass(frozen=True)
class Pair:
    """An image and what is said of it, in one or more texts."""

    image: Any
    captions: tuple[str, ...]


def open_pairs(
    source: Any,
    *,
    transform: Transform | None = None,
    split: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    on_error: OnError = "raise",
) -> ImageDataset:
    """Images with captions.

    Args:
        source: Parquet files (a file, a folder, a pattern, a list) with a column of encoded images and one of texts or of lists
            of texts; a table (.csv, .tsv or .jsonl with the names of the columns) of image paths, relative to it, and captions,
            or the folder that it is in; shards of webdataset with .txt or .json; a data set of the Hub ("hf:owner/name") or a
            `datasets.Dataset`; or any list, stream or torch `Dataset` of (image, caption or captions) or of rows by name.
        transform: `Pair` -> what the model takes; None leaves it to `zoo.fit` and `zoo.evaluate`.
        split: beginning of the Parquet files' names, name of the table, or subfolder; needed where there are several.
        image_column, caption_column: guessed if there is one candidate.
        on_error: "skip" goes on without images that cannot be read.

    Raises:
        DataError: no such source, no such columns, a row without caption, images that are not there (named by path).
    """
    if isinstance(source, ImageDataset):
        return source if transform is None else source.with_transform(transform)
    if hasattr(source, "dataset") and hasattr(source, "collate_fn"):
        source = unwrapped(source)
    if isinstance(source, Mapping):
        source, split = one_split(source, split, type(source).__name__), None
    options: dict[str, Any] = {"medium": PAIRS, "column": image_column, "label_column": caption_column}
    rows: Any
    if not is_paths(source):
        hub = is_hub(source) and (getattr(source, "format", None) or {}).get("type") != "custom"
        rows = (HubPairs if hub else TorchPairs)(source, **options)
    elif table := _table(source, split):
        rows = ListedPairs(table, image_column, caption_column)
    else:
        found = locate(source, split, PAIRS)
        if found.kind == "hub":
            rows = HubPairs(found.place, split, sought=found.sought, **options)
        elif found.kind == "shards":
            rows = ShardPairs(found.files, name=short_name(found.files), **options)
        elif found.kind == "parquet":
            rows = ParquetPairs(found.files, name=short_name(found.files), **options)
        else:
            raise DataError(
                f"'{source}' holds no captions: expected Parquet files with a column of captions, shards, or a table "
                f"({', '.join(TABLES)}) of image paths and captions."
            )
    return ImageDataset(rows, None, transform=transform, on_error=on_error)


def caption_classes(dataset: ImageDataset, templates: Sequence[str]) -> ImageDataset:
    """Images with labels as pairs: the captions are the templates with the name of the class; a class is one group.

    Raises:
        ConfigError: no template, or one without a place {} for the name. DataError: the classes have no names.
    """
    if not templates or any("{}" not in t for t in templates):
        raise ConfigError("name one template or more, each with a place {} for the name of the class.")
    if dataset.classes is None:
        raise DataError(f"{dataset.name}: the classes have no names to make captions of; open it with classes=[...].")
    rows = ClassPairs(dataset.rows, [tuple(t.replace("{}", _words(c)) for t in templates) for c in dataset.classes])
    return ImageDataset(rows, None, indices=dataset.indices, on_error=dataset.on_error)


class _Captioned:
    """Rows whose labels are captions; `read` gives (`Pair`, index)."""

    captions: list[tuple[str, ...]]
    labels: np.ndarray | None = None
    where: Any

    def know(self, values: Sequence[Any]) -> None:
        """Take up the captions of all rows; a row is a group of its own."""
        self.captions = [_captions(value, self.where(row)) for row, value in enumerate(values)]
        self.labels = np.zeros(len(self.captions), dtype=np.int64)

    def target(self, index: int) -> tuple[str, ...]:
        """The captions of a row."""
        return self.captions[index]

    def read(self, index: int) -> tuple[Pair, int]:
        """(`Pair`, index)."""
        image, texts = super().read(index)  # type: ignore[misc]
        return Pair(image, _captions(texts, self.where(index))), index


class ParquetPairs(_Captioned, ParquetRows):
    """Rows of Parquet files with encoded images and captions."""

    def _find_label(self, schema: pa.Schema, wanted: str | None) -> str:
        texts = [f.name for f in schema if _is_text(f.type)]
        return choose_column(self.files[0], wanted, CAPTIONS, texts, schema.names, "caption_column")

    def _read_labels(self, schema: pa.Schema, class_names: Any, labels: str, given: bool) -> None:
        self.know(list(self._values(self.label_columns[0], nulls=True)))


class HubPairs(_Captioned, HubRows):
    """A data set of the library `datasets` with images and captions."""

    def _label(self, wanted: str | None, features: Mapping[str, Any], kind: Any) -> str:
        return choose_column(self.name, wanted, CAPTIONS, list(features), list(features), "caption_column")

    def _know(self, values: list[Any], names: Any, labels: str, own: Any = None) -> None:
        self.know(values)


class ShardPairs(_Captioned, ShardRows):
    """Tar files of images and captions: .txt, or .json with an entry "caption"."""

    label_parts = ("txt", "caption", "json")

    def _know(self, texts: list[Any], names: Any, labels: str, own: Any = None) -> None:
        self.know(texts)


class ListedPairs:
    """Rows of a table of image paths and captions; rows of one path are one image with several captions."""

    blocks: np.ndarray | None = None
    window = 1

    def __init__(self, table: Path, image_column: str | None = None, caption_column: str | None = None) -> None:
        self.name = f"{folder_name(table.parent)}/{table.stem}"
        found: dict[Path, list[str]] = {}
        missing: list[str] = []
        for line, row in rows_of(table):
            where = f"{table}, line {line}"
            image = row.get(choose_column(where, image_column, PAIRS.paths, list(row), list(row), "image_column"))
            text = row.get(choose_column(where, caption_column, CAPTIONS, list(row), list(row), "caption_column"))
            if not isinstance(image, str) or not image.strip():
                raise DataError(f"{where}: no path of an image.")
            path = table.parent / image
            if path not in found and not path.is_file():
                missing.append(f"{path} (line {line})")
            found.setdefault(path, []).extend(_captions(text, where))
        if not found:
            raise DataError(f"{table}: the table is empty.")
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise DataError(
                f"{table}: {len(missing)} of {len(found)} images are missing: {', '.join(missing[:3])}{more}. Paths are relative "
                "to the table's folder; copy the images there, or take their rows out."
            )
        self.paths, self.captions = list(found), [tuple(texts) for texts in found.values()]
        self.labels: np.ndarray | None = np.zeros(len(self.paths), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def where(self, index: int) -> str:
        """The image's path."""
        return shown(self.paths[index])

    def read(self, index: int) -> tuple[Pair, int]:
        """(`Pair`, index)."""
        image = decode(read_file(self.paths[index]), self.where(index))
        return Pair(image, self.captions[index]), index


class TorchPairs(_Captioned, TorchRows):
    """A torch `Dataset`, list or stream of (image, caption or captions), or of rows by name."""

    def _know(self, values: Any, given: bool) -> None:
        self.labels = np.zeros(len(self), dtype=np.int64)  # captions come with their images

    def _coerced(self, label: Any, where: str) -> Any:
        return label.decode("utf-8", "replace") if isinstance(label, bytes) else label


class ClassPairs:
    """Images with labels, the captions of a class being given."""

    def __init__(self, rows: Any, captions: Sequence[tuple[str, ...]]) -> None:
        self.rows, self.captions = rows, captions
        self.name, self.labels, self.blocks, self.window = rows.name, rows.labels, rows.blocks, rows.window

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        """The place of the image."""
        return self.rows.where(index)

    def read(self, index: int) -> tuple[Pair, int]:
        """(`Pair`, label)."""
        image, label = self.rows.read(index)
        return Pair(image, self.captions[int(label)]), int(label)


def _table(source: Any, split: str | None) -> Path | None:
    """The table that a path means: itself, or the one of a folder."""
    if isinstance(source, (list, tuple)):
        return None
    path = Path(source).expanduser()
    if path.is_file():
        return path if path.suffix.lower() in TABLES else None
    if not path.is_dir():
        return None
    if split is not None and (path / split).is_dir():
        return _table(path / split, None)
    tables = tables_in(path)
    if not tables:
        return None
    if split is not None:
        if split not in tables:
            raise DataError(f"{path}: no table of the split '{split}'. {nearest(split, tables)}")
        return tables[split]
    named = [tables[name] for name in ("captions", "metadata") if name in tables]
    if not named and len(tables) > 1:
        raise DataError(f"{path}: holds several tables ({', '.join(tables)}); choose one with split=...")
    return named[0] if named else next(iter(tables.values()))


def _captions(value: Any, where: str) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise DataError(
            f"{where}: the caption is {value!r:.80}; expected a text, or a list of texts, none of them empty."
        )
    return tuple(texts)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_text(kind.value_type)
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _words(name: str) -> str:
    return name.replace("_", " ")
