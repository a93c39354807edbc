"""`open_dataset`: from a name, path or torch data set to an `ImageDataset`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from zoo.data.dataset import ImageDataset, OnError, Transform
from zoo.data.folders import SPLITS, FolderRows, split_word
from zoo.data.hub import HubRows, is_hub, one_split
from zoo.data.joined import with_classes
from zoo.data.labels import bare, check_kind
from zoo.data.locate import SHARD, is_paths, locate
from zoo.data.medium import IMAGES, Medium
from zoo.data.names import listed_names
from zoo.data.sampling import check_range, few_shot, known_labels, warn_of_lost
from zoo.data.shards import ShardRows
from zoo.data.sources import TorchRows
from zoo.data.tables import ListedRows
from zoo.data.unwrap import unwrapped
from zoo.errors import DataError

__all__ = ["folder_name", "open_dataset", "open_with", "short_name"]


def open_dataset(
    source: Any,
    *,
    transform: Transform | None = None,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    labels: str = "auto",
    shots: int | None = None,
    seed: int = 0,
    on_error: OnError = "raise",
) -> ImageDataset:
    """Images with labels.

    Args:
        source: an image folder (`<class>/<image>`); a table of files and labels (`labels.csv`, `metadata.csv`, .tsv,
            .jsonl) or the folder that it is in; Parquet files (a file, a folder, a pattern such as
            "cifar10/train-*.parquet", a list) with a column of encoded images; shards of webdataset
            ("train-{000..009}.tar"); the name of a Hub data set ("owner/name", or "hf:name"); a `datasets.Dataset` or dict
            of splits; any torch `Dataset` or list of pairs (image, label) or of rows {"image": ..., "label": ...}; a
            stream of these (`IterableDataset`, generator), which is read into memory.
        transform: PIL image -> what the model takes; None leaves it to `zoo.fit` and `zoo.evaluate`.
        split: a subfolder, or the beginning of the files' names, or a split of a Hub data set. Needed where there are several, so
            that a test split is never trained on by accident.
        image_column, label_column: columns of tables and rows; guessed if there is one candidate. Several label columns (a
            list of names) make tags or numbers.
        classes: all class names, in the order of the labels; labels of data that have names of their own follow these
            names. By default `classes.json` beside the files, the names in the files' metadata, the names of the folders,
            or the labels themselves.
        labels: what the labels are: "classes", "tags" (several classes for each item), "numbers" (to regress); by default
            by their type (`zoo.data.labels`).
        shots: take only so many images of every class, drawn with `seed`.
        on_error: "skip" goes on without images that cannot be read (they are counted); "raise" stops and names the first.

    Raises:
        DataError: no such source, an empty one, several splits, missing columns, labels that are none, too few for `shots`.
        MissingPackageError: a Hub data set without the package `datasets`.
    """
    dataset = open_with(
        IMAGES,
        source,
        transform=transform,
        split=split,
        column=image_column,
        label_column=label_column,
        classes=classes,
        labels=labels,
        on_error=on_error,
    )
    return dataset if shots is None else few_shot(dataset, shots, seed)


def open_with(
    medium: Medium,
    source: Any,
    *,
    transform: Transform | None,
    split: str | None,
    column: str | None,
    label_column: str | Sequence[str] | None,
    classes: Sequence[str] | None,
    labels: str,
    on_error: OnError,
) -> ImageDataset:
    """`open_dataset` for items of this medium; `column` is that of the items."""
    check_kind(labels)
    names = _class_names(classes)
    if isinstance(source, DataLoader):
        source = unwrapped(source)
    if isinstance(source, ImageDataset):
        for setting, value in ((medium.setting, column), ("label_column", label_column)):
            if value is not None:
                raise DataError(
                    f"'{source.name}' is open already; {setting}={value!r} says how to open it. Leave it out."
                )
        return _opened(source, transform, split, names)
    if isinstance(source, Mapping):
        return open_with(
            medium,
            one_split(source, split, type(source).__name__),
            transform=transform,
            split=None,
            column=column,
            label_column=label_column,
            classes=classes,
            labels=labels,
            on_error=on_error,
        )
    options: dict[str, Any] = {
        "medium": medium,
        "column": column,
        "label_column": label_column,
        "class_names": names,
        "labels": labels,
    }
    rows: Any
    if not is_paths(source):
        if split is not None:
            raise DataError(
                f"split='{split}' chooses among files or splits by name, and a {type(source).__name__} is one data set. "
                "Choose its items, and leave split out."
            )
        own_format = (getattr(source, "format", None) or {}).get("type") if is_hub(source) else "custom"
        rows = TorchRows(source, **options) if own_format == "custom" else HubRows(source, **options)
        return ImageDataset(rows, rows.class_names, transform=transform, on_error=on_error)
    found = locate(source, split, medium, names)
    if found.kind == "hub":
        rows = HubRows(found.place, split, sought=found.sought, **options)
    elif found.kind == "folder":
        place = Path(found.place)
        for setting, value in ((medium.setting, column), ("label_column", label_column)):
            if value is not None:
                raise DataError(
                    f"{setting}={value!r} names a column, and {folder_name(place)} has class folders. Leave it out, or give "
                    "the table of files and labels."
                )
        if labels in ("tags", "numbers"):
            raise DataError(
                f"labels='{labels}', and {folder_name(place)} has class folders, which say one class for each "
                f"{medium.thing}. Leave it out, or give a table of files and labels (labels.csv)."
            )
        given = names if names is not None else _classes_json(place)
        rows = FolderRows(place, given, name=folder_name(place), medium=medium)
    elif found.kind == "table":
        options["own_names"] = partial(_classes_json, Path(found.place).parent)
        rows = ListedRows(Path(found.place), below=found.below, split=found.split, **options)
    elif found.kind == "shards":
        rows = ShardRows(found.files, name=short_name(found.files), **options)
    else:
        options["own_names"] = partial(_classes_json, found.files[0].parent)
        from zoo.data.parquet import ParquetRows  # pyarrow takes longer to import than all of ours

        rows = ParquetRows(found.files, name=short_name(found.files), **options)
    dataset = ImageDataset(rows, rows.class_names, transform=transform, on_error=on_error)
    if on_error == "skip":
        warn_of_lost(dataset)
    return dataset


def _opened(
    dataset: ImageDataset, transform: Transform | None, split: str | None, names: list[str] | None
) -> ImageDataset:
    """A data set that is open already, with another transform, and its classes in another order."""
    if split is not None:
        raise DataError(f"'{dataset.name}' is open already, and is one data set; leave split='{split}' out.")
    if names is not None and dataset.classes is not None and not bare(dataset.classes):
        dataset = with_classes(dataset, names)
    elif names is not None and names != dataset.classes:
        check_range(known_labels(dataset), dataset._like(classes=names))
        dataset = dataset._like(classes=names)
    return dataset if transform is None else dataset.with_transform(transform)


def short_name(files: Sequence[Path]) -> str:
    """`cifar10/train` for `.../cifar10/train-00000-of-00005.parquet` (a report must not hold a machine's folders)."""
    stem = SHARD.sub("", files[0].stem)
    folder = files[0].resolve().parent.name
    return f"{folder}/{stem}" if folder else stem


def folder_name(folder: Path) -> str:
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
    """The names in `classes.json` in the folder, or above it if the folder is that of a split."""
    within = split_word(folder.name) or folder.name.lower() == "data"
    return _class_names(listed_names((folder, folder.parent) if within else (folder,), column))
