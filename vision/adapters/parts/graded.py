"""How much of a change each image gets, by its quality: what `petalface` makes once in front of each forward pass.

a = 1/2 + gain (quality - threshold)         (B,), the share of the branch of good images
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vision.adapters.parts.quality import Score
from zoo.errors import ContextError

__all__ = ["Mixing"]

Moments = tuple[tuple[float, ...], tuple[float, ...]]


class Mixing(nn.Module):
    """The share a (B,) of the branch of good images, from a quality that is given (B,), or from images (B, C, H, W)."""

    def __init__(
        self, score: Score | None, moments: Moments | None, threshold: float | None, gain: float, unknown: str
    ) -> None:
        super().__init__()
        self.score, self.moments, self.threshold, self.gain, self.unknown = score, moments, threshold, gain, unknown
        self.kept: dict[str, Any] = {}  # networks of pyiqa's are no parts of the model

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes its own."""
        return {**self.__dict__, "kept": {}}

    def forward(self, quality: Tensor | None, images: Tensor | None = None) -> Tensor:
        """a (B,)."""
        if self.threshold is None:
            raise ContextError(
                "'petalface' has threshold=None, which a calibration chooses: train with zoo.fit, call "
                "adapter.calibrate(model, batches), or name a number."
            )
        found = self.quality(quality, images)
        known = found.isfinite()
        if not torch.compiler.is_compiling():
            self._check(found, known)
        middle = torch.full_like(found, float("nan") if self.unknown == "refuse" else 0.5)
        return torch.where(known, 0.5 + self.gain * (found - self.threshold), middle)

    @torch.no_grad()
    def quality(self, quality: Tensor | None, images: Tensor | None) -> Tensor:
        """(B,) from 0 to 1; NaN where there is none."""
        if quality is not None:
            return quality.detach() if quality.dtype == torch.float64 else quality.detach().float()
        if images is None or self.score is None:
            raise ContextError(
                "'petalface' with quality='given' needs the quality of each image: model(x, context={'quality': ...})."
            )
        if images.dim() != 4 or not images.is_floating_point():
            raise ContextError(
                f"'petalface' measures the quality of images (B, C, H, W), and the model was called with {tuple(images.shape)} "
                f"({str(images.dtype)[6:]}). Give it: quality='given', model(x, context={{'quality': ...}})."
            )
        pixels = images.detach().float()
        if self.moments is not None and len(self.moments[0]) == pixels.shape[1]:
            mean, std = (pixels.new_tensor(m).view(1, -1, 1, 1) for m in self.moments)
            pixels = pixels * std + mean
        return self.score(pixels, self.kept)

    def _check(self, found: Tensor, known: Tensor) -> None:
        """Raise ContextError for a quality that is none, or of another scale."""
        if found.dim() != 1:
            raise ContextError(f"a quality is {tuple(found.shape[1:])} numbers for each image; expected one.")
        if found.device.type == "meta":
            return
        if self.unknown == "refuse" and not known.all():
            which = [int(i) for i in (~known).nonzero().flatten()[:5]]
            raise ContextError(
                f"{int((~known).sum())} of {len(found)} images have no quality (in the batch: "
                f"{', '.join(map(str, which))}): they are of one colour, or the quality given is no number. Take them out, "
                "give it (context={'quality': ...}), or let them be mixed half and half: zoo.adapter('petalface', "
                "unknown='middle')."
            )
        if bool(((found < 0) | (found > 1)).any()):
            wrong = float(found[(found < 0) | (found > 1)][0])
            raise ContextError(f"a quality is {wrong:g}; expected numbers from 0 (worst) to 1 (best).")
