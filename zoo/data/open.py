"""`open_dataset`: from a name, path or torch data set to an `ImageDataset`."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch.utils.data import Dataset, Subset

from zoo.data.dataset import ImageDataset, OnError, Rows, Transform
from zoo.data.parquet import ParquetRows
from zoo.data.sampling import few_shot
from zoo.data.sources import FolderRows, HubRows, TorchRows, check_labels
from zoo.errors import DataError, nearest

__all__ = ["open_dataset"]

SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval")
_SHARD = re.compile(r"-\d+-of-\d+$|[-_.]\d+$")


def open_dataset(
    source: str | Path | Sequence[str | Path] | Dataset[Any],
    *,
    transform: Transform | None = None,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    classes: Sequence[str] | None = None,
    shots: int | None = None,
    seed: int = 0,
    on_error: OnError = "raise",
) -> ImageDataset:
    """Images with labels.

    Args:
        source: an image folder (`<class>/<image>`), Parquet files (a file, a folder, a pattern such as
            "cifar10/train-*.parquet", a list) with a column of encoded images, the name of a Hub data set ("owner/name",
            or "hf:name"), or any torch `Dataset` of (image, label).
        transform: PIL image -> what the model takes; None leaves it to `zoo.fit` and `zoo.evaluate`.
        split: a subfolder, or the beginning of the Parquet files' names, or a split of a Hub data set. Needed where there are
            several, so that a test split is never trained on by accident.
        image_column, label_column: columns of Parquet files or a Hub data set; guessed if there is one candidate.
        classes: all class names, in the order of the labels. By default `classes.json` beside the files, the names in
            the files' metadata, the names of the folders, or the labels themselves.
        shots: take only so many images of every class, drawn with `seed`.
        on_error: "skip" goes on without images that cannot be read (they are counted); "raise" stops and names the first.

    Raises:
        DataError: no such source, an empty one, several splits, missing columns, labels outside the classes, too few for `shots`.
        MissingPackageError: a Hub data set without the package `datasets`.
    """
    dataset = open_with(
        Readers(),
        source,
        transform=transform,
        split=split,
        column=image_column,
        label_column=label_column,
        classes=classes,
        on_error=on_error,
    )
    return dataset if shots is None else few_shot(dataset, shots, seed)


@dataclass(frozen=True)
class Readers:
    """Who reads the rows of each kind of source. Here images; data sets of something else name their own."""

    folder: type[FolderRows] = FolderRows
    parquet: type[ParquetRows] = ParquetRows
    torch: Callable[[Dataset[Any]], Rows] = TorchRows
    hub: Callable[..., HubRows] = HubRows


def open_with(
    readers: Readers,
    source: Any,
    *,
    transform: Transform | None,
    split: str | None,
    column: str | None,
    label_column: str | None,
    classes: Sequence[str] | None,
    on_error: OnError,
) -> ImageDataset:
    """`open_dataset` with these readers; `column` is that of what they decode."""
    names = _class_names(classes)
    if isinstance(source, ImageDataset):
        return source if transform is None else source.with_transform(transform)
    if isinstance(source, Dataset) or not isinstance(source, (str, Path, list, tuple)):
        rows = readers.torch(cast("Dataset[Any]", source))
        known = names if names is not None else _class_names(_own_classes(source))
        if known is None and rows.labels is not None:
            known = [str(i) for i in range(int(rows.labels.max()) + 1)]
        if known is not None:
            check_labels(rows, len(known))
        return ImageDataset(rows, known, transform=transform, on_error=on_error)
    found = _locate(source, split)
    files: FolderRows | ParquetRows | HubRows
    if isinstance(found, str):
        files = readers.hub(found, split, image_column=column, label_column=label_column, class_names=names)
    elif isinstance(found, Path):
        files = readers.folder(found, names if names is not None else _classes_json(found), name=_folder_name(found))
    else:
        files = readers.parquet(
            found,
            image_column=column,
            label_column=label_column,
            class_names=names if names is not None else partial(_classes_json, found[0].parent),
            name=_short_name(found),
        )
    return ImageDataset(files, files.class_names, transform=transform, on_error=on_error)


def _own_classes(dataset: Any) -> Any:
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return getattr(dataset, "classes", None)


def _locate(source: str | Path | Sequence[str | Path], split: str | None) -> Path | list[Path] | str:
    """An image folder, Parquet files, or the name of a Hub data set."""
    if isinstance(source, (list, tuple)):
        if other := [type(s).__name__ for s in source if not isinstance(s, (str, Path))]:
            raise DataError(
                f"A list of data names Parquet files, and this one holds a {other[0]}. Put items into a torch Dataset."
            )
        files = [Path(s).expanduser() for s in source]
        if not files:
            raise DataError("The list of Parquet files is empty.")
        if missing := [str(f) for f in files if not f.is_file()]:
            raise DataError(f"No such file: {', '.join(missing[:3])}.")
        return files
    text = str(source)
    if text.startswith("hf:"):
        return text[3:].removeprefix("//").removeprefix("datasets/")  # as the Hub's own addresses have it
    path = Path(text).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return _in_folder(path, split)
    if any(c in text for c in "*?["):
        files = [Path(f) for f in sorted(glob.glob(str(path), recursive=True))]
        if not files:
            raise DataError(f"No file fits the pattern '{text}'.")
        return _of_split(files, split, text)
    looks_local = isinstance(source, Path) or text.startswith((".", "~", "/")) or path.suffix or text.count("/") > 1
    if looks_local or ("/" in text and path.parent.is_dir()):
        there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(
            f"No such file or folder: '{text}'. {nearest(path.name, there) if there else ''} "
            "For a data set of the Hub write 'hf:owner/name'."
        )
    return text


def _in_folder(folder: Path, split: str | None) -> Path | list[Path]:
    files = [
        f for f in sorted(folder.rglob("*.parquet")) if not any(p.startswith(".") for p in f.relative_to(folder).parts)
    ]
    if files:
        if split is not None and any(f.relative_to(folder).parts[0] == split for f in files):
            return [f for f in files if f.relative_to(folder).parts[0] == split]
        return _of_split(files, split, str(folder))
    subfolders = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if split is not None:
        if split not in subfolders:
            raise DataError(f"{folder}: no split '{split}'. {nearest(split, subfolders)}")
        return folder / split
    splits = [name for name in subfolders if name.lower() in SPLITS]
    if splits and len(splits) == len(subfolders):
        if len(splits) == 1:
            return folder / splits[0]
        raise DataError(f"{folder}: has the splits {', '.join(splits)}; choose one with open_dataset(..., split=...)")
    return folder


def _of_split(files: list[Path], split: str | None, source: str) -> list[Path]:
    """The files of one split; their names begin with it (`train.parquet`, `train-00000-of-00005.parquet`)."""
    names: dict[str, list[Path]] = {}
    for file in files:
        names.setdefault(_SHARD.sub("", file.stem), []).append(file)
    if split is not None:
        chosen = names.get(split) or [
            f for n, fs in names.items() if re.match(rf"{re.escape(split)}(?![a-zA-Z0-9])", n) for f in fs
        ]
        if not chosen:
            raise DataError(f"{source}: no Parquet file of the split '{split}'. {nearest(split, names)}")
        return sorted(chosen)
    if len(names) > 1:
        raise DataError(
            f"{source}: holds several splits ({', '.join(sorted(names))}); choose one with open_dataset(..., split=...)"
        )
    return files


def _short_name(files: Sequence[Path]) -> str:
    """`cifar10/train` for `.../cifar10/train-00000-of-00005.parquet` (a report must not hold a machine's folders)."""
    stem = _SHARD.sub("", files[0].stem)
    folder = files[0].resolve().parent.name
    return f"{folder}/{stem}" if folder else stem


def _folder_name(folder: Path) -> str:
    """`flowers/train` for a split's folder, else the folder's own name."""
    folder = folder.resolve()
    return f"{folder.parent.name}/{folder.name}" if folder.name.lower() in SPLITS else folder.name


def _class_names(classes: Any) -> list[str] | None:
    if classes is None:
        return None
    names = [str(c) for c in classes]
    if len(set(names)) != len(names):
        double = sorted({n for n in names if names.count(n) > 1})
        raise DataError(f"Class names appear more than once: {', '.join(double[:5])}.")
    return names


def _classes_json(folder: Path, column: str = "") -> list[str] | None:
    """`classes.json` in the folder, or above it if the folder is that of a split.

    A list of names, or an object of lists for several labellings: that whose key is in the label column's name (`coarse` for
    `coarse_label`), else the first.
    """
    for place in (folder, folder.parent) if folder.name.lower() in (*SPLITS, "data") else (folder,):
        if (file := place / "classes.json").is_file():
            try:
                names = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise DataError(f"{file}: not readable as JSON ({error}).") from error
            if isinstance(names, dict) and names:
                names = next((v for k, v in names.items() if k in column), next(iter(names.values())))
            if not (isinstance(names, list) and names and all(isinstance(n, str) for n in names)):
                raise DataError(
                    f"{file}: expected a JSON list of class names, index = label (or an object of such lists)."
                )
            return _class_names(names)
    return None
