"""Rows of Parquet files with a column of encoded images and a column of labels.

Labels are read once. Encoded images stay encoded: a small data set (by default up to 1 GiB) is held as it is, in Arrow
buffers that worker processes share; of a larger one a few row groups are held at a time, and `blocks` and `window`
tell the sampler which rows lie together and how many groups fit, so that a shuffled epoch reads each group about once.
"""

from __future__ import annotations

import bisect
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from zoo.data.folders import read_file
from zoo.data.labels import Labelled, read_labels
from zoo.data.medium import CAPTIONS, IMAGES, Medium
from zoo.errors import DataError, nearest

__all__ = ["ParquetRows"]

HOLD_BYTES = 1 << 30
CACHE_BYTES = 256 << 20
OPEN_FILES = 32


class ParquetRows(Labelled):
    """The rows of `files`, one after the other.

    Args:
        files: Parquet files with the same columns.
        medium: what the encoded items are.
        column, label_column: their names; guessed if None. Several label columns make tags (of 0 and 1) or numbers.
        class_names: names; a label is then an index or a name. Otherwise those of the data, or the labels.
        own_names: what finds the data's own names for a label column; otherwise these are from the files' own metadata.
        labels: see `zoo.data.labels`.
        hold_bytes: up to this size all encoded images are kept in memory.
        cache_bytes: of larger data sets, how many bytes of row groups are kept.
        name: a short name for reports.
    """

    def __init__(
        self,
        files: Sequence[Path],
        *,
        medium: Medium = IMAGES,
        column: str | None = None,
        label_column: str | Sequence[str] | None = None,
        class_names: Sequence[str] | None = None,
        own_names: Callable[[str], list[str] | None] | None = None,
        labels: str = "auto",
        hold_bytes: int = HOLD_BYTES,
        cache_bytes: int = CACHE_BYTES,
        name: str = "",
    ) -> None:
        self.files = [Path(file) for file in files]
        self.medium, self.noun = medium, medium.noun
        self.name = name or self.files[0].stem
        self._readers: dict[int, pq.ParquetFile] = {}
        self._cache: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._pid = os.getpid()
        schema = self._reader(0).schema_arrow
        self.column = self._find_column(schema, column)
        several = label_column is not None and not isinstance(label_column, str)
        self.label_columns = (
            [self._find_label(schema, name) for name in label_column or ()]
            if several
            else [self._find_label(schema, label_column)]  # type: ignore[arg-type]
        )
        self._index(cache_bytes, hold_bytes)
        self._own_names = own_names
        self._read_labels(schema, class_names, labels, class_names is not None)

    def _find_column(self, schema: pa.Schema, wanted: str | None) -> str:
        """The column of encoded images: the named one, or one with a usual name, or the only one of bytes."""
        if wanted is not None:
            self._require(wanted, schema, self.medium.setting)
            if not _holds_bytes(kind := schema.field(wanted).type):
                raise DataError(
                    f"{self.files[0]}: column '{wanted}' is of type {kind}; expected encoded {self.medium.noun} (binary, or a "
                    "struct with 'bytes')."
                )
            return wanted
        fitting = [f.name for f in schema if _holds_bytes(f.type)]
        if usual := [n for n in self.medium.columns if n in fitting] or (fitting if len(fitting) == 1 else []):
            return usual[0]
        several = f"several columns could hold the {self.medium.noun}"
        reason = several if fitting else f"no column holds encoded {self.medium.noun}"
        raise self._undecided(reason, schema, self.medium.setting)

    def _find_label(self, schema: pa.Schema, wanted: str | None) -> str:
        if wanted is not None:
            self._require(wanted, schema, "label_column")
            return wanted
        others = [n for n in schema.names if n != self.column]
        fitting = [n for n in others if pa.types.is_integer(schema.field(n).type)]
        single = fitting if len(fitting) == 1 else others if len(others) == 1 and others[0] not in CAPTIONS else []
        if usual := [n for n in self.medium.label_columns if n in others] or single:
            return usual[0]
        reason = "several columns could hold the labels" if fitting else "no column holds labels"
        raise self._undecided(reason, schema, "label_column")

    def _require(self, wanted: str, schema: pa.Schema, setting: str) -> None:
        if wanted not in (names := schema.names):
            raise DataError(
                f"{self.files[0]}: no column '{wanted}' ({setting}); columns: {', '.join(names)}. {nearest(wanted, names)}"
            )

    def _undecided(self, reason: str, schema: pa.Schema, setting: str) -> DataError:
        described = ", ".join(f"{f.name} ({f.type})" for f in schema)
        return DataError(f"{self.files[0]}: {reason}; columns: {described}. Name it with {setting}=...")

    def _index(self, cache_bytes: int, hold_bytes: int) -> None:
        """Where each row group begins, and how much of them to keep."""
        self._groups: list[tuple[int, int]] = []  # (file, row group) of each block
        self._starts: list[int] = []
        self._file_starts: list[int] = []
        row, size = 0, 0
        for number, file in enumerate(self.files):
            reader = self._reader(number)
            self._file_starts.append(row)
            columns = reader.schema_arrow.names
            for column in (self.column, *self.label_columns):
                if column not in columns:
                    raise DataError(
                        f"{file}: no column '{column}', which {self.files[0].name} has; columns: {', '.join(columns)}."
                    )
            for group in range(reader.metadata.num_row_groups):
                info = reader.metadata.row_group(group)
                if info.num_rows == 0:
                    continue
                self._groups.append((number, group))
                self._starts.append(row)
                row += info.num_rows
                parts = (info.column(i) for i in range(info.num_columns))
                size += sum(p.total_uncompressed_size for p in parts if p.path_in_schema.split(".")[0] == self.column)
        self._length = row
        if row == 0:
            raise DataError(f"{self.name}: the data set is empty; {len(self.files)} Parquet file(s) hold no row.")
        self._held = size <= hold_bytes
        self._keep = len(self._groups) if self._held else max(1, cache_bytes * len(self._groups) // size)
        self.blocks: np.ndarray | None = None
        self.window = max(1, self._keep // 2)
        if not self._held:
            ends = [*self._starts[1:], row]
            sizes = [end - start for start, end in zip(self._starts, ends, strict=True)]
            self.blocks = np.repeat(np.arange(len(sizes)), sizes)

    def _read_labels(self, schema: pa.Schema, class_names: Sequence[str] | None, labels: str, given: bool) -> None:
        columns = [self._values(name) for name in self.label_columns]
        if len(columns) == 1:
            name = self.label_columns[0]
            values, own = columns[0], None if self._own_names is None else self._own_names(name)
            own = own if own is not None else _hub_names(schema, name)
        else:
            values = [list(row) for row in zip(*(list(c) for c in columns), strict=True)]
            own = self.label_columns
        self.take(read_labels(values, self.where, class_names, labels, given=given, own=own))

    def _values(self, name: str, *, nulls: bool = False) -> Any:
        """A label column of all files: an array of numbers, or a list; `nulls`: rows without a label are None."""
        columns = [self._column_of(number, name) for number in range(len(self.files))]
        if len(kinds := {str(c.type) for c in columns}) > 1:
            raise DataError(f"{self.name}: column '{name}' is {' in one file and '.join(sorted(kinds))} in another.")
        column = pa.chunked_array([chunk for c in columns for chunk in c.chunks], type=columns[0].type)
        if column.null_count and not nulls:
            row = int(np.flatnonzero(column.is_null().to_numpy())[0])
            raise DataError(f"{self.where(row)}: no label in column '{name}' ({column.null_count} such rows).")
        numbers = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
        return column.to_numpy() if numbers else column.to_pylist()

    def _column_of(self, number: int, name: str) -> pa.ChunkedArray:
        try:
            column = self._reader(number).read(columns=[name]).column(0)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self.files[number]}: cannot be read ({error}). Copy or download it again.") from error
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        try:
            return column.cast(pa.int64()) if pa.types.is_integer(column.type) else column
        except pa.ArrowException as error:
            raise DataError(f"{self.files[number]}: column '{name}' holds numbers above 2^63 ({error}).") from error

    def load(self) -> None:
        """Read what is to be held in memory now, so that worker processes forked later share it."""
        if self._held:
            for block in range(len(self._groups)):
                self._column(block)

    def __len__(self) -> int:
        return self._length

    def where(self, index: int) -> str:
        file = bisect.bisect_right(self._file_starts, index) - 1
        return f"{self.files[file]}, row {index - self._file_starts[file]}"

    def read(self, index: int) -> tuple[Any, Any]:
        block = bisect.bisect_right(self._starts, index) - 1
        value = self._column(block)[index - self._starts[block]].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None and isinstance(value, dict) and value.get("path"):
            file = self.files[self._groups[block][0]].parent / str(value["path"])
            data = read_file(file) if file.exists() else None
        return self.medium.decode(data, self.where(index)), self.target(index)

    def _column(self, block: int) -> pa.ChunkedArray:
        """The encoded images of a row group."""
        if block in self._cache:
            self._cache.move_to_end(block)
            return self._cache[block]
        file, group = self._groups[block]
        try:
            column = self._reader(file).read_row_group(group, columns=[self.column], use_threads=False).column(0)
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{self.files[file]}, row group {group}: cannot be read ({error}). Copy the file again."
            ) from error
        self._cache[block] = column
        while len(self._cache) > self._keep:
            self._cache.popitem(last=False)
        return column

    def _reader(self, number: int) -> pq.ParquetFile:
        if os.getpid() != self._pid:  # a worker process must not share file positions with its parent
            self._readers, self._pid = {}, os.getpid()
        if number not in self._readers:
            while len(self._readers) >= OPEN_FILES:
                self._readers.pop(next(iter(self._readers))).close()
            file = self.files[number]
            try:
                self._readers[number] = pq.ParquetFile(file)
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"{file}: not a readable Parquet file ({error}). Copy or download it again.") from error
        return self._readers[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}, "_cache": OrderedDict(), "_pid": -1}


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _hub_names(schema: pa.Schema, column: str) -> list[str] | None:
    """Class names that the `datasets` library leaves in a Parquet file's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        feature = features[column]
        names = (feature.get("feature") or feature)["names"]  # of a list of classes: those of its items
    except (KeyError, TypeError, ValueError):
        return None
    return [str(n) for n in names] if isinstance(names, list) and names else None
