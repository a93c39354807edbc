"""Data sets of images with captions: Parquet files, tables beside image files, any torch `Dataset`, or images with labels.

    train = open_pairs("flickr8k/", split="train")
    train = caption_classes(zoo.open_dataset("cifar100/", split="train"), ["a photo of a {}.", "a small {}."])

The result is a `zoo.data.ImageDataset` whose items are (`Pair`, group); pairs of one group show the same, so they are no
negatives of each other.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch.utils.data import Dataset

from zoo.data.dataset import ImageDataset, OnError, Transform
from zoo.data.images import decode
from zoo.data.open import _folder_name, _locate, _short_name
from zoo.data.parquet import ParquetRows
from zoo.data.sources import TorchRows, read_file
from zoo.errors import ConfigError, DataError, nearest

__all__ = ["Pair", "caption_classes", "open_pairs"]

CAPTIONS = ("captions", "caption", "text", "texts", "sentence", "sentences", "title", "description")
PATHS = ("image", "file_name", "filename", "path", "filepath", "image_path", "file", "img")
TABLES = (".csv", ".tsv", ".jsonl")


@dataclass(frozen=True)
class Pair:
    """An image and what is said of it, in one or more texts."""

    image: Any
    captions: tuple[str, ...]


def open_pairs(
    source: str | Path | Sequence[Any] | Dataset[Any],
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
            or the folder that it is in; or any list or torch `Dataset` of (image, caption or captions).
        transform: `Pair` -> what the model takes; None leaves it to `zoo.fit` and `zoo.evaluate`.
        split: beginning of the Parquet files' names, name of the table, or subfolder; needed where there are several.
        image_column, caption_column: guessed if there is one candidate.
        on_error: "skip" goes on without images that cannot be read.

    Raises:
        DataError: no such source, no such columns, a row without caption, images that are not there (named by path).
    """
    if isinstance(source, ImageDataset):
        return source if transform is None else source.with_transform(transform)
    rows: Any
    first = source[0] if isinstance(source, (list, tuple)) and source else source
    if isinstance(source, Dataset) or not isinstance(first, (str, Path, list)):
        rows = TorchPairs(source)
    elif table := _table(source, split):
        rows = ListedPairs(table, image_column, caption_column)
    else:
        found = _locate(source, split)
        if not isinstance(found, list):
            raise DataError(
                f"'{source}' holds no captions: expected Parquet files with a column of captions, or a table "
                f"({', '.join(TABLES)}) of image paths and captions."
            )
        rows = ParquetPairs(found, image_column=image_column, label_column=caption_column, name=_short_name(found))
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
    rows = ClassPairs(dataset.rows, [tuple(t.format(_words(c)) for t in templates) for c in dataset.classes])
    return ImageDataset(rows, None, indices=dataset.indices, on_error=dataset.on_error)


class ParquetPairs(ParquetRows):
    """Rows of Parquet files with encoded images and captions."""

    def _find_label(self, schema: pa.Schema, wanted: str | None) -> str:
        texts = [f.name for f in schema if _is_text(f.type)]
        return _column(self.files[0], wanted, CAPTIONS, texts, schema.names, "caption_column")

    def _read_labels(self, schema: pa.Schema, class_names: Any) -> tuple[np.ndarray, list[str]]:
        values = [value for number in range(len(self.files)) for value in self._labels_of(number).to_pylist()]
        self.captions = [_captions(value, self.where(row)) for row, value in enumerate(values)]
        return np.zeros(len(values), dtype=np.int64), []

    def read(self, index: int) -> tuple[Any, int]:
        """(`Pair`, index)."""
        image, _ = super().read(index)
        return Pair(image, self.captions[index]), index


class ListedPairs:
    """Rows of a table of image paths and captions; rows of one path are one image with several captions."""

    blocks: np.ndarray | None = None
    window = 1

    def __init__(self, table: Path, image_column: str | None = None, caption_column: str | None = None) -> None:
        self.name = f"{_folder_name(table.parent)}/{table.stem}"
        found: dict[Path, list[str]] = {}
        missing: list[str] = []
        for line, row in _rows(table):
            where = f"{table}, line {line}"
            image = row.get(_column(where, image_column, PATHS, list(row), list(row), "image_column"))
            text = row.get(_column(where, caption_column, CAPTIONS, list(row), list(row), "caption_column"))
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
        return str(self.paths[index])

    def read(self, index: int) -> tuple[Pair, int]:
        """(`Pair`, index)."""
        image = decode(read_file(self.paths[index]), self.where(index))
        return Pair(image, self.captions[index]), index


class TorchPairs(TorchRows):
    """A torch `Dataset` of (image, caption or captions)."""

    def __init__(self, dataset: Any) -> None:
        super().__init__(dataset)
        self.labels = np.zeros(len(self), dtype=np.int64)

    def read(self, index: int) -> tuple[Pair, int]:
        """(`Pair`, index)."""
        image, text = super().read(index)
        return Pair(image, _captions(text, self.where(index))), index


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
    tables = {p.stem: p for p in sorted(path.iterdir()) if p.suffix.lower() in TABLES and not p.name.startswith(".")}
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


def _rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row by names of columns) of a table."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            if table.suffix.lower() == ".jsonl":
                for line, text in enumerate(file, 1):
                    if text.strip():
                        row = json.loads(text)
                        if not isinstance(row, dict):
                            raise DataError(f"{table}, line {line}: expected a JSON object.")
                        yield line, row
            else:
                reader = csv.DictReader(file, delimiter="\t" if table.suffix.lower() == ".tsv" else ",")
                for row in reader:
                    yield reader.line_num, {str(k).strip(): v for k, v in row.items()}
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{table}: cannot be read ({error}).") from error


def _column(
    where: Any, wanted: str | None, known: Sequence[str], fitting: list[str], there: list[str], setting: str
) -> str:
    if wanted is not None:
        if wanted not in there:
            raise DataError(f"{where}: no column '{wanted}' ({setting}). {nearest(wanted, there)}")
        return wanted
    for name in known:
        if name in fitting:
            return name
    raise DataError(f"{where}: name one of its columns with {setting}=...; columns: {', '.join(there)}.")


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
