"""Small images with maps: a bright and a dark half, whose border is the edge."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import zoo

SMALL: dict[str, dict[str, Any]] = {
    "vit": {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
    "swin": {
        "img_size": 32,
        "patch_size": 4,
        "window_size": 4,
        "embed_dim": 8,
        "depths": (1, 1),
        "num_heads": (1, 2),
    },
}
NAMES = {"vit": "vit-s16", "swin": "swin-t"}


def pairs(count: int = 8, seed: int = 0, size: tuple[int, int] = (24, 32)) -> list[tuple[Image.Image, Image.Image]]:
    """(image, map of classes 0 and 1, the first row of no class)."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        at = int(random.integers(8, size[1] - 8))
        mask = np.zeros(size, dtype=np.uint8)
        mask[:, at:] = 1
        pixels = (60 + 130 * mask + random.integers(0, 20, size)).astype(np.uint8)
        mask[0] = 255
        found.append((Image.fromarray(np.stack([pixels] * 3, -1)), Image.fromarray(mask)))
    return found


def encoded(image: Image.Image) -> bytes:
    """As PNG."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def folder(place: Path, count: int = 6, seed: int = 0, maps: str = "masks") -> Path:
    """`images/` and `masks/`, with names of the classes."""
    for name in ("images", maps):
        (place / name).mkdir(parents=True, exist_ok=True)
    for i, (image, mask) in enumerate(pairs(count, seed)):
        image.save(place / "images" / f"{i:02d}.jpg")
        mask.save(place / maps / f"{i:02d}.png")
    (place / "classes.json").write_text(json.dumps(["dark", "bright"]))
    return place


def dense_model(family: str = "swin", adapter: Any = "lora", outputs: int = 2, seed: int = 0, **options: Any) -> Any:
    """A small random backbone with a decoder of maps."""
    given = {"num_classes": outputs, "head": "dense" if outputs else None, **options}
    return zoo.load(NAMES[family], adapter, pretrained=False, seed=seed, **SMALL[family], **given)


def images(family: str = "swin", count: int = 2) -> torch.Tensor:
    """A batch of noise."""
    side = SMALL[family]["img_size"]
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))
