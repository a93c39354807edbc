"""Data sets of sounds with what is said in them.

    train = open_transcripts("speech/", split="train")

- a folder with `metadata.csv` (or `<split>.csv`): a column of file names (`file_name`, `path`, `file`) and one of texts;
- Parquet files with a column of encoded sounds and one of texts (`text`, `sentence`, `transcription`, `transcript`, ...);
- a list or torch `Dataset` of (what `audio.data.sound.as_sound` takes or the path of a file, text).

The result is a `zoo.data.ImageDataset` of (`Sound`, text).
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from audio.data.sound import Sound, as_sound, decode
from audio.data.sounds import SOUNDS
from zoo.data.dataset import ImageDataset, OnError
from zoo.data.parquet import ParquetRows
from zoo.errors import DataError, nearest

__all__ = ["heard", "open_transcripts"]

TEXTS = ("text", "sentence", "transcription", "transcript", "normalized_text", "raw_transcription", "words")
FILES = ("file_name", "path", "file", "filename", "audio")


def open_transcripts(source: Any, *, split: str | None = None, on_error: OnError = "raise") -> ImageDataset:
    """Sounds with texts; see the top of this file for what `source` can be.

    Raises:
        DataError: no such source, several splits, no such columns, an empty text.
    """
    if isinstance(source, ImageDataset):
        return source
    rows: Any
    if isinstance(source, (Dataset, list, tuple)):
        rows = GivenTranscripts(source)
    elif not isinstance(source, (str, Path)):
        raise DataError(f"{type(source).__name__} is no data set of transcripts. {_EXPECTED}")
    else:
        path = Path(source).expanduser()
        table = path if path.suffix == ".csv" else _table(path, split)
        rows = ListedTranscripts(table) if table is not None else ParquetTranscripts(_parquet(path, split))
    return ImageDataset(rows, None, on_error=on_error)


_EXPECTED = (
    "Expected a folder with metadata.csv, Parquet files with a column of sounds and one of texts, or a list of pairs "
    "(sound, text)."
)


def _table(folder: Path, split: str | None) -> Path | None:
    if not folder.is_dir():
        return None
    names = [f"{split}.csv", f"{split}/metadata.csv"] if split else ["metadata.csv"]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _parquet(path: Path, split: str | None) -> list[Path]:
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet")) if path.is_dir() else []
    found = [f for f in files if split is None or f.name.startswith(split) or f.parent.name == split]
    if not found:
        what = f"no Parquet files of the split '{split}'" if files else "neither metadata.csv nor Parquet files"
        raise DataError(f"{path}: {what}. {_EXPECTED}" if path.exists() else f"There is no '{path}'. {_EXPECTED}")
    kinds = sorted({f.name.split("-")[0].split(".")[0] for f in found})
    if split is None and len(kinds) > 1:
        raise DataError(f"{path}: there are the splits {', '.join(kinds)}; name one with split=.")
    return found


def heard(value: Any, where: str) -> Sound:
    """A sound, of a file's path or of anything that `as_sound` takes."""
    if isinstance(value, (str, Path)):
        try:
            return decode(Path(value).expanduser().read_bytes(), str(value))
        except OSError as error:
            raise DataError(f"{where}: the file '{value}' cannot be read ({error}).") from error
    if isinstance(value, (bytes, bytearray)):
        return decode(value, where)
    return as_sound(value, where=where)


def _checked(text: Any, where: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: the text is {text!r:.80}; expected what is said, in words.")
    return text


class _Rows:
    """What all sources of transcripts share."""

    name: str
    noun = "sounds"
    labels: np.ndarray | None = None
    blocks: np.ndarray | None = None
    window = 1
    texts: list[str]

    def __len__(self) -> int:
        return len(self.texts)


class GivenTranscripts(_Rows):
    """A list or torch `Dataset` of (sound, text)."""

    def __init__(self, source: Any) -> None:
        self.source, self.name = source, type(source).__name__
        if not len(source):
            raise DataError(f"{self.name}: the data set is empty.")
        self.texts = [self._pair(i)[1] for i in range(len(source))]

    def _pair(self, index: int) -> tuple[Any, str]:
        item = self.source[index]
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise DataError(
                f"{self.where(index)}: expected a pair (sound, text), not {type(item).__name__}. {_EXPECTED}"
            )
        return item[0], _checked(item[1], self.where(index))

    def where(self, index: int) -> str:
        """The place of an item."""
        return f"{self.name}, item {index}"

    def read(self, index: int) -> tuple[Sound, str]:
        """(`Sound`, text)."""
        sound, text = self._pair(index)
        return heard(sound, self.where(index)), text


class ListedTranscripts(_Rows):
    """A CSV of file names, which are relative to it, and texts."""

    def __init__(self, table: Path) -> None:
        self.table, self.name = table, table.resolve().parent.name
        try:
            with table.open(newline="", encoding="utf-8-sig") as lines:
                reader = csv.DictReader(lines)
                rows, columns = list(reader), list(reader.fieldnames or ())
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{table}: cannot be read ({error}).") from error
        file, text = (_column(table, columns, names) for names in (FILES, TEXTS))
        self.files = [table.parent / str(row[file] or "") for row in rows]
        self.texts = [_checked(row[text], self.where(i)) for i, row in enumerate(rows)]
        if not rows:
            raise DataError(f"{table}: there is no row.")

    def where(self, index: int) -> str:
        """File and line, as an editor counts them."""
        return f"{self.table}, line {index + 2}"

    def read(self, index: int) -> tuple[Sound, str]:
        """(`Sound`, text)."""
        return heard(self.files[index], self.where(index)), self.texts[index]


def _column(table: Path, columns: Sequence[str], wanted: Sequence[str]) -> str:
    found = next((name for name in wanted if name in columns), None)
    if found is None:
        raise DataError(
            f"{table}: no column {' or '.join(wanted)}; columns: {', '.join(columns) or 'none'}. {nearest(wanted[0], columns)}"
        )
    return found


class ParquetTranscripts(ParquetRows):
    """The rows of Parquet files with a column of encoded sounds and one of texts."""

    texts: list[str]

    def __init__(self, files: Sequence[Path]) -> None:
        super().__init__(files, medium=replace(SOUNDS, label_columns=TEXTS))

    def _read_labels(self, schema: Any, class_names: Any, labels: str, given: bool) -> None:
        texts = self._values(self.label_columns[0])
        self.texts = [_checked(text, self.where(i)) for i, text in enumerate(texts)]

    def target(self, index: int) -> Any:
        """The text."""
        return self.texts[index]
