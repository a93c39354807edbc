"""From pixels to visual input: grid features of any image backbone of the zoo.

The features of cell (i, j) of an h x w grid are the token of that place behind the last block; its box, in shares of the image:

    b = (j / w, i / h, (j + 1) / w, (i + 1) / h)        tokens row by row, i first

Class and register tokens are left out. `pool=(h', w')` makes the grid coarser by adaptive pooling (VL-Adapter: the maximum, 7 x 7
to 6 x 6, and boxes of zeros, which is `boxes=None` for the network).

    front = GridFeatures(zoo.load("clip-vit-b16"))
    features, boxes = front(["dog.jpg", "cat.jpg"])         (2, 196, 768), (2, 196, 4)
    model = zoo.load("vl-t5", "lora", feat_dim=front.dim)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from zoo.data.images import colours, decode
from zoo.errors import ConfigError, DataError

if TYPE_CHECKING:
    from zoo.host import Host

POOLS: dict[str, Any] = {"max": F.adaptive_max_pool2d, "mean": F.adaptive_avg_pool2d}


def grid_boxes(height: int, width: int) -> Tensor:
    """(h w, 4), (x1, y1, x2, y2) of the cells, row by row, each in [0, 1]."""
    top = torch.arange(height).repeat_interleave(width)
    left = torch.arange(width).repeat(height)
    size = torch.tensor([width, height, width, height])
    return torch.stack([left, top, left + 1, top + 1], dim=1) / size


class GridFeatures:
    """Images to (features, boxes), with a frozen image backbone.

    Args:
        model: a `zoo.Model` that takes images; its active adapters take part.
        pool: (height, width) of the coarser grid; None keeps the backbone's own.
        reduce: "max" or "mean", how cells are pooled.
        grid: (height, width) of the backbone's own grid, where its tokens are not a square.

    Raises:
        ConfigError: a model without blocks for images, or an unknown `reduce`.
    """

    def __init__(
        self,
        model: Host,
        pool: tuple[int, int] | None = None,
        reduce: str = "max",
        grid: tuple[int, int] | None = None,
    ) -> None:
        if reduce not in POOLS:
            raise ConfigError(f"reduce is '{reduce}'; expected one of {', '.join(POOLS)}.")
        blocks = [p for p in model.points if p.kind == "block" and p.tower in ("", "image")]
        if "image" not in model.family.modality or not blocks:
            raise ConfigError(
                f"'{model.backbone_name}' has no blocks that take images; pass an image backbone: zoo.load('vit-micro')."
            )
        self.model, self.pool, self.reduce, self.grid = model, pool, reduce, grid
        self._last = blocks[-1]
        tokens = model.points.select(kind="tokens") if "tokens" in model.points.kinds else []
        prefixes = [p.num_prefix for p in tokens if p.tower == self._last.tower]
        self._prefix = prefixes[-1] if prefixes else 0

    @property
    def dim(self) -> int:
        """Width of the features."""
        return int(self._last.dim_out)

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """Preprocessed images (B, 3, H, W) -> the grid behind the last block (B, h, w, d).

        Raises:
            ConfigError: the tokens make no square, and `grid` does not say what they are.
        """
        found: list[Tensor] = []
        with self._listening(found):
            self.model.features(images.to(self.model.device, self.model.dtype))
        grid = found[-1]
        if grid.ndim == 4:
            return grid
        rows = grid[:, self._prefix :]
        if self.grid is not None:
            height, width = self.grid
            rows = rows[:, max(0, rows.shape[1] - height * width) :]  # behind prompts that adapters have put in
        else:
            height = width = round(rows.shape[1] ** 0.5)
        if rows.shape[1] != height * width:
            raise ConfigError(
                f"'{self.model.backbone_name}' gives {rows.shape[1]} tokens, which is no {height} x {width} grid; say what it "
                "is: grid=(height, width)."
            )
        return rows.unflatten(1, (height, width))

    @contextmanager
    def _listening(self, found: list[Tensor]) -> Iterator[None]:
        """The output of the last block, with the model in evaluation mode."""

        def catch(module: Any, inputs: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)

        handle = self._last.module.register_forward_hook(catch)
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            handle.remove()
            self.model.train(training)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Preprocessed images (B, 3, H, W) -> features (B, h w, d) and boxes (B, h w, 4), float32, on the CPU."""
        grid = self.tokens(images).float()
        if self.pool is not None:
            grid = POOLS[self.reduce](grid.permute(0, 3, 1, 2), self.pool).permute(0, 2, 3, 1)
        boxes = grid_boxes(grid.shape[1], grid.shape[2])
        return grid.flatten(1, 2).cpu(), boxes.expand(len(grid), -1, -1)

    def __call__(self, images: Sequence[Any], batch_size: int = 64) -> tuple[Tensor, Tensor]:
        """PIL images, paths or encoded bytes -> features (B, h w, d) and boxes (B, h w, 4).

        Raises:
            DataError: an image that cannot be read; the message names it.
        """
        transform = self.model.preprocess(train=False)
        parts = []
        for start in range(0, len(images), batch_size):
            chosen = images[start : start + batch_size]
            ready = [transform(opened(image, f"image {start + i}")) for i, image in enumerate(chosen)]
            parts.append(self.features(torch.stack(ready)))
        if not parts:
            raise DataError("There are no images to make features of.")
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def opened(image: Any, where: str) -> Image.Image:
    """A PIL image, encoded bytes or a path as an RGB image; DataError names `where`, or the path."""
    if isinstance(image, Image.Image):
        return colours(image)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return decode(image, where)
    if not isinstance(image, (str, Path)):
        raise DataError(
            f"{where}: the image is of the type {type(image).__name__}; expected a PIL image, a path or encoded bytes. Pixels "
            "(height, width, 3) from 0 to 255 become one by PIL.Image.fromarray."
        )
    try:
        return decode(Path(image).read_bytes(), str(image))
    except OSError as error:
        raise DataError(f"{image}: cannot be read ({error.strerror}).") from error
