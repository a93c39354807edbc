"""How the tokens at a point are laid out."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """Tokens as [prefix | places], the places row by row.

    Args:
        prefix: class, register and other tokens in front.
        grid: places along each axis: (H, W) of patches, (T, H, W) of a clip's, (F, T) of a spectrogram, (L,) of a text; () where
            the input says it.
        window: (h, w) of the windows in which tokens see each other; None: all see all, but what a mask hides.
        shift: by how many places the windows are moved.
        causal: a token sees itself and those in front of it.
    """

    prefix: int = 0
    grid: tuple[int, ...] = ()
    window: tuple[int, int] | None = None
    shift: tuple[int, int] = (0, 0)
    causal: bool = False
