"""Pixels of images for a model that generates them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.data.preprocess import image_transform


class Pixels:
    """PIL image -> (3, H, W) in [-1, 1]: resized and cut to the centre; `flip`: mirrored with probability one half."""

    def __init__(self, config: Mapping[str, Any], flip: bool) -> None:
        self.view = image_transform(config)
        self.flip = flip

    def __call__(self, image: Any) -> Tensor:
        """Raises DataError for what is no image."""
        pixels = self.view(image)
        return pixels.flip(-1) if self.flip and bool(torch.rand(()) < 0.5) else pixels
