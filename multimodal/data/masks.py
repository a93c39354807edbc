"""Masks of videos: brought to the size of latents, made wider, and varied for training.

A mask is (..., F, 1, H, W), 1 where something is to be filled in. An autoencoder makes one latent frame of the first frame and
one of each `ratio` that follow; a latent is masked if any pixel of its frames and its square is (`latent_mask`), so nothing of
what is hidden can be taken for background.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ConfigError, DataError

__all__ = ["KINDS", "check_mask", "dilated", "hidden", "jitter", "latent_mask"]

# How likely each kind of variation is, as VideoPainter's scripts have it
KINDS = {"brush": 0.4, "rectangle": 0.1, "ellipse": 0.1, "circle": 0.1, "strokes": 0.3}


def check_mask(mask: Tensor, clip: Tensor) -> None:
    """Raise DataError unless masks (B, F, 1, H, W) belong to clips (B, F, C, H, W), and each marks something.

    Raises:
        DataError: another size, other values than 0 to 1, or an empty mask.
    """
    expected = (*clip.shape[:2], 1, *clip.shape[3:])
    if clip.ndim != 5 or tuple(mask.shape) != expected:
        raise DataError(
            f"masks are {tuple(mask.shape)} for clips {tuple(clip.shape)}; expected {expected}: one channel for "
            "each frame, of its height and width."
        )
    if mask.numel() and not (float(mask.min()) >= 0 and float(mask.max()) <= 1):
        raise DataError(
            f"a mask holds numbers from {float(mask.min()):g} to {float(mask.max()):g}; expected 0 (known) to 1."
        )
    empty = (mask.flatten(1) > 0).any(dim=1).logical_not().nonzero()
    if len(empty):
        raise DataError(
            f"the mask of clip {int(empty[0])} of the batch marks nothing: there is nothing to be filled in. Leave the clip out."
        )


def hidden(clip: Tensor, mask: Tensor, fill: float = -1.0) -> Tensor:
    """Clips (..., F, C, H, W) with what is masked replaced by `fill` (-1: black)."""
    return clip * (1 - mask.to(clip)) + fill * mask.to(clip)


def latent_mask(mask: Tensor, size: tuple[int, int, int], ratio: int, how: str = "any") -> Tensor:
    """(B, F, 1, H, W) -> (B, f, 1, h, w), `size` = (f, h, w) of latents, `ratio` frames in each but the first.

    `how`: "any" as above; "nearest": the authors' way, one pixel of one frame for each latent.

    Raises:
        ConfigError: another `how`. DataError: f frames of latents are not made of F frames.
    """
    frames = mask.shape[1]
    if how == "nearest":
        return F.interpolate(mask.float().transpose(1, 2), size=size).transpose(1, 2)
    if how != "any":
        raise ConfigError(f"how is {how!r}; expected 'any' or 'nearest'.")
    if frames != (size[0] - 1) * ratio + 1:
        raise DataError(
            f"a mask of {frames} frames cannot belong to {size[0]} latent frames of {ratio}; expected "
            f"{(size[0] - 1) * ratio + 1}."
        )
    whole = torch.cat([mask[:, :1]] * (ratio - 1) + [mask], dim=1)
    grouped = whole.unflatten(1, (size[0], ratio)).amax(dim=2)
    return F.adaptive_max_pool2d(grouped.float().flatten(0, 1), size[1:]).unflatten(0, (len(mask), size[0]))


def dilated(mask: Tensor, pixels: int) -> Tensor:
    """(..., H, W) with everything nearer than `pixels` / 2 along both sides marked, too; 0: as it is.

    Raises:
        ConfigError: a number below 0.
    """
    if pixels < 0:
        raise ConfigError(f"a mask cannot be made wider by {pixels} pixels; expected 0 or more.")
    return _grown(mask, pixels) if pixels else mask


def _grown(mask: Tensor, pixels: int) -> Tensor:
    flat = mask.float().reshape(-1, 1, *mask.shape[-2:])
    before = pixels // 2
    padded = F.pad(flat, (before, pixels - 1 - before, before, pixels - 1 - before))
    return F.max_pool2d(padded, pixels, 1).reshape(mask.shape).to(mask.dtype)


def _shrunk(mask: Tensor, pixels: int) -> Tensor:
    return 1 - _grown(1 - mask, pixels)


def jitter(mask: Tensor, generator: torch.Generator | None = None, kind: str | None = None, size: int = 0) -> Tensor:
    """A variation of one video's mask (F, 1, H, W), of one kind for all of its frames.

    "brush": closed, opened, dilated or smoothed by a square of `size` pixels (by default a fifteenth of the frame's height, 32 of
    480); "rectangle" (turned), "ellipse", "circle": around the box of the first frame that has a mask, its sides moved by up to a
    tenth of the frame and scaled by 1.1 to 1.5, in every frame; "strokes": thick random lines, in every frame. `kind`: None draws
    one (`KINDS`). What would leave nothing, or no pixel of the frame free, gives the mask as it is.

    Raises:
        ConfigError: another kind.
    """
    if kind is None:
        drawn = torch.multinomial(torch.tensor(list(KINDS.values())), 1, generator=generator)
        kind = list(KINDS)[int(drawn)]
    if kind not in KINDS:
        raise ConfigError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}.")
    height, width = mask.shape[-2:]
    if kind == "brush":
        made = _brushed(mask, size or max(height // 15, 2), generator)
    else:
        shape = _strokes(height, width, generator) if kind == "strokes" else _shape(mask, kind, generator)
        made = mask if shape is None else shape.to(mask).expand_as(mask).clone()
    return made if bool(made.any()) and not bool(made.bool().all()) else mask


def _draw(low: float, high: float, generator: torch.Generator | None) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _brushed(mask: Tensor, size: int, generator: torch.Generator | None) -> Tensor:
    way = int(torch.randint(4, (), generator=generator))
    closed = _shrunk(_grown(mask, size), size)
    opened = _grown(_shrunk(mask, size), size)
    return (closed, opened, _grown(mask, size), _shrunk(_grown(opened, size), size))[way]


def _places(height: int, width: int) -> tuple[Tensor, Tensor]:
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return rows, columns


def _shape(mask: Tensor, kind: str, generator: torch.Generator | None) -> Tensor | None:
    marked = (mask > 0).flatten(1).any(dim=1).nonzero()
    if not len(marked):
        return None
    height, width = mask.shape[-2:]
    there = (mask[int(marked[0]), 0] > 0).nonzero()
    (top, left), (bottom, right) = there.min(0).values.tolist(), (there.max(0).values + 1).tolist()
    margin = min(height, width) / 10
    top, left = (max(0.0, v - _draw(0, margin, generator)) for v in (top, left))
    bottom, right = min(height, bottom + _draw(0, margin, generator)), min(width, right + _draw(0, margin, generator))
    rows, columns = _places(height, width)
    y, x = rows - (top + bottom) / 2, columns - (left + right) / 2
    if kind == "circle":
        return (x**2 + y**2).sqrt() <= max(bottom - top, right - left) / 2 * _draw(1.1, 1.5, generator)
    angle = math.radians(_draw(0, 360, generator))
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    half = (right - left) / 2 * _draw(1.1, 1.5, generator), (bottom - top) / 2 * _draw(1.1, 1.5, generator)
    if kind == "rectangle":
        return (along.abs() <= half[0]) & (across.abs() <= half[1])
    return (along / half[0]) ** 2 + (across / half[1]) ** 2 <= 1


def _strokes(height: int, width: int, generator: torch.Generator | None) -> Tensor:
    """One to four zigzags, of lines about a quarter of the frame's height wide and an eighth of its diagonal long."""
    rows, columns = _places(height, width)
    found = torch.zeros(height, width, dtype=torch.bool)
    reach = math.hypot(height, width) / 8
    for _ in range(int(torch.randint(1, 5, (), generator=generator))):
        y, x = _draw(0, height, generator), _draw(0, width, generator)
        thick = _draw(height / 8, height / 4, generator)
        for turn in range(int(torch.randint(1, 8, (), generator=generator))):
            angle = _draw(0.27, 0.53, generator) * math.pi * (1 if turn % 2 else -1)
            step = reach * _draw(0, 2, generator)
            ends = y, x
            y = min(max(y + step * math.sin(angle), 0), height)
            x = min(max(x + step * math.cos(angle), 0), width)
            dy, dx = y - ends[0], x - ends[1]
            part = ((rows - ends[0]) * dy + (columns - ends[1]) * dx) / max(dy**2 + dx**2, 1e-6)
            near = (rows - ends[0] - part.clamp(0, 1) * dy) ** 2 + (columns - ends[1] - part.clamp(0, 1) * dx) ** 2
            found |= near.sqrt() <= thick / 2
    return found
