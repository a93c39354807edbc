"""Data sets of sounds with labels: folders of audio files, Parquet files with an audio column, data sets of the Hub.

    train = open_audio("fsdd/", split="train")
    train, test = (open_audio("esc10/", only={"fold": folds}) for folds in ([1, 2, 3], 4))

The result is a `zoo.data.ImageDataset` of (Sound, label): selections, few shots, class names and skipping what cannot be read
are those of images. A column of lists (class names or indices) makes a multi-label set: its targets are (num_classes,)
of 0 and 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import Dataset

from audio.data.sound import Sound, as_sound, decode
from zoo.data.dataset import ImageDataset, OnError, Rows, Skipped, Transform
from zoo.data.open import Readers, open_with
from zoo.data.parquet import LABEL_COLUMNS, ParquetRows
from zoo.data.sampling import few_shot
from zoo.data.sources import FolderRows, HubRows, TorchRows
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
            sounds, the name of a Hub data set ("owner/name", or "hf:name"), or any torch `Dataset` of (what
            `audio.data.sound.as_sound` takes, label).
        transform: `Sound` -> what the model takes; None leaves it to `zoo.fit` and `zoo.evaluate`.
        split: a subfolder, or the beginning of the Parquet files' names, or a split of a Hub data set; needed where there are
            several.
        audio_column, label_column: columns of Parquet files; guessed if there is one candidate. Labels that are lists make a
            multi-label set.
        classes: all class names, in the order of the labels. By default `classes.json` beside the files, the names in the files'
            metadata, the names of the folders, or the labels themselves.
        only: take only rows with these values in other columns of Parquet files: {"fold": [1, 2, 3]}.
        shots: take only so many sounds of every class, drawn with `seed`.
        on_error: "skip" goes on without sounds that cannot be read (they are counted); "raise" stops and names the first.

    Raises:
        DataError: no such source, an empty one, several splits, missing columns, labels outside the classes, too few for `shots`.
        MissingPackageError: files, without the package `soundfile`; a Hub data set, without `datasets`.
    """
    dataset = open_with(
        Readers(AudioFolderRows, AudioParquetRows, _torch_rows, AudioHubRows),
        source,
        transform=transform,
        split=split,
        column=audio_column,
        label_column=label_column,
        classes=classes,
        on_error=on_error,
    )
    if only:
        dataset = dataset.select(_rows_with(dataset.rows, only)[dataset.indices].nonzero()[0])
        if not len(dataset):
            raise DataError(f"{dataset.name}: no row has {', '.join(f'{k}={v!r}' for k, v in only.items())}.")
    return dataset if shots is None else few_shot(dataset, shots, seed)


class AudioFolderRows(FolderRows):
    """A folder with one subfolder for each class, and audio files anywhere below it."""

    decode = staticmethod(decode)
    extensions, noun = EXTENSIONS, "sounds"
    expected = "<class>/<file>.wav, or Parquet files with an audio column"
    nothing = "no sound in its {} class folders"


class AudioParquetRows(ParquetRows):
    """The rows of Parquet files with a column of encoded sounds. `targets` (n, classes) if the labels are lists."""

    decode = staticmethod(decode)
    columns = AUDIO_COLUMNS
    label_columns = AUDIO_LABELS
    thing, setting, noun = "sound", "audio_column", "sounds"
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

    def _target(self, index: int) -> Any:
        return super()._target(index) if self.targets is None else torch.from_numpy(self.targets[index])


class AudioHubRows(HubRows):
    """A data set of the Hub with a column of sounds, one split of it."""

    decode = staticmethod(decode)
    feature, setting, noun = "Audio", "audio_column", "sounds"


def _rows_with(rows: Rows, only: Mapping[str, Any]) -> np.ndarray:
    """(n,) bool: the rows of Parquet files that have these values."""
    if not isinstance(rows, AudioParquetRows):
        raise DataError(f"{rows.name}: only= chooses by columns of Parquet files, and this source has none.")
    keep = np.ones(len(rows), dtype=bool)
    for name, wanted in only.items():
        for file in rows.files:
            if name not in (known := pq.read_schema(file).names):
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
    """A torch data set of waveforms, which are checked as they are read. No `TorchRows`: those may be ready for the model."""

    noun = "sounds"
    blocks: np.ndarray | None = None
    window = 1

    def __init__(self, inner: TorchRows) -> None:
        self.inner, self.name, self.labels, self.where = inner, inner.name, inner.labels, inner.where

    def __len__(self) -> int:
        return len(self.inner)

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
