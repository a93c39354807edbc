"""Where data are: what a path, a pattern, a list of paths or a name means."""

from __future__ import annotations

import glob
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from zoo.data.folders import SPLITS, are_splits, entries, files_below, folders_in, holds, shown, split_word
from zoo.data.medium import IMAGES, Medium
from zoo.data.tables import NAMED, TABLES, columns_of, tables_in
from zoo.errors import DataError, nearest

__all__ = ["SHARD", "Found", "is_paths", "locate"]

SHARD = re.compile(r"-\d+-of-\d+$|[-_.]\d+$")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
FILES = (".parquet", ".tar")


def is_paths(source: Any) -> bool:
    """Whether a source is given by paths or names, rather than as an object."""
    first = source[0] if isinstance(source, (list, tuple)) and source else source
    return isinstance(first, (str, Path)) or (isinstance(source, (list, tuple)) and not source)


class Found(NamedTuple):
    """Where data are: `kind` is "folder", "table", "parquet", "shards" or "hub"; `below`: only files below this folder;
    `sought`: it is taken for a name of the Hub because nothing here is called so.
    """

    kind: str
    place: Any = None
    files: Sequence[Path] = ()
    below: Path | None = None
    split: str | None = None  # of the rows of a table
    sought: bool = False


def locate(
    source: str | Path | Sequence[str | Path],
    split: str | None,
    medium: Medium = IMAGES,
    classes: Sequence[str] | None = None,
) -> Found:
    """What a path, a pattern, a list of paths or a name means.

    Raises:
        DataError: nothing, or several splits.
    """
    if isinstance(source, (list, tuple)):
        if other := [type(s).__name__ for s in source if not isinstance(s, (str, Path))]:
            raise DataError(
                f"A list of data names files, or holds pairs (item, label), and this one mixes paths with {other[0]}."
            )
        files = [_path(s) for s in source]
        if not files:
            raise DataError("The list of Parquet files is empty.")
        if missing := [shown(f) for f in files if not f.is_file()]:
            raise DataError(f"No such file: {', '.join(missing[:3])}.")
        return _of_files(files)
    text = str(source)
    if not text.strip():
        raise DataError("The name of the data set is empty.")
    if text.startswith("hf:"):
        return Found("hub", text[3:].removeprefix("//").removeprefix("datasets/"))  # as the Hub's own addresses have it
    path = _path(text)
    if path.is_file():
        if path.suffix.lower() in TABLES:
            return Found("table", path, split=split)
        return _of_files(_of_split([path], split, text))
    if path.is_dir():
        return _in_folder(path, split, medium, classes)
    if any(c in text for c in "*?[") or _RANGE.search(text):
        files = [Path(f) for part in _expanded(str(path)) for f in sorted(glob.glob(part, recursive=True))]
        if not files:
            raise DataError(f"No file fits the pattern '{text}'.")
        return _of_files(_of_split(files, split, text))
    looks_local = isinstance(source, Path) or text.startswith((".", "~", "/")) or path.suffix or text.count("/") > 1
    if looks_local or ("/" in text and path.parent.is_dir()):
        there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(
            f"No such file or folder: '{text}'. {nearest(path.name, there) if there else ''} "
            "For a data set of the Hub write 'hf:owner/name'."
        )
    return Found("hub", text, sought=True)


def _path(text: str | Path) -> Path:
    try:
        path = Path(text).expanduser()
        path.exists()
    except (RuntimeError, OSError, ValueError) as error:  # no such user, a name that is too long
        raise DataError(f"'{text!s:.100}': {getattr(error, 'strerror', None) or error}.") from error
    return path


def _expanded(pattern: str) -> list[str]:
    """`{000..002}` written out, as the shell and webdataset do."""
    if not (found := _RANGE.search(pattern)):
        return [pattern]
    first, last = int(found[1]), int(found[2])
    if last - first > 1_000_000:
        raise DataError(f"'{found[0]}' in '{pattern}' names {last - first + 1} files.")
    parts = [f"{i:0{len(found[1])}d}" for i in range(first, last + 1)]
    return [p for part in parts for p in _expanded(pattern[: found.start()] + part + pattern[found.end() :])]


def _of_files(files: Sequence[Path]) -> Found:
    """Shards or Parquet files."""
    shards = [f.suffix.lower() == ".tar" or ".tar." in f.name.lower() for f in files]
    if any(shards) and not all(shards):
        raise DataError(f"{shown(files[0])} and others are tar files and Parquet files; give one kind.")
    other = next(
        (f for f in files if f.suffix.lower() not in ("", ".parquet", ".pq", ".tar") and ".tar." not in f.name), None
    )
    if other is not None and not _is_parquet(other):
        raise DataError(
            f"{shown(other)}: no Parquet file, no shard (.tar) and no table ({', '.join(TABLES)}). Unpack an archive, and "
            f"name its folder."
        )
    return Found("shards" if any(shards) else "parquet", files=files)


def _is_parquet(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return stream.read(4) == b"PAR1"
    except OSError:
        return True  # reading it will say why it cannot be read


def _in_folder(folder: Path, split: str | None, medium: Medium, classes: Sequence[str] | None) -> Found:
    for ending in FILES:
        if files := [folder / f for f in files_below(folder, (ending,))]:
            if split is not None and any(f.relative_to(folder).parts[0] == split for f in files):
                return _of_files([f for f in files if f.relative_to(folder).parts[0] == split])
            return _of_files(_of_split(files, split, str(folder)))
    subfolders = folders_in(folder)
    tables = tables_in(folder)
    if split is not None:
        if split in subfolders:
            return _leaf(_inner(folder / split, medium), medium, folder)
        if split in tables:
            return Found("table", tables[split])
        table = _leaf(folder, medium, None) if tables else None
        if table is not None and table.kind == "table":
            return table._replace(split=split)
        raise DataError(f"{shown(folder)}: no split '{split}'. {nearest(split, [*subfolders, *tables])}")
    splits = [name for name in subfolders if name.lower() in SPLITS]
    if splits and not set(splits) <= set(classes or ()) and _is_root(folder, splits, subfolders, medium):
        others = [n for n in subfolders if n not in splits and holds(folder / n, medium.extensions)]
        if len(splits) == 1 and not others:
            return _leaf(folder / splits[0], medium, folder)
        if len(splits) == 1:
            raise DataError(
                f"{shown(folder)}: '{splits[0]}' looks like a split, and beside it {', '.join(others[:3])} hold "
                f"{medium.noun}. Choose the split with split='{splits[0]}'; if all of them are classes, name them: classes=[...]."
            )
        raise DataError(
            f"{shown(folder)}: has the splits {', '.join(splits)}; choose one with open_dataset(..., split=...)"
        )
    worded = [name for name in subfolders if holds(folder / name, medium.extensions)]
    if not set(worded) <= set(classes or ()) and are_splits(folder, worded, medium.extensions):
        raise DataError(
            f"{shown(folder)}: the folders {', '.join(worded[:6])} look like splits of one data set, not like "
            f"classes. Choose one with split='{worded[0]}'; if they are classes, name them: classes=[...]."
        )
    return _leaf(_inner(folder, medium), medium, None)


def _inner(folder: Path, medium: Medium) -> Path:
    """The folder itself, or the only one in it if that is a split with class folders: `seg_train/seg_train/<class>`."""
    there = folders_in(folder)
    if len(there) != 1 or split_word(there[0]) is None or split_word(folder.name) is None or tables_in(folder):
        return folder
    inner = folder / there[0]
    return inner if any(holds(inner / name, medium.extensions) for name in folders_in(inner)) else folder


def _is_root(folder: Path, splits: Sequence[str], subfolders: Sequence[str], medium: Medium) -> bool:
    """Whether subfolders with the names of splits are splits: there are several, or one has folders or a table of its own."""
    if len(splits) > 1 or len(splits) == len(subfolders):
        return True
    place = folder / splits[0]
    return bool(tables_in(place)) or any(holds(place / name, medium.extensions) for name in folders_in(place))


def _leaf(folder: Path, medium: Medium, above: Path | None) -> Found:
    """Class folders, or a table: of the folder itself, or of the folder above with paths into this one."""
    loose = [p for p in entries(folder) if p.name.lower().endswith(medium.extensions) and not p.is_dir()]
    classes = [n for n in folders_in(folder) if holds(folder / n, medium.extensions)]
    tables = tables_in(folder)
    if loose and tables:  # beside class folders there are none
        classes = []
    meant = [tables[name] for name in tables if name.lower() in NAMED]
    if not classes and not meant and len(tables) > 1:
        raise DataError(f"{shown(folder)}: holds several tables ({', '.join(tables)}); choose one with split=...")
    if not classes and not meant:
        meant = list(tables.values())
    for table in meant:
        if not classes or _has_labels(table, medium):
            return Found("table", table)
    if above is not None and not classes:
        for name, table in tables_in(above).items():
            if name.lower() in NAMED:
                return Found("table", table, below=folder)
    if loose and classes:
        warnings.warn(
            f"{shown(folder)}: {len(loose)} {medium.noun} beside the class folders are left out, {shown(loose[0].name)} first.",
            stacklevel=6,
        )
    return Found("folder", folder)


def _has_labels(table: Path, medium: Medium) -> bool:
    """Whether a table beside class folders has files and labels of its own; one of captions, say, has not."""
    there = {name.lower() for name in columns_of(table)}
    return bool(there & set(medium.paths)) and bool(there & set(medium.label_columns))


def _of_split(files: list[Path], split: str | None, source: str) -> list[Path]:
    """The files of one split; their names begin with it (`train.parquet`, `train-00000-of-00005.parquet`, `train-000.tar`)."""
    names: dict[str, list[Path]] = {}
    for file in files:
        names.setdefault(SHARD.sub("", file.stem), []).append(file)
    if split is not None:
        chosen = names.get(split) or [
            f for n, fs in names.items() if re.match(rf"{re.escape(split)}(?![a-zA-Z0-9])", n) for f in fs
        ]
        if not chosen:
            raise DataError(f"{source}: no {_kind(files[0])} of the split '{split}'. {nearest(split, names)}")
        return sorted(chosen)
    if len(names) > 1:
        raise DataError(
            f"{source}: holds several splits ({', '.join(sorted(names)[:12])}); choose one with open_dataset(..., split=...)"
        )
    return files


def _kind(file: Path) -> str:
    return "shard" if file.suffix == ".tar" else "Parquet file"
