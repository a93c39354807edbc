"""Files without labels: a folder of any depth, a pattern, one file or a list of files."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zoo.data.dataset import ImageDataset, OnError, Transform
from zoo.data.folders import files_below, folders_in, read_file, shown
from zoo.data.medium import IMAGES, Medium
from zoo.errors import DataError, nearest

__all__ = ["UnlabelledRows", "open_unlabelled"]


class UnlabelledRows:
    """Files of a medium; what stands in place of a label is the file's number."""

    blocks: np.ndarray | None = None
    labels: np.ndarray | None = None
    window = 1

    def __init__(self, files: Sequence[Path], name: str, *, medium: Medium = IMAGES) -> None:
        self.files, self.name, self.medium, self.noun = list(files), name, medium, medium.noun

    def __len__(self) -> int:
        return len(self.files)

    def where(self, index: int) -> str:
        return shown(self.files[index])

    def read(self, index: int) -> tuple[Any, Any]:
        return self.medium.decode(read_file(self.files[index]), self.where(index)), index


def open_unlabelled(
    source: str | Path | Sequence[str | Path],
    medium: Medium = IMAGES,
    *,
    transform: Transform | None = None,
    on_error: OnError = "raise",
) -> ImageDataset:
    """The files of a medium at `source`: anywhere below a folder (what its subfolders are called means nothing), fitting a
    pattern, or named one by one.

    Raises:
        DataError: nothing is there, or no file of this medium.
    """
    endings = ", ".join(medium.extensions)
    if isinstance(source, (list, tuple)):
        files = [_path(one) for one in source]
        if not files:
            raise DataError("The list of files is empty.")
        name = f"{len(files)} files"
    else:
        place = _path(source)
        name = place.name or str(place)
        if place.is_dir():
            files = [place / file for file in files_below(place, medium.extensions)]
            if not files:
                inside = f" It has the folders {', '.join(folders_in(place)[:5])}." if folders_in(place) else ""
                raise DataError(f"{shown(place)}: no {medium.thing} in it or below ({endings}).{inside}")
        elif place.exists():
            files = [place]
        elif any(c in str(source) for c in "*?["):
            files = [f for f in map(Path, sorted(glob.glob(str(place), recursive=True))) if not f.is_dir()]
            if not files:
                raise DataError(f"No file fits the pattern '{source}'.")
        else:
            there = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
            raise DataError(
                f"No such file or folder: '{source}'. {nearest(place.name, there) if there else ''} Data to predict are files "
                f"of this machine ({endings})."
            )
    other = next((f for f in files if not f.name.lower().endswith(medium.extensions)), None)
    if other is not None and on_error == "raise":
        raise DataError(f"{shown(other)}: no {medium.thing} by its name; expected a file that ends in {endings}.")
    return ImageDataset(UnlabelledRows(files, name, medium=medium), None, transform=transform, on_error=on_error)


def _path(text: Any) -> Path:
    if not isinstance(text, (str, Path)) or not str(text).strip():
        raise DataError(f"{text!r:.60} is no path of a file or folder.")
    try:
        path = Path(text).expanduser()
        path.exists()
    except (RuntimeError, OSError, ValueError) as error:  # no such user, a name that is too long
        raise DataError(f"'{text!s:.100}': {getattr(error, 'strerror', None) or error}.") from error
    return path
