"""Tables of files and labels: `labels.csv`, the `metadata.csv` or `metadata.jsonl` of the Hub's folders, and their like.

    photos/labels.csv        file_name,label          a column of files, relative to the table, and one of labels,
    photos/1.jpg ...         1.jpg,cat                or several columns: a tag or a number each

Files are found by their path, by their name anywhere below the table's folder, or by their name without its ending. Cells
of a text table are whole numbers or floats if all of the column are.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zoo.data.folders import SPLITS, entries, files_below, read_file, shown
from zoo.data.labels import Labelled, parsed, read_labels, split_tags
from zoo.data.medium import CAPTIONS, IMAGES, Medium
from zoo.data.names import check_cells
from zoo.errors import DataError, nearest

__all__ = ["NAMED", "TABLES", "ListedRows", "choose_column", "columns_of", "label_columns", "rows_of", "tables_in"]

TABLES = (".csv", ".tsv", ".jsonl")
SPLIT_COLUMNS = ("split", "subset", "partition", "set")
NAMED = ("labels", "metadata", "annotations")  # tables that are meant even beside class folders


def tables_in(folder: Path) -> dict[str, Path]:
    """The tables of a folder by their names without ending."""
    return {p.stem: p for p in entries(folder) if p.suffix.lower() in TABLES and p.is_file()}


def rows_of(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
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
                head = file.readline()
                file.seek(0)
                # of Excel in half of Europe: semicolons
                reader = csv.DictReader(
                    file, delimiter="\t" if table.suffix.lower() == ".tsv" else max(",;\t|", key=head.count)
                )
                for row in reader:
                    if None in row:
                        raise DataError(
                            f"{table}, line {reader.line_num}: more cells than the {len(row) - 1} columns. Put texts with commas "
                            "into double quotes."
                        )
                    yield reader.line_num, {str(k).strip(): v for k, v in row.items()}
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{shown(table)}: cannot be read ({error}).") from error


def columns_of(table: Path) -> list[str]:
    """The names of a table's columns, as its first row has them."""
    return next((list(row) for _, row in rows_of(table)), [])


def choose_column(
    where: Any, wanted: str | None, known: Sequence[str], fitting: Sequence[str], there: Sequence[str], setting: str
) -> str:
    """The named column, or the first with a usual name among those that fit.

    Raises:
        DataError: there is none.
    """
    if wanted is not None:
        if wanted not in there:
            raise DataError(f"{where}: no column '{wanted}' ({setting}). {nearest(wanted, there)}")
        return wanted
    small = {name.lower(): name for name in reversed(fitting)}
    for name in known:
        if name in small:
            return small[name]
    raise DataError(f"{where}: name one of its columns with {setting}=...; columns: {', '.join(there)}.")


def label_columns(
    where: Any, wanted: str | Sequence[str] | None, known: Sequence[str], others: Sequence[str], there: Sequence[str]
) -> list[str]:
    """The columns of the labels: the named one or ones, that with a usual name, or the only other one.

    Raises:
        DataError: there is none, or several could be meant.
    """
    if wanted is not None and not isinstance(wanted, str):
        return [choose_column(where, name, (), (), there, "label_column") for name in wanted]
    if wanted is None and len(others) == 1 and others[0].lower() not in CAPTIONS:
        return [others[0]]
    return [choose_column(where, wanted, known, others, there, "label_column")]


class ListedRows(Labelled):
    """The rows of a table of files and labels.

    Args:
        table: .csv, .tsv or .jsonl with the names of the columns.
        column, label_column: those of the files and of the labels; guessed if there is one candidate. Several label columns make
            tags (of 0 and 1), named by the columns, or numbers.
        below: take only rows of files below this folder.
        split: take only rows with this in a column "split"; needed where it holds several.
    """

    blocks: np.ndarray | None = None
    window = 1

    def __init__(
        self,
        table: Path,
        *,
        medium: Medium = IMAGES,
        column: str | None = None,
        label_column: str | Sequence[str] | None = None,
        class_names: Sequence[str] | None = None,
        own_names: Callable[[str], list[str] | None] | None = None,
        labels: str = "auto",
        below: Path | None = None,
        split: str | None = None,
        name: str = "",
    ) -> None:
        self.table, self.medium, self.noun = table, medium, medium.noun
        self.name = name or f"{table.resolve().parent.name}/{table.stem}"
        rows = list(rows_of(table))
        if not rows:
            raise DataError(f"{table}: the table is empty.")
        there = list(rows[0][1])
        files = choose_column(table, column, medium.paths, there, there, medium.setting)
        given = label_columns(
            table,
            label_column,
            medium.label_columns,
            [n for n in there if n != files and n.lower() not in SPLIT_COLUMNS],
            there,
        )
        own = given if len(given) > 1 else None if own_names is None else own_names(given[0])
        splits = next((n for n in there if n.lower() in SPLIT_COLUMNS and n not in (files, *given)), None)
        self._choose_split(splits, split, [row for _, row in rows])
        self._paths, kept, lines = [], [], []
        find, missing = _Finder(table.parent, medium.extensions), []
        inside = None if below is None else shown(below.resolve()) + "/"
        for line, row in rows:
            text = row.get(files)
            if splits is not None and split is not None and row.get(splits) != split:
                continue
            if not isinstance(text, (str, int)) or not str(text).strip():
                raise DataError(f"{table}, line {line}: no file in column '{files}'.")
            path = find(str(text).strip())
            if path is None:
                missing.append(f"{text} (line {line})")
                continue
            if inside is not None and not shown(path.resolve()).startswith(inside):
                continue
            self._paths.append(path)
            kept.append([row.get(name) for name in given])
            lines.append(line)
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise DataError(
                f"{table}: {len(missing)} of {len(rows)} files are missing: {', '.join(missing[:3])}{more}. Paths are "
                "relative to the table's folder; copy the files there, or take their rows out."
            )
        if not self._paths:
            raise DataError(f"{table}: no row is of a file below {below}.")
        kept, lines = self._together(kept, lines, labels)
        self._lines = lines
        cells = [[row[i] for row in kept] for i in range(len(given))]
        if table.suffix.lower() != ".jsonl":
            known = set(map(str, class_names or own or ()))
            cells = [
                c
                if (known and all(isinstance(v, str) and v in known for v in c)) or any(isinstance(v, list) for v in c)
                else (c if check_cells(c, self._line, labels) and not known else parsed(c))
                for c in cells
            ]
        values = (
            cells[0]
            if isinstance(label_column, str) or len(given) == 1
            else [list(row) for row in zip(*cells, strict=True)]
        )
        self.take(read_labels(values, self._line, class_names, labels, given=class_names is not None, own=own))

    def _line(self, row: int) -> str:
        return f"{self.table}, line {self._lines[row]}"

    def _choose_split(self, column: str | None, split: str | None, rows: Sequence[dict[str, Any]]) -> None:
        """Raise DataError unless it is clear which rows are meant."""
        there = [] if column is None else sorted({str(row.get(column)) for row in rows})
        if split is not None and split not in there:
            reason = nearest(split, there) if there else "It has no column 'split'."
            raise DataError(f"{self.table}: no split '{split}'. {reason}")
        if split is None and len(there) > 1 and {name.lower() for name in there} & set(SPLITS):
            raise DataError(
                f"{self.table}: has the splits {', '.join(there)} (column '{column}'); choose one with open_dataset(..., "
                "split=...)"
            )

    def _together(self, kept: list[list[Any]], lines: list[int], labels: str) -> tuple[list[list[Any]], list[int]]:
        """Rows of one file: its tags if these are wanted; else they must not contradict each other."""
        first: dict[Path, int] = {}
        for row, path in enumerate(self._paths):
            former = first.setdefault(path, row)
            if former != row and labels != "tags" and kept[former] != kept[row]:
                raise DataError(
                    f"{self.table}, line {lines[row]}: {shown(path.name)} has the label {kept[row][0]!r}, and "
                    f"{kept[former][0]!r} in line {lines[former]}. Several classes for each item are tags: task='multilabel', or "
                    "labels='tags'."
                )
        if labels != "tags" or len(first) == len(self._paths) or len(kept[0]) > 1:
            return kept, lines
        tags: dict[Path, list[Any]] = {path: [] for path in first}
        for path, (found,) in zip(self._paths, kept, strict=True):
            own = split_tags(found) if isinstance(found, str) else found
            tags[path] += own if isinstance(own, list) else [own]
        self._paths = list(first)
        return [[names] for names in tags.values()], [lines[row] for row in first.values()]

    def __len__(self) -> int:
        return len(self._paths)

    def where(self, index: int) -> str:
        return shown(self._paths[index])

    def read(self, index: int) -> tuple[Any, Any]:
        return self.medium.decode(read_file(self._paths[index]), self.where(index)), self.target(index)


class _Finder:
    """Path, name, or name without ending -> file below a folder; None if there is none, or several have that name."""

    def __init__(self, folder: Path, extensions: tuple[str, ...]) -> None:
        self.folder, self.extensions = folder, extensions
        self._index: dict[str, list[str]] | None = None

    def __call__(self, text: str) -> Path | None:
        path = self.folder / text
        if "\\" in text and not path.exists():
            text = text.replace("\\", "/")  # of Windows
            path = self.folder / text
        if path.is_file() or (path.exists() and not path.is_dir()):
            return path
        if self._index is None:
            self._index = {}
            for file in files_below(self.folder, self.extensions):
                name = file.rpartition("/")[2]
                for key in {name, name.rpartition(".")[0], file.rpartition(".")[0]}:
                    self._index.setdefault(key, []).append(file)
        found = self._index.get(text, [])
        return self.folder / found[0] if len(found) == 1 else None
