"""Convolutions over the patches of a sequence of tokens, or of a map: where the patches stand, how a convolution gets them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zoo import Points
from zoo.errors import AttachError
from zoo.points.layout import Layout

__all__ = ["Patches", "patches_at"]


class Patches:
    """`grid` (H, W) of patches, which come last in a sequence, behind `prefix` other tokens; `where` names them in errors."""

    def __init__(self, method: str, where: str, grid: tuple[int, int], prefix: int) -> None:
        self.method, self.where, self.grid, self.prefix = method, where, grid, prefix

    def convolve(self, tokens: Tensor, conv: Callable[[Tensor], Tensor], front: Callable[[Tensor], Tensor]) -> Tensor:
        """`conv` (B, c, H, W) over the patches and `front` (B, n, c) over the tokens in front; tokens (B, N, c) or (B, H, W, c).

        Raises:
            AttachError: another number of tokens.
        """
        if tokens.dim() == 4:
            return conv(tokens.movedim(-1, 1)).movedim(1, -1)
        if tokens.shape[1] != self.prefix + self.grid[0] * self.grid[1]:
            raise AttachError(
                f"'{self.method}' at '{self.where}' got {tokens.shape[1]} tokens and expects {self.prefix} + {self.grid[0]} x "
                f"{self.grid[1]}: an image of another size, or another adapter that puts tokens in or takes some out. Switch "
                "that off, or load the backbone for this size."
            )
        alone, patches = tokens[:, : self.prefix], tokens[:, self.prefix :]
        patches = conv(patches.transpose(1, 2).unflatten(2, self.grid)).flatten(2).transpose(1, 2)
        return torch.cat([front(alone), patches], dim=1) if self.prefix else patches


def patches_at(points: Points, method: str, name: str, layout: Layout | None) -> Patches:
    """The patches at a point.

    Raises:
        AttachError: they are no grid of two axes, or it is not described how they stand.
    """
    if layout is not None and len(layout.grid) == 2:
        return Patches(method, name, (layout.grid[0], layout.grid[1]), layout.prefix)
    known = "is not described" if layout is None else "depends on the input" if not layout.grid else "is another one"
    raise AttachError(
        f"'{method}' needs the patches row by row in a grid of two axes, and the order of the tokens of {points.backbone} at "
        f"'{name}' {known}. Name other targets, or use a backbone of images of one size, such as a ViT or Swin."
    )
