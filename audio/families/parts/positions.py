"""Positions of AST's patches: the grid, and a pretrained table fitted to another one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ConfigError

BODY = "audio_spectrogram_transformer"
GEOMETRY = ("max_length", "num_mel_bins", "frequency_stride", "time_stride")


def grid(config: Any) -> tuple[int, int]:
    """(f, t) patches of a configuration."""
    found = []
    for length, stride in (("num_mel_bins", "frequency_stride"), ("max_length", "time_stride")):
        size, step = getattr(config, length), getattr(config, stride)
        if step < 1 or size < config.patch_size:
            raise ConfigError(
                f"{length} is {size} and {stride} {step}; expected at least one patch of {config.patch_size} and a step of 1."
            )
        found.append((size - config.patch_size) // step + 1)
    return found[0], found[1]


def resize_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """The table of positions (1, 2 + f t, d) for another grid, as the authors do it: first the time, then the frequency.

    CLS and DIST keep theirs. An axis that gets shorter is cut out of the middle (the spacing of what is left stays), one that
    gets longer is interpolated.
    """
    found = table[:, 2:].unflatten(1, old).permute(0, 3, 1, 2)
    for axis, size in ((3, new[1]), (2, new[0])):
        had = found.shape[axis]
        if size <= had:
            found = found.narrow(axis, had // 2 - size // 2, size)
        else:
            shape = (found.shape[2], size) if axis == 3 else (size, found.shape[3])
            found = F.interpolate(found, size=shape, mode="bilinear")
    return torch.cat([table[:, :2], found.flatten(2).transpose(1, 2)], dim=1)


def refit(module: Any, **geometry: int) -> None:
    """Give a built AST another length, number of bands or strides, in place."""
    config = module.config
    if not geometry:
        return
    old = grid(config)
    for key, value in geometry.items():
        setattr(config, key, value)
    new = grid(config)
    embeddings = module.get_submodule(BODY).embeddings
    embeddings.patch_embeddings.projection.stride = (config.frequency_stride, config.time_stride)
    if new != old:
        table = embeddings.position_embeddings.data
        embeddings.position_embeddings = nn.Parameter(
            resize_positions(table.float(), old, new).to(table.dtype).contiguous()
        )
