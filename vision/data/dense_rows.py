"""Where images with maps come from: folders, Parquet files, objects. Each source has `len`, `where(i)`, `pair(i)`, `map(i)`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vision.data.masks import as_map, decode_map
from zoo.data.folders import SPLITS, files_below, folders_in, read_file, shown
from zoo.data.images import decode
from zoo.data.medium import IMAGES
from zoo.data.open import folder_name
from zoo.data.parquet import ParquetRows
from zoo.errors import DataError, nearest

__all__ = ["FolderPairs", "ListedPairs", "ParquetPairs"]

IMAGE_FOLDERS = ("images", "image", "imgs", "img", "jpegimages", "rgb")
MAP_FOLDERS = {
    "segment": (
        *("masks", "mask", "labels", "label", "annotations", "annotation", "annots", "segmentation", "segmentations"),
        *("segmentationclass", "gt", "targets", "semantic"),
    ),
    "edges": ("edges", "edge", "boundaries", "masks", "labels", "annotations", "gt"),
    "depth": ("depth", "depths", "distance", "disparity", "masks", "labels", "annotations", "gt"),
    "normals": ("normals", "normal", "masks", "labels", "annotations", "gt"),
}
MAP_COLUMNS = {
    "segment": ("mask", "masks", "segmentation", "annotation", "label", "labels", "semantic", "target", "gt"),
    "edges": ("edges", "edge", "boundary", "mask", "annotation", "label", "target", "gt"),
    "depth": ("depth", "depth_map", "distance", "disparity", "mask", "label", "target", "gt"),
    "normals": ("normals", "normal", "mask", "label", "target", "gt"),
}
MAP_FILES = (".png", ".npy", ".tif", ".tiff", ".bmp", ".gif", ".pgm", ".webp")


class FolderPairs:
    """`images/` beside `masks/`, files of one name: in `folder`, in its subfolder of a split, or with a split below each.

    Raises:
        DataError: no such folders, several splits, an image without a map (`lenient`: without any), or two maps for one image.
    """

    def __init__(self, folder: Path, split: str | None, kind: str, lenient: bool = False) -> None:
        place, below = _split_of(folder, split, kind)
        images, maps = _two_folders(place, kind)
        images, maps = images / below, maps / below
        self.name = f"{folder.name}/{split}" if split else folder_name(folder)
        own = Path(os.path.abspath(place))  # of a split told by its folder, the same as of one told by its name
        self.folders = [own, own.parent]
        files = files_below(images, IMAGES.extensions)
        if not files:
            raise DataError(f"{shown(images)}: holds no image ({', '.join(IMAGES.extensions)}).")
        known: dict[str, str] = {}
        for file in files_below(maps, MAP_FILES):
            stem = str(Path(file).with_suffix(""))
            if stem in known:
                raise DataError(f"{shown(maps)}: '{known[stem]}' and '{file}' are both maps of '{stem}'. Keep one.")
            known[stem] = file
        stems = [str(Path(f).with_suffix("")) for f in files]
        missing = [f for f, stem in zip(files, stems, strict=True) if stem not in known]
        if missing and not (lenient and len(missing) < len(files)):
            raise DataError(
                f"{shown(images / missing[0])}: has no map of its name in {shown(maps)} ({len(missing)} such images). "
                f"{nearest(str(Path(missing[0]).with_suffix('')), known)}"
            )
        self._images = [images / f for f in files]
        self._maps = [maps / known[stem] if stem in known else None for stem in stems]
        self.files, self._folder = [file for file in self._maps if file is not None], maps

    def __len__(self) -> int:
        return len(self._images)

    def where(self, index: int) -> str:
        """The image's file."""
        return shown(self._images[index])

    def map(self, index: int) -> np.ndarray:
        """The map alone."""
        if (file := self._maps[index]) is None:
            raise DataError(f"{self.where(index)}: has no map of its name in {shown(self._folder)}.")
        return decode_map(read_file(file), shown(file))

    def pair(self, index: int) -> tuple[Any, np.ndarray]:
        """(image, map)."""
        return decode(read_file(self._images[index]), self.where(index)), self.map(index)


def _named(folder: Path, names: Sequence[str]) -> str | None:
    """The first subfolder with one of these names, in their order."""
    there = {name.lower(): name for name in folders_in(folder)}
    return next((there[name] for name in names if name in there), None)


def _split_of(folder: Path, split: str | None, kind: str) -> tuple[Path, str]:
    """(the folder that holds images and maps, what is below each of the two)."""
    if _named(folder, IMAGE_FOLDERS) is None:
        splits = [name for name in folders_in(folder) if _named(folder / name, IMAGE_FOLDERS)]
        if split is None and len(splits) == 1:
            return folder / splits[0], ""
        if split is None or split not in splits:
            if not splits:
                raise DataError(
                    f"{shown(folder)}: expected a folder 'images' and one of {', '.join(MAP_FOLDERS[kind][:4])} beside it, each "
                    "with files of the same names."
                )
            raise DataError(
                f"{shown(folder)}: has the splits {', '.join(splits)}; choose one with split=..."
                if split is None
                else f"{shown(folder)}: no split '{split}'. {nearest(split, splits)}"
            )
        return folder / split, ""
    inner = folders_in(folder / str(_named(folder, IMAGE_FOLDERS)))
    splits = [name for name in inner if name.lower() in SPLITS]
    if split is not None:
        if split not in inner:
            raise DataError(f"{shown(folder)}: no split '{split}'. {nearest(split, inner)}")
        return folder, split
    if len(splits) > 1:
        raise DataError(f"{shown(folder)}: has the splits {', '.join(splits)}; choose one with split=...")
    return folder, ""


def _two_folders(place: Path, kind: str) -> tuple[Path, Path]:
    images, maps = _named(place, IMAGE_FOLDERS), _named(place, MAP_FOLDERS[kind])
    if images is None or maps is None:
        raise DataError(
            f"{shown(place)}: has the folders {', '.join(folders_in(place)) or 'none'}; expected 'images' and one of "
            f"{', '.join(MAP_FOLDERS[kind][:5])}, which hold files of the same names."
        )
    return place / images, place / maps


class _Column(ParquetRows):
    """One column of encoded items, without labels."""

    def _find_label(self, schema: pa.Schema, wanted: str | None) -> str:
        return self.column

    def _read_labels(self, schema: pa.Schema, class_names: Sequence[str] | None, labels: str, given: bool) -> None:
        self.labels = None

    def encoded(self, index: int) -> Any:
        """The bytes of an item."""
        import bisect

        block = bisect.bisect_right(self._starts, index) - 1
        value = self._column(block)[index - self._starts[block]].as_py()
        return value.get("bytes") if isinstance(value, dict) else value


class ParquetPairs:
    """Parquet files with a column of encoded images and one of encoded maps."""

    def __init__(self, files: Sequence[Path], column: str | None, mask_column: str | None, kind: str) -> None:
        import pyarrow.parquet as pq

        try:
            there = pq.read_schema(files[0]).names
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{files[0]}: not a readable Parquet file ({error}).") from error
        self.files = [Path(f) for f in files]
        stem = self.files[0].stem
        folder = self.files[0].resolve().parent
        self.name, self.folders = f"{folder.name}/{stem}", [folder, folder.parent]
        mask_column = _one_of(there, mask_column, MAP_COLUMNS[kind], str(files[0]), "mask_column")
        column = _one_of(there, column, [c for c in IMAGES.columns if c != mask_column], str(files[0]), "image_column")
        self._images = _Column(self.files, column=column, name=self.name)
        self._maps = _Column(self.files, column=mask_column, name=self.name)
        self.blocks, self.window = self._images.blocks, self._images.window

    def load(self) -> None:
        """Read what is to be held in memory."""
        self._images.load()
        self._maps.load()

    def __len__(self) -> int:
        return len(self._images)

    def where(self, index: int) -> str:
        """File and row."""
        return self._images.where(index)

    def map(self, index: int) -> np.ndarray:
        """The map alone."""
        return decode_map(self._maps.encoded(index), self.where(index))

    def pair(self, index: int) -> tuple[Any, np.ndarray]:
        """(image, map)."""
        return decode(self._images.encoded(index), self.where(index)), self.map(index)


def _one_of(there: Sequence[str], wanted: str | None, usual: Sequence[str], where: str, setting: str) -> str:
    if wanted is not None:
        if wanted not in there:
            raise DataError(f"{where}: no column '{wanted}' ({setting}). {nearest(wanted, there)}")
        return wanted
    found = next((name for name in usual if name in there), None)
    if found is None:
        raise DataError(f"{where}: name one of its columns with {setting}=...; columns: {', '.join(there)}.")
    return found


class ListedPairs:
    """A torch data set or sequence of pairs (image, map), or of rows {"image": ..., "mask": ...}."""

    def __init__(self, source: Any, column: str | None, mask_column: str | None, kind: str) -> None:
        if not hasattr(source, "__getitem__") or not hasattr(source, "__len__") or isinstance(source, Mapping):
            raise DataError(
                f"A {type(source).__name__} is no data set of images with maps; expected pairs (image, map) that can be counted "
                "and asked for by number."
            )
        self.source, self.name = source, type(source).__name__
        self.folders: list[Path] = []
        if not len(source):
            raise DataError(f"{self.name}: the data set is empty.")
        first = source[0]
        self._keys: tuple[Any, Any] = (0, 1)
        if isinstance(first, Mapping):
            mask_column = _one_of(list(first), mask_column, MAP_COLUMNS[kind], self.name, "mask_column")
            images = [c for c in IMAGES.columns if c != mask_column]
            self._keys = (_one_of(list(first), column, images, self.name, "image_column"), mask_column)
        elif column is not None or mask_column is not None:
            raise DataError(f"image_column and mask_column are of rows by name; {self.name} gives pairs.")

    def __len__(self) -> int:
        return len(self.source)

    def where(self, index: int) -> str:
        """The number of the item."""
        return f"{self.name}, item {index}"

    def _item(self, index: int) -> tuple[Any, Any]:
        item, where = self.source[index], self.where(index)
        named = isinstance(self._keys[0], str)
        if named != isinstance(item, Mapping) or (
            not named and (not isinstance(item, (tuple, list)) or len(item) != 2)
        ):
            raise DataError(f"{where}: is a {type(item).__name__}; expected a pair (image, map).")
        return item[self._keys[0]], item[self._keys[1]]

    def map(self, index: int) -> np.ndarray:
        """The map alone."""
        return as_map(self._item(index)[1], self.where(index))

    def pair(self, index: int) -> tuple[Any, np.ndarray]:
        """(image, map)."""
        image, value = self._item(index)
        where = self.where(index)
        image = decode(image, where) if isinstance(image, bytes) else IMAGES.accept(image, where)
        if not IMAGES.raw(image):
            raise DataError(
                f"{where}: the image is ready for a model; expected a PIL image or uint8, which is cut and normalised together "
                "with its map."
            )
        return image, as_map(value, where)
