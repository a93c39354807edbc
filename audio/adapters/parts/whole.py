"""What reads several tokens of a sequence at once stands only where each may see all."""

from __future__ import annotations

from zoo import Points, SublayerPoint
from zoo.errors import AttachError

__all__ = ["check_whole"]


def check_whole(points: Points, point: SublayerPoint, does: str, instead: str) -> None:
    """Raise AttachError unless it is known of a sublayer's tokens that each may see all others.

    `does` says who does what with the tokens, `instead` what treats each token alone.
    """
    if point.layout is None or point.layout.causal:
        why = "how its tokens are laid out is not described" if point.layout is None else "its tokens are causal"
        raise AttachError(
            f"{does}, and at '{point.name}' of {points.backbone} that may not be: {why}. Leave the point out of its targets, or "
            f"use {instead}, which treats each token alone."
        )
