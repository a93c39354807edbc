"""How good images are, without a reference: scores of pyiqa where it is installed, and a light one of our own.

Every score comes out on one scale: 0 is worst and 1 is best, whatever its own sign and range are.

| name        | its own scale | better is | from                                                                          |
| ----------- | ------------- | --------- | ----------------------------------------------------------------------------- |
| `sharpness` | 0..1          | higher    | here: what an image loses by blurring (Crete et al. 2007)                     |
| `cnniqa`    | 0..1          | higher    | pyiqa: a small network (Kang et al. 2014), trained on KonIQ-10k               |
| `brisque`   | 0..100        | lower     | pyiqa: statistics of natural scenes (Mittal et al. 2012); 1 - score / 100     |
| `piqe`      | 0..100        | lower     | pyiqa: distortions of blocks (Venkatanath et al. 2015); 1 - score / 100       |

What a score gives beyond its scale (brisque goes on to 150 and below 0) is cut off.

    sharpness = min over both axes of  sum max(0, |dF| - |dB|) / sum |dF|

F (H, W) is the image in grey, B its mean over 5 pixels along the axis, d the difference of neighbours along it. A sharp
image loses most of its variation by the blurring; one that was blurred already, or enlarged, keeps it. The ratio does not
depend on brightness and contrast. An image without any variation has no quality: NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ContextError, MissingPackageError

__all__ = ["SCORES", "Score", "grey", "sharpness"]

WINDOW = 5  # pixels of the mean: of 3, 5 and 9 the one that told faces of a quarter of the size apart best
SMALLEST = 4  # pixels of a side
GREY = (0.299, 0.587, 0.114)  # of red, green and blue
FLAT = 1e-6  # mean difference of neighbours below which there is nothing to see; a step of 8 bits is 4e-3


def grey(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W): luminance of three channels, the mean of others."""
    if images.shape[1] != len(GREY):
        return images.mean(dim=1)
    return (images * images.new_tensor(GREY).view(1, -1, 1, 1)).sum(dim=1)


def sharpness(images: Tensor) -> Tensor:
    """(B, C, H, W) in float32 -> (B,); NaN where nothing varies."""
    image = grey(images)
    return torch.stack([_kept(image), _kept(image.transpose(1, 2))]).amin(dim=0).nan_to_num(posinf=float("nan"))


def _kept(image: Tensor) -> Tensor:
    """(B, H, W) -> (B,): the share of the variation along the rows that blurring takes away; infinite where there is none."""
    blurred = F.avg_pool1d(F.pad(image, (WINDOW // 2, WINDOW // 2), mode="replicate"), WINDOW, stride=1)
    own, left = image.diff(dim=-1).abs(), blurred.diff(dim=-1).abs()
    total = own.sum(dim=(1, 2))
    lost = (own - left).clamp(min=0).sum(dim=(1, 2))
    varies = total > FLAT * own.shape[1:].numel()
    return torch.where(varies, lost / total.where(varies, torch.ones_like(total)), torch.full_like(total, float("inf")))


@dataclass(frozen=True)
class Score:
    """One score. `own` measures images (B, C, H, W) in 0..1; None: it is one of pyiqa's."""

    name: str
    worst: float
    best: float
    own: Callable[[Tensor], Tensor] | None = None

    def __call__(self, images: Tensor, kept: dict[str, Any]) -> Tensor:
        """Images (B, C, H, W) in 0..1 -> (B,) from 0 (worst) to 1 (best), NaN where there is none; no gradient.

        Args:
            kept: where a network of pyiqa's stays between two calls.

        Raises:
            MissingPackageError: pyiqa is not installed. ContextError: it cannot measure these.
        """
        if min(images.shape[-2:]) < SMALLEST:
            raise ContextError(
                f"'{self.name}' measures images of {SMALLEST} x {SMALLEST} pixels or more; these have {images.shape[-2]} x "
                f"{images.shape[-1]}."
            )
        measured = self._pyiqa(images, kept) if self.own is None else self.own(images)
        return ((measured - self.worst) / (self.best - self.worst)).clamp(0, 1)

    def _pyiqa(self, images: Tensor, kept: dict[str, Any]) -> Tensor:
        metric = kept.get(self.name)
        if metric is None:
            metric = kept[self.name] = self._made()
        metric = metric.to(images.device)
        given = images.clamp(0, 1)
        given = given.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1) if given.shape[1] != 3 else given
        try:
            with torch.no_grad():
                found = [metric(image[None]).reshape(-1) for image in given]  # some measure a batch by its first image
        except Exception as error:  # somebody else's code, on images that it may not be made for
            told = next(iter(str(error).splitlines()), "")[:200]
            raise ContextError(
                f"pyiqa's '{self.name}' does not measure images {tuple(images.shape[1:])} ({type(error).__name__}: {told}). "
                "Use quality='sharpness', or give the quality yourself (quality='given')."
            ) from error
        return torch.cat(found).to(images)

    def _made(self) -> Any:
        try:
            import pyiqa
        except ImportError as error:
            raise MissingPackageError(
                f"the quality '{self.name}' is one of pyiqa's, which cannot be imported ({error}): pip install pyiqa, or use "
                "quality='sharpness'."
            ) from error
        try:
            metric = pyiqa.create_metric(self.name, device=torch.device("cpu"))
        except Exception as error:
            told = next(iter(str(error).splitlines()), "")[:200]
            raise ContextError(
                f"pyiqa could not make '{self.name}' ({type(error).__name__}: {told}). It fetches weights when it is first "
                "used: check the network, or use quality='sharpness'."
            ) from error
        if bool(metric.lower_better) != (self.best < self.worst):
            raise ContextError(
                f"pyiqa says that {'lower' if metric.lower_better else 'higher'} is better for '{self.name}', and here the "
                "contrary is known. Measure it yourself, and give it (quality='given')."
            )
        return metric


SCORES = {
    "sharpness": Score("sharpness", 0.0, 1.0, sharpness),
    "cnniqa": Score("cnniqa", 0.0, 1.0),
    "brisque": Score("brisque", 100.0, 0.0),
    "piqe": Score("piqe", 100.0, 0.0),
}
