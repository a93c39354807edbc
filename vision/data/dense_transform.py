"""Images and their maps to the tensors that a backbone takes: one geometry for both.

Evaluation sees the whole image, resized to the backbone's size whatever its shape (nothing is cut off that would be measured).
Training cuts out a random part (a quarter of the area to all of it) and mirrors it; colours stay. Classes, numbers and directions
are taken from the nearest pixel, never mixed; an edge stays one if any pixel below it was. What is derived of classes is derived
at the size at which it is learnt. A mirrored normal turns its x around.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as TF

from vision.data.masks import DERIVED
from zoo.data.preprocess import RATIO, image_transform
from zoo.errors import ConfigError

__all__ = ["DenseTransform"]

GEOMETRY = ("crop-flip", "crop", "none")
SCALE = (0.25, 1.0)
IGNORE = 255


class DenseTransform:
    """(image, map (H, W) or (H, W, 3)) -> (float tensor (C, h, w), map (h, w) or (3, h, w)).

    Raises:
        ConfigError: an augmentation that would move images away from their maps, or a backbone without an image size.
    """

    def __init__(
        self, config: Mapping[str, Any], kind: str, train: bool, augment: Any = None, derive: str | None = None
    ) -> None:
        name = "crop-flip" if augment is None else augment
        if train and name not in GEOMETRY:
            raise ConfigError(
                f"augment is {augment!r}; of images with maps expected one of {', '.join(GEOMETRY)}: others change images and "
                "leave their maps as they are. A transform of both is the data set's: open_dense(..., transform=...)."
            )
        self.images = image_transform(config)
        self.kind, self.derive = kind, derive
        self.geometry = str(name) if train else "none"

    def __call__(self, image: Any, value: Tensor) -> tuple[Tensor, Tensor]:
        """Both, at the backbone's size."""
        own = self.images
        size = [own.height, own.width]
        image = own._colours(image)
        planes = value.permute(2, 0, 1) if value.ndim == 3 else value[None]
        if self.geometry == "none":
            image = TF.resize(image, size, own.interpolation, antialias=True)
        else:
            top, left, tall, wide = RandomResizedCrop.get_params(image, list(SCALE), list(RATIO))
            image = TF.resized_crop(image, top, left, tall, wide, size, own.interpolation, antialias=True)
            planes = planes[:, top : top + tall, left : left + wide]
        planes = self._resized(planes, size)
        if self.geometry == "crop-flip" and bool(torch.rand(()) < 0.5):
            image, planes = TF.hflip(image), planes.flip(-1)
            if self.kind == "normals":
                planes = planes * torch.tensor([-1.0, 1.0, 1.0])[:, None, None]
        values = image.float() / 255 if isinstance(image, Tensor) else TF.to_tensor(image)
        return TF.normalize(values, list(own.mean), list(own.std)), self._target(planes)

    def whole(self, value: Tensor) -> Tensor:
        """The target of a map that is seen whole."""
        planes = value.permute(2, 0, 1) if value.ndim == 3 else value[None]
        return self._target(self._resized(planes, [self.images.height, self.images.width]))

    def _target(self, planes: Tensor) -> Tensor:
        """What is learnt of a map (C, h, w)."""
        if self.derive is not None:
            classes = planes[0]
            planes = DERIVED[self.derive][1](classes, IGNORE)[None]
            missing: float = IGNORE if planes.dtype == torch.int64 else float("nan")
            planes = planes.masked_fill(classes[None] == IGNORE, missing)
        return (planes if self.kind == "normals" else planes[0]).contiguous()

    def _resized(self, planes: Tensor, size: list[int]) -> Tensor:
        """(C, H, W) at another size."""
        if list(planes.shape[1:]) == size:
            return planes
        if self.kind == "edges" and self.derive is None:
            known = planes.masked_fill(planes == IGNORE, 0).float()
            thick = (
                F.adaptive_max_pool2d(known, size) if planes.shape[1] > size[0] or planes.shape[2] > size[1] else None
            )
            near = self._nearest(planes, size)
            return near if thick is None else torch.where(thick > 0, torch.ones_like(near), near)
        return self._nearest(planes, size)

    def _nearest(self, planes: Tensor, size: list[int]) -> Tensor:
        return TF.resize(planes, size, InterpolationMode.NEAREST_EXACT)

    def __repr__(self) -> str:
        return f"DenseTransform({self.kind}, {self.geometry}, {self.derive}, {self.images!r})"
