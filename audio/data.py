"""Data sets of sounds with labels: folders of audio files, Parquet files with an audio column, any torch `Dataset`.

    train = open_audio("fsdd/", split="train")
    train, test = (open_audio("esc10/", only={"fold": folds}) for folds in ([1, 2, 3], 4))

The result is a `zoo.data.ImageDataset` of (Sound, label): selections, few shots, class names and skipping what cannot be read
are those of images. A column of lists (class names or indices) makes a multi-label set: its targets are (num_classes,)
of 0 and 1.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import Dataset

from audio.sound import Sound, as_sound, decode
from zoo.data.dataset import ImageDataset, OnError, Rows, Skipped, Transform
from zoo.data.open import _class_names, _classes_json, _folder_name, _locate, _own_classes, _short_name
from zoo.data.parquet import LABEL_COLUMNS, ParquetRows
from zoo.data.sampling import few_shot
from zoo.data.sources import TorchRows, check_labels
from zoo.errors import DataError, nearest

__all__ = ["AudioFolderRows", "AudioParquetRows", "open_audio"]

EXTENSIONS = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au")
AUDIO_COLUMNS = ("audio", "sound", "speech", "wav", "waveform", "recording", "clip", "file")
AUDIO_LABELS = (*LABEL_COLUMNS, "digit", "word", "command", "keyword", "emotion", "genre")


def open_audio(
    source: str | Path | Sequence[str | Path] | Dataset[Any],
    *,
    transform: Transform | None = None,
    split: str | None = None,
    audio_column: str | None = None,
    label_column: str | None = None,
    classes: Sequence[str] | None = None,
    only: Mapping[str, Any] | None = None,
    shots: int | None = None,
    seed: int = 0,
    on_error: OnError = "raise",
) -> ImageDataset:
    """Sounds with labels.

    Args:
        source: a folder (`<class>/<file>.wav`), Parquet files (a file, a folder, a pattern, a list) with a column of encoded
            sounds, or any torch `Dataset` of (what `audio.sound.as_sound` takes, label).
        transform: `Sound` -> what the model takes; None leaves it to `zoo.fit` and `zoo.evaluate`.
        split: a subfolder, or the beginning of the Parquet files' names; needed where there are several.
        audio_column, label_column: columns of Parquet files; guessed if there is one candidate. Labels that are lists make a
            multi-label set.
        classes: all class names, in the order of the labels. By default `classes.json` beside the files, the names in the files'
            metadata, the names of the folders, or the labels themselves.
        only: take only rows with these values in other columns of Parquet files: {"fold": [1, 2, 3]}.
        shots: take only so many sounds of every class, drawn with `seed`.
        on_error: "skip" goes on without sounds that cannot be read (they are counted); "raise" stops and names the first.

    Raises:
        DataError: no such source, an empty one, several splits, missing columns, labels outside the classes, too few for `shots`.
        MissingPackageError: files, without the package `soundfile`.
    """
    names = _class_names(classes)
    if isinstance(source, ImageDataset):
        dataset = source if transform is None else source.with_transform(transform)
    elif isinstance(source, Dataset) or not isinstance(source, (str, Path, list, tuple)):
        rows = _torch_rows(cast("Dataset[Any]", source))
        known = names if names is not None else _class_names(_own_classes(source))
        if known is None and rows.labels is not None:
            known = [str(i) for i in range(int(rows.labels.max()) + 1)]
        if known is not None:
            check_labels(rows, len(known))
        dataset = ImageDataset(rows, known, transform=transform, on_error=on_error)
    else:
        dataset = _open_files(source, split, audio_column, label_column, names).with_transform(transform)
        dataset.on_error = on_error
    if only:
        dataset = dataset.select(_rows_with(dataset.rows, only)[dataset.indices].nonzero()[0])
        if not len(dataset):
            raise DataError(f"{dataset.name}: no row has {', '.join(f'{k}={v!r}' for k, v in only.items())}.")
    return dataset if shots is None else few_shot(dataset, shots, seed)


def _open_files(
    source: str | Path | Sequence[str | Path],
    split: str | None,
    audio_column: str | None,
    label_column: str | None,
    names: list[str] | None,
) -> ImageDataset:
    found = _locate(source, split)
    if isinstance(found, str):
        raise DataError(
            f"'{found}' is no file or folder. Sounds are read from local folders and Parquet files; download a data set of "
            "the Hub as Parquet first (`hf download --repo-type dataset`)."
        )
    if isinstance(found, Path):
        folder = AudioFolderRows(found, names if names is not None else _classes_json(found), name=_folder_name(found))
        return ImageDataset(folder, folder.class_names)
    schema = _schema(found[0])
    label = label_column or next((n for n in AUDIO_LABELS if n in schema.names), None)
    parquet = AudioParquetRows(
        found,
        image_column=_audio_column(schema, audio_column, found[0]),
        label_column=label,
        class_names=names if names is not None else _classes_json(found[0].parent, label),
        name=_short_name(found),
    )
    return ImageDataset(parquet, parquet.class_names)


class AudioFolderRows:
    """A folder with one subfolder for each class, and audio files anywhere below it.

    Classes are the subfolders in alphabetical order, or `class_names`; then a subfolder of another name is an error.
    """

    blocks: np.ndarray | None = None
    window = 1

    def __init__(self, folder: Path, class_names: Sequence[str] | None = None, name: str = "") -> None:
        self.folder, self.name = folder, name or folder.name
        found = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        if not found:
            raise DataError(
                f"{folder}: no class subfolders. Expected {folder.name}/<class>/<file>.wav, or Parquet files with an audio "
                "column."
            )
        self.class_names = list(class_names) if class_names is not None else found
        if unknown := [n for n in found if n not in self.class_names]:
            raise DataError(
                f"{folder / unknown[0]}: '{unknown[0]}' is not among the {len(self.class_names)} classes. "
                f"{nearest(unknown[0], self.class_names)}"
            )
        files = [(file, self.class_names.index(name)) for name in found for file in _sounds_below(folder / name)]
        if not files:
            raise DataError(f"{folder}: no sound in its {len(found)} class folders ({', '.join(EXTENSIONS)}).")
        self._paths = [file for file, _ in files]
        self.labels: np.ndarray | None = np.asarray([label for _, label in files], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._paths)

    def where(self, index: int) -> str:
        return self._paths[index]

    def read(self, index: int) -> tuple[Sound, int]:
        assert self.labels is not None
        where = self.where(index)
        try:
            data = Path(where).read_bytes()
        except OSError as error:
            raise DataError(f"{where}: cannot be read ({error.strerror}).") from error
        return decode(data, where), int(self.labels[index])


def _sounds_below(folder: Path) -> list[str]:
    found = []
    for root, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        found += [
            str(Path(root) / f) for f in sorted(files) if f.lower().endswith(EXTENSIONS) and not f.startswith(".")
        ]
    return found


class AudioParquetRows(ParquetRows):
    """The rows of Parquet files with a column of encoded sounds. `targets` (n, classes) if the labels are lists."""

    targets: np.ndarray | None = None

    def _read_labels(self, schema: pa.Schema, class_names: Sequence[str] | None) -> tuple[Any, list[str]]:
        kind = schema.field(self.label_column).type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            return super()._read_labels(schema, class_names)
        columns = [self._labels_of(number) for number in range(len(self.files))]
        lists = [[] if found is None else found for column in columns for found in column.to_pylist()]
        values = sorted({label for found in lists for label in found})
        words = any(isinstance(v, str) for v in values)
        names = list(class_names) if class_names is not None else None
        if names is None:
            names = [str(v) for v in values] if words else [str(i) for i in range(max(values, default=-1) + 1)]
        place = {name: i for i, name in enumerate(names)} if words else {i: i for i in range(len(names))}
        self.targets = np.zeros((len(lists), len(names)), dtype=np.float32)
        for row, found in enumerate(lists):
            for label in found:
                if label not in place:
                    raise DataError(f"{self.where(row)}: label {label!r} is not among the {len(names)} classes.")
                self.targets[row, place[label]] = 1.0
        return None, names

    def read(self, index: int) -> tuple[Sound, Any]:  # type: ignore[override]
        data = self.encoded(index)
        if self.targets is not None:
            return decode(data, self.where(index)), torch.from_numpy(self.targets[index])
        assert self.labels is not None
        return decode(data, self.where(index)), int(self.labels[index])

    def encoded(self, index: int) -> bytes | None:
        """The bytes of the file in a row."""
        block = int(np.searchsorted(self._starts, index, side="right")) - 1
        value = self._column(block)[index - self._starts[block]].as_py()
        return cast("bytes | None", value.get("bytes") if isinstance(value, dict) else value)


def _schema(file: Path) -> pa.Schema:
    try:
        return pq.read_schema(file)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file}: not a readable Parquet file ({error}). Copy or download it again.") from error


def _audio_column(schema: pa.Schema, wanted: str | None, file: Path) -> str:
    """The column of encoded sounds: the one that is named, or that has a usual name, or the only one of bytes."""
    described = ", ".join(f"{f.name} ({f.type})" for f in schema)
    if wanted is not None and wanted not in schema.names:
        raise DataError(f"{file}: no column '{wanted}' (audio_column); columns: {described}.")
    fitting = [f.name for f in schema if _holds_bytes(f.type)]
    if wanted is not None and wanted not in fitting:
        raise DataError(
            f"{file}: column '{wanted}' is of type {schema.field(wanted).type}; expected encoded sounds (binary, or a struct "
            "with 'bytes')."
        )
    usual = [n for n in AUDIO_COLUMNS if n in fitting]
    if wanted or usual or len(fitting) == 1:
        return wanted or [*usual, *fitting][0]
    reason = "several columns could hold the sounds" if fitting else "no column holds encoded sounds"
    raise DataError(f"{file}: {reason}; columns: {described}. Name it with audio_column=...")


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _rows_with(rows: Rows, only: Mapping[str, Any]) -> np.ndarray:
    """(n,) bool: the rows of Parquet files that have these values."""
    if not isinstance(rows, AudioParquetRows):
        raise DataError(f"{rows.name}: only= chooses by columns of Parquet files, and this source has none.")
    keep = np.ones(len(rows), dtype=bool)
    for name, wanted in only.items():
        for file in rows.files:
            if name not in (known := _schema(file).names):
                raise DataError(
                    f"{file}: no column '{name}' (only); columns: {', '.join(known)}. {nearest(name, known)}"
                )
        values = list(wanted) if isinstance(wanted, (list, tuple, set, range, np.ndarray)) else [wanted]
        column = pa.concat_tables([pq.read_table(file, columns=[name]) for file in rows.files]).column(0)
        try:
            keep &= pc.is_in(column, value_set=pa.array(values).cast(column.type)).to_numpy(zero_copy_only=False)
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise DataError(f"{rows.name}: {name}={wanted!r} does not fit its type {column.type} ({error}).") from error
    return keep


class _SoundRows:
    """A torch data set of waveforms, which are checked as they are read."""

    blocks: np.ndarray | None = None
    window = 1

    def __init__(self, inner: TorchRows) -> None:
        self.inner, self.name, self.labels = inner, inner.name, inner.labels

    def __len__(self) -> int:
        return len(self.inner)

    def where(self, index: int) -> str:
        return self.inner.where(index)

    def read(self, index: int) -> tuple[Sound, Any]:
        wave, label = self.inner.read(index)
        return as_sound(wave, where=self.where(index)), label


def _torch_rows(dataset: Dataset[Any]) -> Rows:
    """Rows of waveforms, or of what is ready for the model (features (T, mel), as the first item shows)."""
    rows = TorchRows(dataset)
    first = dataset[0]
    ready = isinstance(first, Skipped) or (
        isinstance(first, (tuple, list)) and isinstance(first[0], Tensor) and first[0].ndim > 1
    )
    return rows if ready else _SoundRows(rows)
