"""How close a filled-in video is to the original, where it was masked and where it was not.

    psnr = -10 log10 (mean over the region's pixels of |x - y|^2)                  pixels in [0, 1]
    ssim = mean over the region of the map of Wang et al. (2004): windows of 11 x 11, a Gaussian of 1.5, C1 = 0.01^2, C2 = 0.03^2
    lpips: of frames in which everything outside of the region is the original, so that it tells of the region alone

VideoPainter's tables give them of the region that was not masked: what should have stayed as it was.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import DataError, MissingPackageError

__all__ = ["compare", "lpips_of", "psnr", "ssim", "ssim_map"]

SIDE, SIGMA, C1, C2 = 11, 1.5, 0.01**2, 0.03**2
SLACK = 1e-2  # by which what an autoencoder makes may lie outside


def psnr(made: Tensor, original: Tensor, region: Tensor | None = None) -> float:
    """Of frames (F, C, H, W) in [0, 1]; `region` (F, 1, H, W), above 0.5 where it counts. Infinite if nothing differs.

    Raises:
        DataError: other shapes, numbers outside of [0, 1], or an empty region.
    """
    weight = _region(made, original, region)
    error = float(((made - original).double().square() * weight).sum() / (weight.sum() * made.shape[1]))
    return float("inf") if error == 0 else float(-10 * torch.tensor(error).log10())


def ssim_map(made: Tensor, original: Tensor) -> Tensor:
    """(F, C, H, W), in [-1, 1]; at the border the window is what lies inside.

    Raises:
        DataError: frames smaller than the window.
    """
    if min(made.shape[-2:]) < SIDE:
        raise DataError(f"frames are {made.shape[-2]} x {made.shape[-1]}; structural similarity needs {SIDE} x {SIDE}.")
    x, y = made.double(), original.double()
    line = torch.exp(-((torch.arange(SIDE, dtype=torch.float64) - SIDE // 2) ** 2) / (2 * SIGMA**2))
    kernel = (line[:, None] * line[None, :] / line.sum() ** 2).to(x.device)[None, None]

    def smooth(t: Tensor) -> Tensor:
        flat = t.reshape(-1, 1, *t.shape[-2:])
        return (F.conv2d(flat, kernel, padding=SIDE // 2) / share).reshape(t.shape)

    share = F.conv2d(torch.ones(1, 1, *x.shape[-2:], dtype=x.dtype, device=x.device), kernel, padding=SIDE // 2)
    mx, my = smooth(x), smooth(y)
    vx, vy, both = smooth(x * x) - mx**2, smooth(y * y) - my**2, smooth(x * y) - mx * my
    return (2 * mx * my + C1) * (2 * both + C2) / ((mx**2 + my**2 + C1) * (vx + vy + C2))


def ssim(made: Tensor, original: Tensor, region: Tensor | None = None) -> float:
    """As `psnr`."""
    weight = _region(made, original, region)
    return float((ssim_map(made, original) * weight).sum() / (weight.sum() * made.shape[1]))


def lpips_of(made: Tensor, original: Tensor, region: Tensor | None = None, network: Any = None) -> float:
    """Learned perceptual distance (Zhang et al. 2018) by the package lpips; `network`: one of its, by default AlexNet's.

    Raises:
        MissingPackageError: lpips is not installed. DataError: as `psnr`.
    """
    weight = _region(made, original, region).to(made)
    if network is None:
        try:
            network = importlib.import_module("lpips").LPIPS(net="alex")
        except ImportError as error:
            raise MissingPackageError(
                "The perceptual distance needs the package 'lpips'. Install it with: pip install lpips"
            ) from error
    shown = made * weight + original * (1 - weight)
    with torch.no_grad():
        return float(network(shown * 2 - 1, original * 2 - 1).mean())


def compare(made: Tensor, original: Tensor, mask: Tensor, perceptual: Any = None) -> dict[str, float]:
    """All of them, of the masked and of the unmasked region: {"unmasked psnr": ..., "masked ssim": ...}.

    `perceptual`: a network of lpips, for its distance; None leaves that out.
    """
    found: dict[str, float] = {}
    for name, region in (("unmasked", (mask < 0.5).float()), ("masked", mask)):
        found[f"{name} psnr"], found[f"{name} ssim"] = psnr(made, original, region), ssim(made, original, region)
        if perceptual is not None:
            found[f"{name} lpips"] = lpips_of(made, original, region, perceptual)
    return found


def _region(made: Tensor, original: Tensor, region: Tensor | None) -> Tensor:
    if made.ndim != 4 or made.shape != original.shape:
        raise DataError(f"frames are {tuple(made.shape)} and {tuple(original.shape)}; expected the same (F, C, H, W).")
    for frames in (made, original):
        low, high = float(frames.min()), float(frames.max())
        if not frames.is_floating_point() or not (low >= -SLACK and high <= 1 + SLACK):
            raise DataError(
                f"frames hold numbers from {low:g} to {high:g} ({frames.dtype}); expected floats from 0 to 1: divide bytes by "
                "255, and bring [-1, 1] there by x / 2 + 0.5."
            )
    if region is None:
        return torch.ones_like(made[:, :1], dtype=torch.float64)
    expected = (len(made), 1, *made.shape[2:])
    if tuple(region.shape) != expected:
        raise DataError(f"the region is {tuple(region.shape)} for frames {tuple(made.shape)}; expected {expected}.")
    weight = (region > 0.5).double()
    if not bool(weight.any()):
        raise DataError("the region is empty: there is nothing to compare.")
    return weight
