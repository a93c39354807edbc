"""Random texts and images of the sizes that a language model with eyes reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["with_images"]


def with_images(family: Any, size: int, length: int, words: int, grid: int) -> tuple[Tensor, ...]:
    """Of a `VisionLanguage`: texts of `length` words with an image of grid x grid patches, answers of `words`, and the images."""
    ids, mask, answer = (_plain(family, x) for x in family.example_text(size, length, words))
    seen, count = _images(family, size, grid)
    image = torch.full((size, count), family.image_token)
    half = length // 2
    ids = torch.cat([ids[:, :half], image, ids[:, half:]], dim=1)
    mask = torch.cat([mask[:, :half], torch.ones_like(image), mask[:, half:]], dim=1)
    return ids, mask, answer, *seen


def _images(family: Any, size: int, grid: int) -> tuple[tuple[Tensor, ...], int]:
    """One each, of grid x grid patches where sizes are free; and how many visual tokens it is."""
    vision = family.config.vision_config
    if family.eyes.packed:
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        sizes = torch.tensor([[1, grid, grid]] * size)
        return (torch.randn(size, grid * grid, width), sizes), grid * grid // vision.spatial_merge_size**2
    pixels = torch.randn(size, 1, 3, vision.image_size, vision.image_size)
    places = (vision.image_size // vision.patch_size) ** 2
    if family.model_type == "llava":
        return (pixels,), places + (family.config.vision_feature_select_strategy == "full")
    return (pixels, torch.ones_like(pixels[:, :, 0], dtype=torch.long)), places // family.config.scale_factor**2


def _plain(family: Any, ids: Tensor) -> Tensor:
    """Words without places for images and videos; in a small vocabulary random words soon are some."""
    places = {family.image_token, int(getattr(family.config, "video_token_id", None) or family.image_token)}
    kept = next(word for word in range(5, family.feature_dim) if word not in places)
    for word in places:
        ids = ids.masked_fill(ids.eq(word), kept)
    return ids
