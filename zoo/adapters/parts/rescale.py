"""Scale and shift of the channels of a projection or norm: what the verb `rescale` takes, written once for its methods."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.engine.memory import recomputable


class Rescale(nn.Module):
    """`y (..., dim) -> scale * y + shift`, channel by channel; `shift` is None if there is none.

    Backward needs the unscaled y (for the gradient of `scale`); the scaled one is recomputed from it instead of kept.
    """

    def __init__(self, dim: int, shift: bool = True, std: float = 0.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))
        self.shift = nn.Parameter(torch.zeros(dim)) if shift else None
        if std:
            nn.init.normal_(self.scale, mean=1.0, std=std)
            if self.shift is not None:
                nn.init.normal_(self.shift, std=std)

    def forward(self, y: Tensor) -> Tensor:
        """(..., dim) -> (..., dim), in the dtype of y."""
        return _rescaled(y, self.scale, self.shift)

    @staticmethod
    def rescale_group(parts: tuple[tuple[nn.Module, int, int], ...], y: Tensor) -> Tensor:
        """Rescale the slices [start, stop) of y in one pass; the channels between them stay as they are, to the bit."""
        ones, zeros, at = y.new_ones(y.shape[-1]), y.new_zeros(y.shape[-1]), 0
        scales: list[Tensor] = []
        shifts: list[Tensor] = []
        for module, start, stop in parts:
            assert isinstance(module, Rescale)
            scales += [ones[at:start].to(module.scale.dtype), module.scale]
            shift = zeros[start:stop].to(module.scale.dtype) if module.shift is None else module.shift
            shifts += [zeros[at:start].to(shift.dtype), shift]
            at = stop
        scale = torch.cat([*scales, ones[at:].to(scales[-1].dtype)])
        if all(module.shift is None for module, _, _ in parts):
            return _rescaled(y, scale, None)
        return _rescaled(y, scale, torch.cat([*shifts, zeros[at:].to(scale.dtype)]))


def _rescaled(y: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    return recomputable(_multiply, y, scale) if shift is None else recomputable(_multiply_add, y, scale, shift)


# In a mixed-precision region y is narrow and scale wide: a scale of 1.003 would be 1 in bfloat16, so the product is
# formed in the wider type and its result narrowed.


def _multiply(y: Tensor, scale: Tensor) -> Tensor:
    return (y * scale).to(y.dtype)


def _multiply_add(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift, y, scale).to(y.dtype)
