"""Maps that say something of every pixel, as files: classes, edges, numbers, directions.

| kind | file | what becomes of it |
| --- | --- | --- |
| "segment" | a grey, palette or one-bit image, or .npy, of class indices | (H, W) int64 |
| "edges" | an image or .npy of 0 and 1 (or 0 and 255): 0 is no edge | (H, W) int64 of 0 and 1 |
| "depth" | a grey image of 8 or 16 bits, or .npy, of numbers | (H, W) float32 |
| "normals" | a colour image (2 v / 255 - 1), or .npy (H, W, 3) of floats | (H, W, 3) float32 |

Values are taken as they are stored: nothing is scaled by its type's range, no palette becomes colours, no EXIF is applied.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from zoo.data.images import ADVICE, describe
from zoo.errors import DataError

__all__ = ["DERIVED", "KINDS", "as_map", "boundary_distance", "class_edges", "decode_map", "read_map"]

KINDS = ("segment", "edges", "depth", "normals")
MAGIC = b"\x93NUMPY"


def decode_map(data: Any, where: str) -> np.ndarray:
    """A map out of an encoded image or the bytes of an .npy file: (H, W) or (H, W, C).

    Raises:
        DataError: it is neither, and the message names `where`.
    """
    if data is None or len(data) == 0:
        raise DataError(f"{where}: the map is empty (0 bytes). {ADVICE}")
    data = bytes(data)
    try:
        if data.startswith(MAGIC):
            return np.asarray(np.load(io.BytesIO(data), allow_pickle=False))
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return np.array(image)
    except (OSError, ValueError, SyntaxError, EOFError, TypeError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: the map is corrupt ({error}). {ADVICE}") from error


def as_map(value: Any, where: str) -> np.ndarray:
    """A map that a data set of the user's gives: an array, a tensor, an image, or encoded bytes.

    Raises:
        DataError: it is none of these.
    """
    if isinstance(value, (bytes, bytearray, memoryview)):
        return decode_map(value, where)
    if isinstance(value, Image.Image):
        return np.array(value)
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
        raise DataError(f"{where}: the map is {describe(value)}; expected an image, an array or a tensor of numbers.")
    return value


def read_map(value: np.ndarray, kind: str, where: str) -> Tensor:
    """The numbers of a map of a kind (of "segment" as they are stored: who knows the classes checks them).

    Raises:
        DataError: another number of channels, or values that are none of the kind.
    """
    if kind == "normals":
        return _directions(value, where)
    if value.ndim == 3 and 1 in (value.shape[0], value.shape[-1]):
        value = value[0] if value.shape[0] == 1 else value[..., 0]
    if value.ndim != 2:
        colours = " Colours that stand for classes have to be turned into indices first." if kind == "segment" else ""
        raise DataError(
            f"{where}: the map has the shape {tuple(value.shape)}; expected (H, W), one number for each pixel.{colours}"
        )
    if kind == "depth":
        return torch.from_numpy(value.astype(np.float32))
    if value.dtype.kind == "f" and not np.array_equal(value, np.round(value)):
        raise DataError(f"{where}: the map holds fractions; expected whole numbers.")
    found = torch.from_numpy(value.astype(np.int64))
    return found if kind == "segment" else _yes_no(found, where)


def _yes_no(found: Tensor, where: str) -> Tensor:
    values = found.unique().tolist()
    if set(values) <= {0, 255}:
        return found // 255
    if set(values) <= {0, 1}:
        return found
    raise DataError(
        f"{where}: an edge map holds {', '.join(map(str, values[:6]))}; expected 0 and 1, or 0 and 255. Edges of a map of "
        "classes are made by derive='edges'."
    )


def _directions(value: np.ndarray, where: str) -> Tensor:
    if value.ndim == 3 and value.shape[0] == 3 and value.shape[-1] != 3:
        value = np.moveaxis(value, 0, -1)
    if value.ndim != 3 or value.shape[-1] != 3:
        raise DataError(f"{where}: a map of normals has the shape {tuple(value.shape)}; expected (H, W, 3).")
    if value.dtype == np.uint8:
        return torch.from_numpy(value.astype(np.float32) * 2 / 255 - 1)
    if value.dtype.kind != "f":
        raise DataError(
            f"{where}: a map of normals is of type {value.dtype}; expected uint8 (2 v / 255 - 1) or floats."
        )
    return torch.from_numpy(value.astype(np.float32))


def class_edges(classes: Tensor, ignore: int) -> Tensor:
    """(H, W) classes -> (H, W) of 0 and 1: pixels beside, above or below one of another class. No class has no edges."""
    found = torch.zeros_like(classes)
    for a, b in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1, :], np.s_[1:, :])):
        differ = (classes[a] != classes[b]) & (classes[a] != ignore) & (classes[b] != ignore)
        found[a] |= differ
        found[b] |= differ
    return found


def boundary_distance(classes: Tensor, ignore: int, most: int = 16) -> Tensor:
    """(H, W) classes -> (H, W) float32: steps of a king on a board to the next edge of classes, as a share of `most`; 0 at
    edges, 1 from `most` steps on.
    """
    near = class_edges(classes, ignore).float()[None, None]
    found = torch.full(classes.shape, float(most))
    found[near[0, 0] > 0] = 0.0
    for step in range(1, most):
        near = F.max_pool2d(near, 3, stride=1, padding=1)
        found = torch.where((near[0, 0] > 0) & (found == most), torch.tensor(float(step)), found)
    return found / most


# what can be made of a map of classes: name -> (kind, function of (H, W) classes and the index of no class)
DERIVED: dict[str, tuple[str, Callable[[Tensor, int], Tensor]]] = {
    "edges": ("edges", class_edges),
    "distance": ("depth", boundary_distance),
}
