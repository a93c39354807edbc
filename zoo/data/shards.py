"""Shards as the library webdataset writes them: tar files, the members of one sample beside each other with one name.

    train-000000.tar:  00001.jpg  00001.cls  00002.jpg  00002.cls ...        .cls, .txt or .json: the label

The headers are read once, so that samples can be shuffled, skipped and resumed exactly like those of a folder; the package
itself is not needed.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zoo.data.labels import Labelled, parsed, read_labels
from zoo.data.medium import IMAGES, Medium
from zoo.data.names import check_cells
from zoo.errors import DataError, nearest

__all__ = ["LABEL_PARTS", "ShardRows", "Shards"]

LABEL_PARTS = ("cls", "label", "labels", "class", "target", "txt", "json")


class Part(NamedTuple):
    """A member of a tar file: where its bytes are."""

    shard: int
    offset: int
    size: int


class Shards:
    """The samples of tar files: name and parts by ending, as `{"jpg": ..., "cls": ...}`."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        self.samples: list[tuple[str, dict[str, Part]]] = []
        for number, file in enumerate(self.files):
            self._index(number, file)
        if not self.samples:
            raise DataError(f"{self.files[0]}: the data set is empty; {len(self.files)} tar file(s) hold no sample.")

    def _index(self, number: int, file: Path) -> None:
        key = None
        try:
            with tarfile.open(file, "r:") as tar:
                for member in tar:
                    folder, _, name = member.name.rpartition("/")
                    if not member.isreg() or name.startswith(".") or "." not in name:
                        continue
                    stem, _, ending = name.partition(".")
                    sample = f"{folder}/{stem}" if folder else stem
                    if sample != key:
                        self.samples.append((sample, {}))
                        key = sample
                    parts = self.samples[-1][1]
                    if ending.lower() in parts:
                        raise DataError(f"{file}, sample {sample}: '{ending}' is there twice.")
                    parts[ending.lower()] = Part(number, member.offset_data, member.size)
        except (tarfile.TarError, OSError, EOFError) as error:
            raise DataError(
                f"{file}: not a readable tar file ({error}). Copy it again; a compressed one must be unpacked first (gunzip)."
            ) from error

    def read(self, part: Part) -> bytes:
        """The bytes of a member."""
        file = self.files[part.shard]
        try:
            with file.open("rb") as stream:
                stream.seek(part.offset)
                data = stream.read(part.size)
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror}).") from error
        if len(data) != part.size:
            raise DataError(f"{file}: ends in the middle of a sample. Copy it again.")
        return data

    def where(self, index: int) -> str:
        """File and sample."""
        name, parts = self.samples[index]
        return f"{self.files[next(iter(parts.values())).shard]}, sample {name}"

    def part(self, index: int, endings: Sequence[str], what: str) -> Part:
        """The first of these parts that a sample has.

        Raises:
            DataError: it has none of them.
        """
        parts = self.samples[index][1]
        for ending in endings:
            if ending in parts:
                return parts[ending]
        raise DataError(
            f"{self.where(index)}: no {what} among its parts {', '.join(parts)}. {nearest(endings[0], parts)}"
        )


class ShardRows(Labelled):
    """The samples of tar files.

    Args:
        column: ending of the items, such as "jpg"; by default that which the first sample has.
        label_column: ending of the labels, such as "cls"; of "json" the entry "label", or `label_column` an entry's own name.
    """

    blocks: np.ndarray | None = None
    window = 1
    label_parts: tuple[str, ...] = LABEL_PARTS

    def __init__(
        self,
        files: Sequence[Path],
        *,
        medium: Medium = IMAGES,
        column: str | None = None,
        label_column: str | Sequence[str] | None = None,
        class_names: Sequence[str] | None = None,
        labels: str = "auto",
        name: str = "",
    ) -> None:
        self.medium, self.noun, self.files = medium, medium.noun, list(files)
        self.shards = Shards(files)
        self.name = name or Path(files[0]).stem
        endings = (column.lstrip("."),) if column is not None else tuple(e[1:] for e in medium.extensions)
        count = len(self.shards.samples)
        self._items = [self.shards.part(i, endings, medium.thing) for i in range(count)]
        first = self.shards.samples[0][1]
        wanted = [label_column] if label_column is None or isinstance(label_column, str) else list(label_column)
        named = len(wanted) == 1 and wanted[0] in first
        own = tuple(wanted) if named else (("json",) if wanted[0] is not None else self.label_parts)
        columns = [[self._label(i, own, name) for i in range(count)] for name in wanted]
        texts = columns[0] if len(columns) == 1 else [list(row) for row in zip(*columns, strict=True)]
        self._know(texts, class_names, labels, [str(name) for name in wanted] if len(wanted) > 1 else None)

    def _know(
        self, texts: list[Any], names: Sequence[str] | None, labels: str, own: Sequence[str] | None = None
    ) -> None:
        values: list[Any] = texts
        if all(isinstance(t, str) for t in texts) and not (names is not None and set(texts) <= set(names)):
            padded = check_cells(texts, self.where, labels) and names is None
            values = texts if padded else parsed(texts)
        self.take(read_labels(values, self.where, names, labels, given=names is not None, own=own))

    def _label(self, index: int, endings: Sequence[Any], wanted: str | None) -> Any:
        part = self.shards.part(index, endings, "label")
        text = self.shards.read(part).decode("utf-8", "replace").strip()
        if part is not self.shards.samples[index][1].get("json"):
            return text
        try:
            found = json.loads(text)
        except ValueError as error:
            raise DataError(f"{self.where(index)}: its json cannot be read ({error}).") from error
        if not isinstance(found, dict):
            return found
        keys = [wanted] if wanted not in (None, "json") else [k for k in self.medium.label_columns if k in found]
        if not keys or keys[0] not in found:
            raise DataError(
                f"{self.where(index)}: no label in its json ({', '.join(found)}). Name it with label_column=..."
            )
        return found[keys[0]]

    def __len__(self) -> int:
        return len(self._items)

    def where(self, index: int) -> str:
        return self.shards.where(index)

    def read(self, index: int) -> tuple[Any, Any]:
        return self.medium.decode(self.shards.read(self._items[index]), self.where(index)), self.target(index)
