"""Families of several classes of diffusers that make videos: see `multimodal.families.diffusion.described`."""

from __future__ import annotations

from typing import Any

from multimodal.families.diffusion.described import DescribedBackbone
from multimodal.families.diffusion.video import VideoBackbone


class DescribedVideo(DescribedBackbone, VideoBackbone):
    """A family of several classes that make videos: latents (B, C, F, H, W), clips of data (B, F, 3, H, W)."""

    @property
    def stream(self) -> tuple[str, ...]:  # type: ignore[override]
        """The lists of blocks in which tokens of the video stand sample by sample, or frame by frame."""
        return tuple(b.path for b in self.member.blocks if "." not in b.path and not b.path.startswith("temporal"))

    @property
    def shape(self) -> dict[str, Any]:
        """As they were given, or the checkpoints have them."""
        return {"pixels": self._pixels, "frames": self._frames}

    @property
    def patch_sizes(self) -> tuple[int, int]:
        """As `patches`."""
        return self.patches

    @property
    def condition_names(self) -> tuple[str, ...]:
        """The time and the conditions, but for latents."""
        return ("timestep", *(i.name for i in self.given() if i.kind != "latents"))

    @property
    def frame_patch(self) -> int:
        """Latent frames in one patch."""
        return self.patches[0]

    @property
    def clip_frames(self) -> int:
        """Frames of pixels, as the checkpoints were trained or `frames=` says."""
        return self._frames

    @property
    def frame_ratio(self) -> int:
        """Frames of pixels in a latent frame."""
        return self.member.frame_ratio
