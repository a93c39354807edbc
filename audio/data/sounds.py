"""Data sets of sounds with labels: folders of audio files, Parquet files with an audio column, data sets of the Hub.

    train = open_audio("fsdd/", split="train")
    train, test = (open_audio("esc10/", only={"fold": folds}) for folds in ([1, 2, 3], 4))

The result is a `zoo.data.ImageDataset` of (Sound, label): selections, few shots, class names and skipping what cannot be read
are those of images. A column of lists (class names or indices) makes a multi-label set: its targets are (num_classes,)
of 0 and 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from torch import Tensor

from audio.data.sound import Sound, as_sound, decode
from zoo.data.dataset import ImageDataset, OnError, Rows, Transform
from zoo.data.medium import LABEL_COLUMNS, Medium
from zoo.data.open import open_with
from zoo.data.parquet import ParquetRows
from zoo.data.sampling import few_shot
from zoo.errors import DataError, nearest

__all__ = ["SOUNDS", "open_audio"]


def open_audio(
    source: Any,
    *,
    transform: Transform | None = None,
    split: str | None = None,
    audio_column: str | None = None,
    label_column: str | Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    labels: str = "auto",
    only: Mapping[str, Any] | None = None,
    shots: int | None = None,
    seed: int = 0,
    on_error: OnError = "raise",
) -> ImageDataset:
    """Sounds with labels.

    Args:
        source: a folder (`<class>/<file>.wav`), a table of files and labels or its folder, Parquet files (a file, a folder, a
            pattern, a list) with a column of encoded sounds, shards of webdataset, the name of a Hub data set ("owner/name", or
            "hf:name"), a `datasets.Dataset`, or any torch `Dataset`, list or stream of (what `audio.data.sound.as_sound` takes,
            label) or of rows {"audio": ..., "label": ...}.
        transform: `Sound` -> what the model takes; None leaves it to `zoo.fit` and `zoo.evaluate`.
        split: a subfolder, or the beginning of the Parquet files' names, or a split of a Hub data set; needed where there are
            several.
        audio_column, label_column: columns of tables and rows; guessed if there is one candidate. Labels that are lists make a
            multi-label set.
        classes: all class names, in the order of the labels. By default `classes.json` beside the files, the names in the files'
            metadata, the names of the folders, or the labels themselves.
        labels: what the labels are, as `zoo.open_dataset` has it: "classes", "tags", "numbers"; by default by their type.
        only: take only rows with these values in other columns of Parquet files: {"fold": [1, 2, 3]}.
        shots: take only so many sounds of every class, drawn with `seed`.
        on_error: "skip" goes on without sounds that cannot be read (they are counted); "raise" stops and names the first.

    Raises:
        DataError: no such source, an empty one, several splits, missing columns, labels outside the classes, too few for `shots`.
        MissingPackageError: files, without the package `soundfile`; a Hub data set, without `datasets`.
    """
    dataset = open_with(
        SOUNDS,
        source,
        transform=transform,
        split=split,
        column=audio_column,
        label_column=label_column,
        classes=classes,
        labels=labels,
        on_error=on_error,
    )
    if only:
        dataset = dataset.select(_rows_with(dataset.rows, only)[dataset.indices].nonzero()[0])
        if not len(dataset):
            raise DataError(f"{dataset.name}: no row has {', '.join(f'{k}={v!r}' for k, v in only.items())}.")
    return dataset if shots is None else few_shot(dataset, shots, seed)


def _accept(value: Any, where: str) -> Any:
    """A waveform as a checked sound; a tensor of more dimensions is taken to be ready for the model (features)."""
    return value if isinstance(value, Tensor) and value.ndim > 1 else as_sound(value, where=where)


SOUNDS = Medium(
    thing="sound",
    noun="sounds",
    setting="audio_column",
    decode=decode,
    accept=_accept,
    raw=lambda value: isinstance(value, Sound),
    extensions=(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au"),
    columns=("audio", "sound", "speech", "wav", "waveform", "recording", "clip", "file"),
    paths=("file_name", "filename", "file", "path", "filepath", "audio_path", "audio", "sound", "id"),
    feature="Audio",
    ready=("input_values", "input_features"),
    label_columns=(*LABEL_COLUMNS, "digit", "word", "command", "keyword", "emotion", "genre"),
    expected="<class>/<file>.wav, a table of files and labels (labels.csv), or Parquet files with an audio column",
)


def _rows_with(rows: Rows, only: Mapping[str, Any]) -> np.ndarray:
    """(n,) bool: the rows of Parquet files that have these values."""
    if not isinstance(rows, ParquetRows):
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
