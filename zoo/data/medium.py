"""What the items of data sets are: how they are decoded, what their files and columns are called, what messages say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from zoo.data.images import ADVICE, decode, picture
from zoo.errors import DataError

__all__ = ["CAPTIONS", "IMAGES", "LABEL_COLUMNS", "Medium"]

LABEL_COLUMNS = ("label", "labels", "class", "cls", "target", "targets", "category", "fine_label", "y")
CAPTIONS = (
    "captions",
    "caption",
    "text",
    "texts",
    "sentence",
    "sentences",
    "title",
    "description",
)  # no labels, if not named


@dataclass(frozen=True)
class Medium:
    """One kind of items; every source (`zoo.data.folders`, `parquet`, `tables`, `shards`, `sources`) reads any kind.

    Args:
        thing, noun: one of them and several, in messages.
        setting: what the public functions call the name of its column.
        decode: (bytes, place) -> item; raises DataError that names the place.
        accept: (what a data set of the user's yields, place) -> item, or what is ready for the model.
        raw: whether an item still needs the backbone's preprocessing.
        extensions: of files. columns: usual names of a column of encoded items. paths: of a column of file names.
        label_columns: usual names of a column of labels.
        ready: keys under which other libraries' rows hold what is ready for a model.
        feature: the class of such a column in the library `datasets`.
    """

    thing: str
    noun: str
    setting: str
    decode: Callable[[Any, str], Any]
    accept: Callable[[Any, str], Any]
    raw: Callable[[Any], bool]
    extensions: tuple[str, ...]
    columns: tuple[str, ...]
    paths: tuple[str, ...]
    feature: str
    ready: tuple[str, ...] = ()
    label_columns: tuple[str, ...] = LABEL_COLUMNS
    expected: str = "<class>/<file>"  # below a folder

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the item in a row: columns, file endings (as shards have them), what is ready."""
        return (*self.columns, *(e[1:] for e in self.extensions if e[1:] not in self.columns), *self.ready)


def _image(value: Any, where: str) -> Any:
    try:
        if isinstance(value, Image.Image):
            value.load()  # it may have been opened only
        return picture(value)
    except (OSError, SyntaxError, EOFError) as error:
        raise DataError(f"{where}: the image is corrupt ({error}). {ADVICE}") from error
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _raw_image(value: Any) -> bool:
    return isinstance(value, Image.Image) or (
        isinstance(value, Tensor) and value.dtype == torch.uint8 and value.ndim == 3
    )


IMAGES = Medium(
    thing="image",
    noun="images",
    setting="image_column",
    decode=decode,
    accept=_image,
    raw=_raw_image,
    extensions=(
        *(
            ".jpg",
            ".jpeg",
            ".jpe",
            ".jfif",
            ".png",
            ".webp",
            ".bmp",
            ".gif",
            ".tif",
            ".tiff",
            ".ppm",
            ".pgm",
            ".pbm",
            ".pnm",
        ),
        *(
            ".jp2",
            ".tga",
            ".avif",
            ".heic",
            ".heif",
        ),  # what Pillow cannot read is named, where leaving it out would be silent
    ),
    columns=("image", "img", "images", "jpg", "png", "picture", "photo", "pixels"),
    paths=("file_name", "filename", "file", "path", "filepath", "image_path", "image", "img", "image_id", "id"),
    feature="Image",
    ready=("pixel_values",),
    expected="<class>/<image>, a table of files and labels (labels.csv), or Parquet files with an image column",
)
