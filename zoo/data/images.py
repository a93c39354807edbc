"""What becomes of an image file or array: turned as every viewer turns it, eight bits, the colours that are asked for.

PIL decodes; what it leaves to its caller is done here, in one place for data sets and for `model.preprocess()`:

- EXIF orientation is applied.
- Grey values of more than eight bits are scaled by their type's range, v -> round(255 v / max), whatever the byte order, where
  PIL's own `convert("RGB")` makes all above 255 white. max is that of the file: 65535 of a 16-bit PNG, PGM or TIFF, 4095 of a
  12-bit TIFF, 2^32 - 1 of a 32-bit one. An image that no longer knows its file (`copy`, `crop`, `fromarray`) has the smallest
  of 255, 65535 and 2^31 - 1 that holds its values; floats are shares of 1, or up to 255. Values below 0 have no black, floats
  whose largest lies between 1 and 8 may be either, and 32-bit numbers that leave nothing but black have a range of their own:
  all of these are refused.
- Alpha and transparent colours are dropped; palettes, CMYK, LAB and the like become RGB.
- Of several frames or pages (GIF, TIFF, WebP, PNG) the first is taken, and that is said once.

Arrays are bands, and bands are bands: only a PIL image that says RGBA has alpha.
"""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from zoo.errors import DataError

__all__ = ["ADVICE", "colours", "decode", "describe", "picture", "size_of"]

ADVICE = 'Repair or remove it, or open the data set with on_error="skip" to go on without it.'
BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
DARK = 8.0  # the largest of an image on the scale of 255 that nobody would take for one on the scale of 1
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def decode(data: bytes | bytearray | memoryview | None, where: str) -> Image.Image:
    """An RGB image out of encoded bytes (JPEG, PNG, WebP, TIFF ...), turned upright.

    Raises:
        DataError: there are no bytes, or they are no whole image; the message names `where`.
    """
    if data is None or len(data) == 0:
        raise DataError(f"{where}: the image is empty (0 bytes). {ADVICE}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd EXIF data and of palettes; neither matters here
            with Image.open(io.BytesIO(data)) as image:
                several = bool(getattr(image, "is_animated", False)) and image.format != "MPO"  # phones' previews
                found = colours(image, 3)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    except (OSError, ValueError, SyntaxError, EOFError, TypeError, Image.DecompressionBombError) as error:
        reason = "not an image that Pillow can read" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise DataError(f"{where}: the image is corrupt ({reason}). {ADVICE}") from error
    if several:
        warnings.warn("An image of the data has several frames or pages; the first one is taken.", stacklevel=2)
    return found


def colours(image: Image.Image, channels: int = 3) -> Image.Image:
    """A PIL image of any mode, turned upright, with eight bits in three channels, in one, or in four (RGBA).

    Raises:
        DataError: values below 0 or not finite, or another number of channels.
    """
    if channels not in MODES or (channels == 4 and image.mode not in ("RGBA", "CMYK")):
        raise DataError(
            f"an image of mode {image.mode} has no {channels} channels. Give such a network arrays: a data set of uint8 tensors "
            f"({channels}, H, W)."
        )
    image.load()
    if channels == 4:
        return ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16") or _signed_bytes(image):
        image = _eight_bits(image)
    elif image.mode in ("La", "LAB"):
        image = image.convert({"La": "LA", "LAB": "RGB"}[image.mode])
    elif image.mode in ("P", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
    image = ImageOps.exif_transpose(image)  # a copy, which knows the file's depth no more
    mode = MODES[channels]
    return image if image.mode == mode else image.convert(mode)


def _signed_bytes(image: Image.Image) -> bool:
    return image.mode == "L" and _tag(image, BITS, 8) == 8 and _tag(image, SAMPLE_FORMAT, 1) == 2


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey values of another type -> L."""
    values = np.asarray(image)
    bits, sign = _tag(image, BITS, 0), _tag(image, SAMPLE_FORMAT, 1)
    if image.mode == "L":
        values, top = values.view(np.int8), 127.0
    elif image.mode.startswith("I;16"):
        top = 2.0**bits - 1 if 8 < bits < 16 else 65535.0
    elif image.mode == "F":
        top = 255.0 if values.size and values.max() > 1 else 1.0
    elif sign == 1 and bits == 32:
        values, top = values.view(np.uint32), 2.0**32 - 1
    elif sign == 2 and bits in (16, 32):
        top = 2.0 ** (bits - 1) - 1
    elif image.format == "PPM":
        top = 65535.0
    else:
        largest = int(values.max()) if values.size else 0
        top = next(t for t in (255.0, 65535.0, 2.0**31 - 1) if largest <= t)
    numbers = values.astype(np.float64)
    low, high = (float(numbers.min()), float(numbers.max())) if numbers.size else (0.0, 0.0)
    if not (np.isfinite(low) and np.isfinite(high)) or low < 0 or high > top:
        raise DataError(
            f"grey values from {low:g} to {high:g} (mode {image.mode}) are no brightness; expected 0 to {top:g}. Scale them to "
            "0..255 or to 0..1 beforehand."
        )
    if image.mode == "F" and 1 < high < DARK:
        raise DataError(
            f"floats up to {high:g} are neither shares of 1 nor brightness up to 255. Scale them to 0..1, or clip what lies "
            "above."
        )
    if top > 65535 and 0 < high < top / 510:
        raise DataError(
            f"32-bit values up to {high:g} would all be black beside their type's {top:g}. Scale them to the range of their type "
            "beforehand, or save them with 16 bits."
        )
    if _tag(image, PHOTOMETRIC, 1) == 0 and image.mode != "L":
        numbers = top - numbers  # white is zero; Pillow turns that around for up to eight bits only
    grey = Image.fromarray(np.round(numbers / top * 255).astype(np.uint8))
    grey.info = {k: v for k, v in image.info.items() if k != "transparency"}
    return grey


def _tag(image: Any, tag: int, default: int) -> int:
    """A number of a TIFF's header; of several bands the first."""
    tags = getattr(image, "tag_v2", None)
    value = default if tags is None else tags.get(tag, default)
    return int(value[0] if isinstance(value, tuple) else value)


def picture(value: Any) -> Any:
    """An array of pixels as a PIL image if it has one or three bands, as a uint8 tensor (C, H, W) if it has others.

    uint8 (and uint16, scaled) tensors are (C, H, W) or (H, W); numpy arrays are (H, W, C) as well. All else is left as it is: PIL
    images, and floats, which are ready for the model once arrays (H, W, C) are tensors (C, H, W).

    Raises:
        DataError: whole numbers of another type, which do not say what white is.
    """
    if isinstance(value, np.ndarray):
        if value.ndim not in (2, 3) or value.dtype.kind not in "biuf":
            return torch.from_numpy(value) if value.dtype.kind == "f" else value
        last = value.ndim == 3 and value.shape[0] not in MODES and value.shape[-1] < value.shape[0]
        last = last or (value.ndim == 3 and value.shape[-1] in MODES and value.shape[0] not in (1, 3))
        pixels = np.moveaxis(value, -1, 0) if last else value
        value = torch.from_numpy(np.ascontiguousarray(pixels))
    if not isinstance(value, Tensor) or value.is_floating_point() or value.ndim not in (2, 3):
        return value
    if value.dtype == torch.uint16:
        value = (value.to(torch.float64) / 257).round().to(torch.uint8)
    if value.dtype == torch.bool:
        value = value.to(torch.uint8) * 255
    if value.dtype != torch.uint8:
        if value.ndim == 2 or len(value) not in (1, 3):
            return value  # indices or the like
        raise DataError(
            f"an image of type {str(value.dtype).removeprefix('torch.')}; expected uint8 or uint16, or floats that are ready for "
            "the model."
        )
    bands = value[None] if value.ndim == 2 else value
    if len(bands) not in (1, 3):
        return bands
    array = bands.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array[..., 0] if len(bands) == 1 else array).convert("RGB")


def size_of(value: Any) -> tuple[int, int]:
    """(H, W) of a PIL image or a tensor (C, H, W)."""
    return (int(value.shape[-2]), int(value.shape[-1])) if isinstance(value, Tensor) else (value.height, value.width)


def describe(value: Any) -> str:
    """What a value is, in messages."""
    if isinstance(value, (Tensor, np.ndarray)):
        return (
            f"{type(value).__name__} of shape {tuple(value.shape)} and type {str(value.dtype).removeprefix('torch.')}"
        )
    return type(value).__name__
