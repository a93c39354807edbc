"""Augmentations by name, between the random crop and the normalisation of a backbone's own preprocessing.

| `augment=` | |
| --- | --- |
| "crop-flip", "crop", "none" | the geometry: the default, nothing mirrored, the view of the evaluation |
| "randaugment", "trivialaugment", "autoaugment", "augmix" | torchvision's policies |
| "rand-m9-mstd0.5-inc1" | timm's policy strings, through its `create_transform` |
| "crop+trivialaugment+erasing-0.5" | several, joined by +; "erasing" (0.25, or its probability) comes last |
| albumentations.Compose([...]) | any function of an image, in front of the evaluation view |

Policies draw from the global generators, as torchvision and timm do; `zoo.fit` seeds them for each item.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zoo.data.images import describe, picture
from zoo.errors import ConfigError, DataError, nearest
from zoo.library import library

__all__ = ["GEOMETRY", "POLICIES", "Augment", "Called", "is_albumentations", "parse"]

GEOMETRY = ("crop-flip", "crop", "none")
POLICIES = {
    "randaugment": "RandAugment",
    "trivialaugment": "TrivialAugmentWide",
    "autoaugment": "AutoAugment",
    "augmix": "AugMix",
}
TIMM = ("original", "originalr", "v0", "v0r", "3a", "3aa")  # its named policies; others begin with "rand-" or "augmix-"
SECTIONS = {"rand": "mstd|mmax|inc|m|n|p", "augmix": "mstd|m|w|d|a|b"}  # of timm's policies, each before a number
TRANSFORMS = "tweights|t3aw|t3a"  # of "rand": sets of operations
ERASING = 0.25
PIL = Callable[[Any], Any]


class Augment:
    """What a name says: `geometry`, policies on the cut-out (PIL image -> PIL image), the probability of `erasing`."""

    def __init__(self, name: str, geometry: str, policies: Sequence[PIL], erasing: float) -> None:
        self.name, self.geometry, self.policies, self.erasing = name, geometry, list(policies), erasing

    def on_image(self, image: Image.Image) -> Image.Image:
        """A cut-out (H, W) -> the same size."""
        for policy in self.policies:
            image = policy(image)
        return image

    def on_tensor(self, values: Tensor) -> Tensor:
        """A normalised tensor (C, H, W) with a random box of it at the mean, with probability `erasing`."""
        if not self.erasing:
            return values
        from torchvision.transforms import RandomErasing

        return RandomErasing(self.erasing)(values)  # type: ignore[no-any-return]


def parse(
    name: str, size: tuple[int, int, int], mean: Sequence[float], std: Sequence[float], interpolation: str = "bilinear"
) -> Augment:
    """The augmentation of a name, for images of this size (C, H, W).

    Raises:
        ConfigError: no such augmentation, a geometry twice, a policy of timm that it cannot read, or other channels than three.
    """
    geometry, policies, erasing = None, [], 0.0
    for part in name.split("+"):
        kind, _, number = part.partition("-")
        if part in GEOMETRY:
            if geometry is not None:
                raise ConfigError(f"augment '{name}' names two geometries, {geometry} and {part}; choose one.")
            geometry = part
        elif kind == "erasing":
            erasing = _probability(number, name)
        elif part in POLICIES:
            from torchvision import transforms

            fill = [round(255 * value) for value in mean]
            bilinear = transforms.InterpolationMode.BILINEAR
            policies.append(getattr(transforms, POLICIES[part])(interpolation=bilinear, fill=fill))
        elif kind in (*TIMM, "rand", "augmix"):
            policies.append(_timm(part, size, mean, std, interpolation))
        else:
            known = [*GEOMETRY, *POLICIES, "erasing", *TIMM, "rand-m9-mstd0.5-inc1", "augmix-m5-w4-d2"]
            raise ConfigError(f"augment '{part}' is unknown. {nearest(part, known)}")
    if policies and size[0] != 3:
        raise ConfigError(f"augment '{name}' changes colours, and the backbone takes images of {size[0]} channels.")
    return Augment(name, geometry or "crop-flip", policies, erasing)


def _probability(number: str, name: str) -> float:
    try:
        found = float(number) if number else ERASING
    except ValueError:
        found = -1.0
    if not 0 < found <= 1:
        raise ConfigError(f"augment '{name}': erasing has a probability above 0 and up to 1, such as erasing-0.25.")
    return found


def _timm(
    policy: str, size: tuple[int, int, int], mean: Sequence[float], std: Sequence[float], interpolation: str
) -> PIL:
    """What timm's `create_transform` puts between its crop and its normalisation."""
    data = library("timm.data", "vision")
    kind, *sections = policy.split("-")
    known = SECTIONS.get(kind, "mstd")
    odd = [part for part in sections if not re.fullmatch(rf"(?:{known})(?:\d+(?:\.\d+)?|inf)|{TRANSFORMS}", part)]
    odd += [part for part in sections if re.fullmatch(TRANSFORMS, part) and kind != "rand"]
    if odd:  # timm passes over sections that it does not know
        raise ConfigError(
            f"timm cannot read the policy '{policy}': no section '{odd[0]}'; those of '{kind}' are {known.replace('|', ', ')}, "
            "each with a number, as in rand-m9-mstd0.5-inc1."
        )
    try:
        _, between, _ = data.create_transform(
            size,
            is_training=True,
            auto_augment=policy,
            interpolation=interpolation if interpolation in ("nearest", "bilinear", "bicubic") else "bilinear",
            mean=tuple(mean),
            std=tuple(std),
            separate=True,
            color_jitter=None,
        )
        with_image: PIL = between
        with_image(Image.new("RGB", (size[2], size[1])))
    except Exception as error:  # assertions, look-ups, conversions: whatever its parser meets first
        raise ConfigError(
            f"timm cannot read the policy '{policy}' ({type(error).__name__}: {error}). It looks like rand-m9-mstd0.5-inc1."
        ) from error
    return with_image


def is_albumentations(function: Any) -> bool:
    """Whether a transform is one of albumentations, which take and give their images by keyword."""
    return any(c.__module__.partition(".")[0] in ("albumentations", "albumentationsx") for c in type(function).__mro__)


class Called:
    """A transform of the user's: a function of an image, or one of albumentations.

    The latter draw from a generator of their own; it is seeded from torch's for each image, so that runs can be repeated.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self.keyword = is_albumentations(function)

    def __call__(self, image: Any) -> Any:
        """What the function makes of an image; of albumentations an array (H, W, C) of floats as a tensor (C, H, W)."""
        if not self.keyword:
            return self.function(image)
        if hasattr(self.function, "set_random_seed"):
            self.function.set_random_seed(int(torch.randint(2**31 - 1, ())))
        found = self.function(image=np.asarray(image) if isinstance(image, Image.Image) else image)["image"]
        if isinstance(found, np.ndarray) and found.dtype.kind == "f" and found.ndim == 3:
            return torch.from_numpy(np.ascontiguousarray(np.moveaxis(found, -1, 0))).float()
        return found

    def image(self, image: Image.Image) -> Any:
        """As called, for what goes on to be cut and normalised: a PIL image or a uint8 tensor.

        Raises:
            DataError: it gives something else.
        """
        found = picture(self(image))
        if isinstance(found, Image.Image) or (isinstance(found, Tensor) and found.dtype == torch.uint8):
            return found
        raise DataError(
            f"augment gives {describe(found)}; expected an image of whole numbers, which is then cut and normalised. A "
            "whole transform, normalisation included, is the data set's: zoo.open_dataset(..., transform=...)."
        )

    def __repr__(self) -> str:
        return f"Called({self.function!r})"
