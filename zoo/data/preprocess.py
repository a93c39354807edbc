"""From a PIL image to the tensor that a backbone was trained on.

Evaluation does what timm does with the same configuration, to the bit: resize so that `crop_pct` of the image is left,
cut out the centre, normalise. Images are taken as PIL opens them, of any depth and orientation (`zoo.data.images`). Training
cuts out a random part and flips it. Tiny images (up to 64 pixels) would lose too much to a random resize: they get the
evaluation view, moved by up to an eighth of its size (4 pixels at 32) with the border reflected, and flipped.

Random numbers come from torch's generator, so seeding torch (as data loaders do in each worker) repeats the augmentation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as TF

from zoo.data.augment import Augment, Called, parse
from zoo.data.images import colours, describe, picture, size_of
from zoo.errors import ConfigError, DataError, nearest

CROP_MODES = ("center", "squash", "border")
INTERPOLATIONS = {mode.value: mode for mode in InterpolationMode}
TINY = 64  # pixels; up to here images are moved instead of randomly resized
SCALE = (0.08, 1.0)  # share of the image's area that a random crop keeps; timm's and torchvision's default
RATIO = (3 / 4, 4 / 3)  # its aspect


def image_transform(config: Mapping[str, Any], train: bool = False, *, augment: Any = "crop-flip") -> ImageTransform:
    """The preprocessing of a backbone: PIL image, or uint8 tensor of C bands -> float tensor (C, H, W).

    Args:
        config: `input_size` (C, H, W), and optionally `mean` and `std` (C values each), `interpolation`, `crop_pct`,
            `crop_mode`, as in timm's data configuration, and `scale`, the share of the area that a random crop keeps.
        train: augment; False gives the evaluation view.
        augment: of training: "crop-flip", "crop" (nothing is mirrored: digits, letters, left and right hands), "none", and
            policies by name (`zoo.data.augment`), or a function of an image, which then gets the evaluation view.

    Raises:
        ConfigError: `config` has no image size, or a setting that is not known.
    """
    return ImageTransform(config, train, augment)


class ImageTransform:
    """See `image_transform`. Settings are plain attributes, so an instance can be sent to worker processes."""

    def __init__(self, config: Mapping[str, Any], train: bool, augment: Any) -> None:
        size = config.get("input_size")
        if not isinstance(size, Sequence) or len(size) != 3 or min(size) < 1:
            raise ConfigError(
                f"input_size is {size!r}; expected (channels, height, width). A backbone that takes no images has no image "
                "preprocessing."
            )
        self.channels, self.height, self.width = (int(n) for n in size)
        self.mean = _per_channel("mean", config.get("mean", (0.485, 0.456, 0.406)), self.channels)
        self.std = _per_channel("std", config.get("std", (0.229, 0.224, 0.225)), self.channels)
        self.crop_pct = float(config.get("crop_pct") or 0.875)
        self.crop_mode = str(config.get("crop_mode") or "center")
        self.scale = tuple(config.get("scale") or SCALE)
        name = str(config.get("interpolation") or "bicubic")
        name = "bilinear" if name == "random" else name
        for what, value, known in (
            ("interpolation", name, INTERPOLATIONS),
            ("crop_mode", self.crop_mode, CROP_MODES),
        ):
            if value not in known:
                raise ConfigError(f"{what} '{value}' is unknown. {nearest(value, known)}")
        if not 0 < self.crop_pct <= 1:
            raise ConfigError(f"crop_pct is {self.crop_pct}; expected more than 0 and at most 1.")
        if min(self.std) <= 0:
            raise ConfigError(f"std is {self.std}; expected positive numbers.")
        self.interpolation = INTERPOLATIONS[name]
        self.before = Called(augment) if callable(augment) else None
        named = "none" if self.before is not None else augment
        size = (self.channels, self.height, self.width)
        self.augment = parse(named, size, self.mean, self.std, name)
        if not train:
            self.before, self.augment = None, Augment("none", "none", (), 0.0)
        self.train = self.augment.geometry != "none"
        self.flip = self.augment.geometry == "crop-flip"

    def __call__(self, image: Any) -> Tensor:
        """The image as a normalised float tensor (C, H, W).

        Raises:
            DataError: it is no PIL image and no uint8 tensor, or has another number of bands than the backbone takes.
        """
        image = self._colours(image)
        if self.before is not None:
            image = self._colours(self.before.image(image))
        if not self.train:
            image = self._centre(image)
        elif max(self.height, self.width) <= TINY:
            image = self._shifted(self._centre(image))
        else:
            area = RandomResizedCrop.get_params(image, list(self.scale), list(RATIO))
            image = TF.resized_crop(image, *area, [self.height, self.width], self.interpolation, antialias=True)
        if self.flip and bool(torch.rand(()) < 0.5):
            image = TF.hflip(image)
        image = self.augment.on_image(image)
        values = image.float() / 255 if isinstance(image, Tensor) else TF.to_tensor(image)
        return self.augment.on_tensor(TF.normalize(values, list(self.mean), list(self.std)))

    def _colours(self, image: Any) -> Any:
        """A PIL image of as many channels as the backbone takes, or a tensor of that many bands."""
        if isinstance(image, Tensor) and image.dtype in (torch.uint8, torch.uint16):
            image = picture(image)
        if isinstance(image, Image.Image):
            return colours(image, self.channels)
        if isinstance(image, Tensor) and image.dtype == torch.uint8:
            if len(image) != self.channels:
                raise DataError(
                    f"an image of {len(image)} bands, and the backbone takes {self.channels}. Choose bands, or load it with "
                    f"in_chans={len(image)}."
                )
            return image
        raise DataError(
            f"expected a PIL image, got {describe(image)}. Open files with PIL.Image.open, arrays with PIL.Image.fromarray; "
            "images of other bands are uint8 tensors (C, H, W). Tensors that are ready for the model need no preprocessing."
        )

    def _centre(self, image: Any) -> Any:
        """The evaluation view: resized so that `crop_pct` of it is (height, width), of which the centre is cut out."""
        height, width = math.floor(self.height / self.crop_pct), math.floor(self.width / self.crop_pct)
        target = [self.height, self.width]
        if self.crop_mode == "squash":
            return TF.center_crop(TF.resize(image, [height, width], self.interpolation, antialias=True), target)
        if self.crop_mode == "center":
            if height == width:
                return TF.center_crop(TF.resize(image, [height], self.interpolation, antialias=True), target)
            return TF.center_crop(self._resize(image, min(*_ratios(image, height, width))), target)
        image = self._resize(image, max(*_ratios(image, height, width)))
        tall, wide = size_of(image)
        missing_x, missing_y = max(0, self.width - wide), max(0, self.height - tall)
        if missing_x or missing_y:
            border = [missing_x // 2, missing_y // 2, (missing_x + 1) // 2, (missing_y + 1) // 2]
            fill: Any = [round(255 * value) for value in self.mean]
            if isinstance(image, Tensor):  # one value for all bands is all that torchvision pads a tensor with
                bands = [TF.pad(band[None], border, fill=value) for band, value in zip(image, fill, strict=True)]
                image = torch.cat(bands)
            else:
                image = TF.pad(image, border, fill=fill if self.channels == 3 else fill[0])
        return TF.center_crop(image, target)

    def _resize(self, image: Any, ratio: float) -> Any:
        """Both sides divided by `ratio`."""
        size = [round(side / ratio) for side in size_of(image)]
        return TF.resize(image, size, self.interpolation, antialias=True)

    def _shifted(self, image: Any) -> Any:
        """A random cut-out of the same size from the image with reflected borders of an eighth of its size."""
        y, x = max(1, self.height // 8), max(1, self.width // 8)
        padded = TF.pad(image, [x, y], padding_mode="reflect")
        top, left = (int(torch.randint(0, 2 * n + 1, ())) for n in (y, x))
        return TF.crop(padded, top, left, self.height, self.width)

    def __repr__(self) -> str:
        own = self.augment.name if self.before is None else repr(self.before)
        steps = "evaluation" if own == "none" else f"training, {own}"
        return (
            f"ImageTransform({self.height} x {self.width}, {steps}, crop {self.crop_pct} {self.crop_mode}, "
            f"{self.interpolation.value}, mean {self.mean}, std {self.std})"
        )


def _ratios(image: Any, height: float, width: float) -> tuple[float, float]:
    """How much larger the image is than that, each side."""
    tall, wide = size_of(image)
    return tall / height, wide / width


def _per_channel(name: str, values: Any, channels: int) -> tuple[float, ...]:
    numbers = tuple(float(v) for v in values)
    if len(numbers) == 3 and channels != 3:  # of colours, which the bands are not: their mean for each
        numbers = (sum(numbers) / 3,) * channels
    if len(numbers) != channels:
        raise ConfigError(f"{name} has {len(numbers)} values; expected {channels}, one for each channel.")
    return numbers
