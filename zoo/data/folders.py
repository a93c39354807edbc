"""Folders: which of their entries count, and rows of class folders.

What people, systems and tools leave beside the data never counts: hidden files and folders (`.ipynb_checkpoints`, `._1.jpg`),
`__MACOSX`, `@eaDir`, recycle bins. Links are followed, except in circles.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zoo.data.labels import Labelled, Labels, natural
from zoo.data.medium import IMAGES, Medium
from zoo.errors import DataError, nearest

__all__ = [
    "SPLITS",
    "FolderRows",
    "are_splits",
    "entries",
    "files_below",
    "folders_in",
    "holds",
    "read_file",
    "shown",
    "split_word",
    "visible",
]

SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval")
SYSTEM = ("__macosx", "__pycache__", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found")


def split_word(name: str) -> tuple[str, str] | None:
    """(the split's word, the rest) of a folder's name: ("train", "seg") of "seg_train", ("fold", "") of "fold0"."""
    words = re.findall(r"[a-z]+|[0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    for i, word in enumerate(words):
        plain = word.removesuffix("set")
        if plain in SPLITS:
            return plain, " ".join([*words[:i], *words[i + 1 :]]).removesuffix("set").strip()
        if word in ("fold", "kfold") and words[i + 1 : i + 2] and words[i + 1].isdecimal():
            return "fold", " ".join([*words[:i], *words[i + 2 :]])
    return None


def are_splits(folder: Path, names: Sequence[str], extensions: Sequence[str]) -> bool:
    """Whether folders are splits of one data set, by their names and by what is in them.

    Each name has a split's word in it; and what is left of the names agrees, or the names of the folders inside do.
    """
    words = [split_word(name) for name in names]
    if len(names) < 2 or any(word is None for word in words):
        return False
    if len({word[1] for word in words if word}) == 1:
        return True
    inside = [{sub for sub in folders_in(folder / name) if holds(folder / name / sub, extensions)} for name in names]
    most = max(inside, key=len)
    return all(own and 2 * len(own & most) >= len(own) for own in inside)


def visible(name: str) -> bool:
    """Whether a file or folder of that name is somebody's data."""
    return not name.startswith(".") and name.lower() not in SYSTEM


def entries(folder: Path) -> list[Path]:
    """The files and folders in a folder that count, in order.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return sorted(p for p in folder.iterdir() if visible(p.name))
    except OSError as error:
        raise DataError(f"{shown(folder)}: cannot be read ({error.strerror}).") from error


def folders_in(folder: Path) -> list[str]:
    """Names of the subfolders that count, in order; numbers in the order of numbers."""
    return natural([p.name for p in entries(folder) if p.is_dir()])


def shown(path: str | Path) -> str:
    """A path that can be printed and written: bytes that are no UTF-8 are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def files_below(folder: Path, extensions: Sequence[str]) -> list[str]:
    """Files with these endings, relative to `folder`, in order.

    Raises:
        DataError: a link leads back to a folder above itself.
    """
    found: list[str] = []
    endings = tuple(extensions)

    def walk(place: Path, above: tuple[tuple[int, int], ...], base: str) -> None:
        info = place.stat()
        if (own := (info.st_dev, info.st_ino)) in above:
            raise DataError(f"{shown(place)}: leads back to a folder above itself. Take the link out.")
        try:
            with os.scandir(place) as entries:
                names = sorted((entry.name, entry.is_dir()) for entry in entries if visible(entry.name))
        except OSError as error:
            raise DataError(f"{shown(place)}: cannot be read ({error.strerror}).") from error
        found.extend(base + name for name, is_folder in names if not is_folder and name.lower().endswith(endings))
        for name, is_folder in names:
            if is_folder:
                walk(place / name, (*above, own), f"{base}{name}/")

    walk(folder, (), "")
    return found


def holds(folder: Path, extensions: Sequence[str]) -> bool:
    """Whether a folder holds such files, or folders with them."""
    return bool(files_below(folder, extensions))


def read_file(path: str | Path) -> bytes:
    """What a file holds.

    Raises:
        DataError: it cannot be read, or is a pipe or a device, at which reading might never end.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            kind = "folder" if stat.S_ISDIR(mode) else "pipe, socket or device"
            raise DataError(f"{shown(path)}: is a {kind}, no file.")
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be read ({error.strerror}).") from error


class FolderRows(Labelled):
    """One subfolder for each class, files anywhere below it.

    Classes are the subfolders in alphabetical order (numbers in that of numbers), or `class_names`; then a subfolder of another
    name is an error, and one of theirs may be empty or missing.
    """

    blocks: np.ndarray | None = None
    window = 1

    def __init__(
        self, folder: Path, class_names: Sequence[str] | None = None, name: str = "", *, medium: Medium = IMAGES
    ) -> None:
        self.folder, self.medium, self.noun = folder, medium, medium.noun
        self.name = name or folder.name
        found = folders_in(folder)
        if not found:
            raise DataError(f"{shown(folder)}: no class subfolders. Expected {folder.name}/{medium.expected}.")
        for class_name in found:
            if shown(class_name) != class_name:
                raise DataError(
                    f"{shown(folder / class_name)}: the folder's name is no UTF-8, and it is to name a class. Rename it."
                )
        names = list(class_names) if class_names is not None else found
        positions = {name: i for i, name in enumerate(names)}
        self._paths: list[str] = []
        labels: list[int] = []
        empty: list[str] = []
        for class_name in found:
            files = files_below(folder / class_name, medium.extensions)
            if class_name not in positions:
                raise DataError(
                    f"{folder / class_name}: '{class_name}' is not among the {len(positions)} classes. "
                    f"{nearest(class_name, positions)}"
                )
            if not files:
                empty.append(class_name)
            self._check_splits(class_name, files)
            self._paths += [f"{class_name}/{file}" for file in files]
            labels += [positions[class_name]] * len(files)
        endings = ", ".join(medium.extensions)
        if not self._paths:
            raise DataError(
                f"{shown(folder)}: the data set is empty; {len(found)} class folders hold no {medium.thing} ({endings})."
            )
        if empty and class_names is None:
            raise DataError(
                f"{shown(folder)}: no {medium.thing} in the class folder{'s' * (len(empty) > 1)} {', '.join(empty[:5])} "
                f"({endings}). Take the folder away; or keep a class of which nothing is there by naming all: classes=[...]."
            )
        self.take(Labels(np.asarray(labels, dtype=np.int64), None, names))

    def _check_splits(self, class_name: str, files: Sequence[str]) -> None:
        parts = sorted({f.partition("/")[0] for f in files if "/" in f})
        inside = [part for part in parts if part.lower() in SPLITS]
        worded = [part for part in parts if split_word(part)]
        if len(inside) < 2 and are_splits(self.folder / class_name, worded, self.medium.extensions):
            inside = worded
        if len(inside) > 1:
            raise DataError(
                f"{self.folder / class_name}: holds the splits {', '.join(inside)} within one class, and all would be taken "
                "together. Put the classes into the splits (<split>/<class>/...), or give that folder itself."
            )

    def __len__(self) -> int:
        return len(self._paths)

    def where(self, index: int) -> str:
        return shown(self.folder / self._paths[index])

    def read(self, index: int) -> tuple[Any, Any]:
        return self.medium.decode(read_file(self.folder / self._paths[index]), self.where(index)), self.target(index)
