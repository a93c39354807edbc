"""What becomes of image files and arrays: depths, byte orders, orientation, modes, bands, frames."""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import zoo
from zoo.data import open_dataset
from zoo.data.images import colours, decode, picture
from zoo.data.preprocess import image_transform
from zoo.errors import DataError

SHARES = np.linspace(0, 1, 64).reshape(8, 8)  # what a grey ramp shows, black to white
PLAIN = {"input_size": (3, 8, 8), "mean": (0.0,) * 3, "std": (1.0,) * 3, "crop_pct": 1.0}


def tiff(values: np.ndarray, bits: int, sign: int, order: str = "<", white: int = 1) -> bytes:
    """A grey TIFF (8, 8), uncompressed; `sign` 1: unsigned, 2: signed, 3: float; `white` 0: white is zero."""
    if bits == 12:
        pairs = values.astype(np.uint16).reshape(-1, 2)
        packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
        pixels = packed.astype(np.uint8).tobytes()
    else:
        pixels = values.astype(f"{order}{' uif'[sign]}{bits // 8}").tobytes()
    tags = {256: 8, 257: 8, 258: bits, 259: 1, 262: white, 273: 8, 277: 1, 278: 8, 279: len(pixels), 339: sign}
    entries = b"".join(
        struct.pack(order + "HHI", tag, 3, 1) + struct.pack(order + "HH", value, 0) for tag, value in tags.items()
    )
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(pixels))
    return head + pixels + struct.pack(order + "H", len(tags)) + entries + struct.pack(order + "I", 0)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pgm(top: int) -> bytes:
    values = np.round(SHARES * top)
    return b"P5 8 8 %d\n" % top + values.astype(">u2" if top > 255 else "u1").tobytes()


U16 = np.round(SHARES * 65535).astype(np.uint16)
DEPTHS = {
    "png-16": saved(Image.fromarray(U16), "PNG"),
    "pgm-16": pgm(65535),
    "pgm-10": pgm(1023),
    "pgm-8": pgm(255),
    "pgm-text": b"P2 8 8 65535\n" + " ".join(map(str, U16.ravel())).encode(),
    "tiff-12": tiff(SHARES * 4095, 12, 1),
    "tiff-16": tiff(U16, 16, 1),
    "tiff-16-big": tiff(U16, 16, 1, ">"),
    "tiff-16-white-is-zero": tiff(65535 - U16, 16, 1, white=0),
    "tiff-16-signed": tiff(SHARES * 32767, 16, 2),
    "tiff-16-signed-big": tiff(SHARES * 32767, 16, 2, ">"),
    "tiff-32": tiff(np.round(SHARES * (2**32 - 1)), 32, 1),
    "tiff-32-signed": tiff(SHARES * (2**31 - 1), 32, 2, ">"),
    "tiff-8-signed": tiff(SHARES * 127, 8, 2),
    "tiff-float": tiff(SHARES, 32, 3),
    "tiff-float-big": tiff(SHARES * 255, 32, 3, ">"),
    "jpeg2000-16": saved(Image.fromarray(U16), "JPEG2000"),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_grey_values_are_scaled_by_the_types_range(name: str) -> None:
    """16-bit PGM and TIFF came out white, 12-bit ones black; from files and through the preprocessing alike."""
    read = np.asarray(decode(DEPTHS[name], name))
    assert read.shape == (8, 8, 3)
    np.testing.assert_allclose(read[..., 1] / 255, SHARES, atol=1.1 / 127)
    opened = image_transform(PLAIN)(Image.open(io.BytesIO(DEPTHS[name])))
    np.testing.assert_allclose(opened[2].numpy(), SHARES, atol=1.1 / 127)


@pytest.mark.parametrize(
    "values",
    [U16, U16.astype(np.int32), np.round(SHARES * 255).astype(np.int32), SHARES.astype(np.float32), U16.astype(">u2")],
    ids=lambda v: str(v.dtype),
)
def test_arrays_that_know_no_file(values: np.ndarray) -> None:
    image = Image.fromarray(values) if values.dtype != ">u2" else Image.frombytes("I;16B", (8, 8), values.tobytes())
    np.testing.assert_allclose(image_transform(PLAIN)(image)[0].numpy(), SHARES, atol=1 / 255)


def test_values_without_black_are_refused() -> None:
    for values in (SHARES * 100 - 5, SHARES * 1000, np.full((8, 8), np.nan)):
        with pytest.raises(DataError, match="are no brightness"):
            colours(Image.fromarray(values.astype(np.float32)))
    with pytest.raises(DataError, match=r"a\.tif: grey values from -3 to"):
        decode(tiff(SHARES * 100 - 3, 16, 2), "a.tif")


def test_scales_that_nobody_can_know_are_refused() -> None:
    """One overshoot above 1 made a whole picture of shares black; so did 16-bit values in a file of 32 bits."""
    with pytest.raises(DataError, match=r"floats up to 1\.02 are neither shares of 1 nor brightness up to 255"):
        colours(Image.fromarray((SHARES * 1.02).astype(np.float32)))
    with pytest.raises(DataError, match=r"a\.tif: 32-bit values up to 65535 would all be black"):
        decode(tiff(np.round(SHARES * 65535), 32, 2), "a.tif")
    assert np.asarray(colours(Image.fromarray(np.zeros((8, 8), np.float32)))).max() == 0  # black is black


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_are_turned_as_their_exif_says(orientation: int, kind: str, tmp_path: Path) -> None:
    """A photograph with orientation 6 lay on its side."""
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8] = 250  # a bright corner at the top left
    turns = {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: 1, 7: 3, 8: 3}
    stored = np.rot90(upright[:, ::-1] if orientation in (2, 4, 5, 7) else upright, turns[orientation])
    exif = Image.Exif()
    exif[274] = orientation
    data = saved(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif)
    found = decode(data, "x")
    assert found.size == (24, 16)
    assert np.abs(np.asarray(found).astype(int) - upright).max() < 60  # JPEG blurs the corner's edge
    view = image_transform({**PLAIN, "input_size": (3, 16, 24)})
    direct = view(Image.open(io.BytesIO(data)))
    assert direct[0, 3, 3] > 0.9 and direct[0, 12, 18] < 0.1
    assert torch.equal(view(Image.open(io.BytesIO(data)).convert("RGB")), direct)  # and the usual recipe
    assert torch.equal(view(found), direct)  # never turned twice


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV"]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_all_modes_of_pil(mode: str, channels: int) -> None:
    base = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    image = Image.new(mode, (8, 8)) if mode in ("LAB", "RGBa") else base.convert(mode)
    found = colours(image, channels)
    assert found.mode == ("RGB" if channels == 3 else "L")
    expected = image.convert("RGB")
    if channels == 1 and mode != "YCbCr":  # whose first band is the grey itself
        expected = expected.convert("L")
    if found.mode == expected.mode:
        np.testing.assert_allclose(np.asarray(found).astype(int), np.asarray(expected).astype(int), atol=1)


def test_premultiplied_grey_and_transparent_palettes() -> None:
    assert colours(Image.merge("LA", [Image.new("L", (2, 2), 90), Image.new("L", (2, 2), 255)]).convert("La")).getpixel(
        (0, 0)
    ) == (90, 90, 90)
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    data = saved(image, "PNG", transparency=bytes([255, 0]))
    assert decode(data, "x").getpixel((0, 0)) == (200, 100, 50)


def test_the_first_of_several_frames_is_taken_and_said() -> None:
    frames = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (250, 10)]
    for kind in ("GIF", "TIFF", "WEBP"):
        with pytest.warns(UserWarning, match="several frames or pages; the first one"):
            found = decode(saved(frames[0], kind, save_all=True, append_images=frames[1:]), "x")
        assert found.getpixel((0, 0))[0] > 200
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(saved(frames[0], "GIF"), "x")


@pytest.mark.parametrize("bands", [1, 2, 3, 4, 7])
def test_bands_are_bands(bands: int) -> None:
    """Of uint8 tensors with four bands the fourth was dropped, as alpha."""
    pixels = torch.randint(0, 256, (bands, 8, 8), dtype=torch.uint8)
    data = open_dataset(_Pixels(pixels))
    view = image_transform({**PLAIN, "input_size": (bands, 8, 8), "mean": (0.0,) * bands, "std": (1.0,) * bands})
    torch.testing.assert_close(view(data[0][0]), pixels / 255)
    if bands > 1:
        array = np.moveaxis(pixels.numpy(), 0, -1)  # as numpy, PIL and rasters have it
        torch.testing.assert_close(view(picture(array)), pixels / 255)
    if bands not in (1, 3):
        with pytest.raises(DataError, match=f"an image of {bands} bands, and the backbone takes 3"):
            image_transform(PLAIN)(data[0][0])
        train = image_transform({**view_config(bands), "input_size": (bands, 96, 96)}, train=True)
        assert train(torch.randint(0, 256, (bands, 120, 110), dtype=torch.uint8)).shape == (bands, 96, 96)
        border = image_transform({**view_config(bands), "crop_mode": "border", "input_size": (bands, 8, 12)})
        assert border(pixels).shape == (bands, 8, 12)


def view_config(bands: int) -> dict[str, Any]:
    return {"input_size": (bands, 8, 8), "crop_pct": 1.0}


class _Pixels(torch.utils.data.Dataset[Any]):
    def __init__(self, pixels: Any) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        return self.pixels, 0


def test_only_what_says_rgba_has_alpha() -> None:
    image = Image.new("RGBA", (8, 8), (10, 20, 30, 40))
    four = image_transform({"input_size": (4, 8, 8), "mean": (0.0,) * 4, "std": (1.0,) * 4, "crop_pct": 1.0})(image)
    torch.testing.assert_close(four[:, 0, 0] * 255, torch.tensor([10.0, 20, 30, 40]))
    assert image_transform(PLAIN)(image).shape == (3, 8, 8)
    with pytest.raises(DataError, match="mode RGB has no 4 channels"):
        image_transform({"input_size": (4, 8, 8)})(image.convert("RGB"))


def test_whole_numbers_that_do_not_say_what_white_is() -> None:
    with pytest.raises(DataError, match="item 0: an image of type int64; expected uint8 or uint16"):
        open_dataset(_Pixels(torch.zeros(3, 8, 8, dtype=torch.int64)))[0]
    grey = open_dataset(_Pixels((torch.arange(64).reshape(1, 8, 8) * 1040).to(torch.uint16)))[0][0]
    assert np.asarray(grey).max() == round(63 * 1040 / 257)


def test_float_arrays_as_numpy_has_them() -> None:
    array = np.random.default_rng(0).normal(size=(8, 6, 3)).astype(np.float32)
    assert torch.equal(picture(array), torch.from_numpy(array).permute(2, 0, 1))
    assert torch.equal(picture(np.moveaxis(array, -1, 0)), torch.from_numpy(array).permute(2, 0, 1))


def test_the_documented_recipe() -> None:
    """What cards and the guide show: a 16-bit photograph through `model.preprocess()` is not white."""
    model = zoo.load("vit-micro", num_classes=0, pretrained=False, depth=1)
    grey = model.preprocess()(Image.open(io.BytesIO(DEPTHS["png-16"])))
    white = model.preprocess()(Image.new("RGB", (8, 8), "white"))
    assert float(grey.mean()) < float(white.mean()) - 0.5
    assert 'Image.open("photo.jpg"))' in model.family.usage(0)[1][0]
