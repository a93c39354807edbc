"""Numbers of regions of videos, against torchmetrics on whole frames and by hand on parts."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from multimodal.metrics.regions import compare, lpips_of, psnr, ssim, ssim_map
from zoo.errors import DataError, MissingPackageError


def test_whole_frames() -> None:
    """As torchmetrics has them; structural similarity by hand at one pixel inside and at the corner."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    torch.manual_seed(0)
    x = torch.rand(3, 3, 24, 30)
    y = (x + 0.1 * torch.randn_like(x)).clamp(0, 1)
    assert psnr(x, y) == pytest.approx(float(peak_signal_noise_ratio(x, y, data_range=1.0)), abs=1e-4)
    found = ssim_map(x, y)
    for row, column in ((12, 9), (0, 0)):
        total = mx = my = xx = yy = xy = 0.0
        for i in range(max(0, row - 5), min(24, row + 6)):
            for j in range(max(0, column - 5), min(30, column + 6)):
                weight = math.exp(-((i - row) ** 2 + (j - column) ** 2) / (2 * 1.5**2))
                a, b = float(x[1, 2, i, j]), float(y[1, 2, i, j])
                total, mx, my = total + weight, mx + weight * a, my + weight * b
                xx, yy, xy = xx + weight * a * a, yy + weight * b * b, xy + weight * a * b
        mx, my = mx / total, my / total
        vx, vy, both = xx / total - mx**2, yy / total - my**2, xy / total - mx * my
        expected = (2 * mx * my + 1e-4) * (2 * both + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
        assert float(found[1, 2, row, column]) == pytest.approx(expected, abs=1e-6)


def test_regions_by_hand() -> None:
    original = torch.full((2, 3, 12, 12), 0.5)
    made, mask = original.clone(), torch.zeros(2, 1, 12, 12)
    mask[:, :, :4] = 1
    made[:, :, :4] += 0.1
    assert psnr(made, original, mask) == pytest.approx(20, abs=1e-4)
    assert math.isinf(psnr(made, original, 1 - mask))
    found = compare(made, original, mask)
    assert found["unmasked ssim"] > found["masked ssim"] and set(found) == {
        f"{region} {name}" for region in ("masked", "unmasked") for name in ("psnr", "ssim")
    }
    assert ssim(original, original, mask) == pytest.approx(1)
    seen: list[torch.Tensor] = []
    lpips_of(made, original, 1 - mask, lambda a, b: (seen.extend((a, b)), torch.zeros(2))[1])
    assert torch.equal(seen[0], seen[1])  # outside of the region the original stands


def test_what_is_refused() -> None:
    frames = torch.rand(2, 3, 12, 12)
    with pytest.raises(DataError, match="the region is empty"):
        psnr(frames, frames, torch.zeros(2, 1, 12, 12))
    with pytest.raises(DataError, match="expected the same"):
        psnr(frames, frames[:1])
    with pytest.raises(DataError, match="needs 11 x 11"):
        ssim(frames[..., :8], frames[..., :8])
    try:
        import lpips  # noqa: F401
    except ImportError:
        with pytest.raises(MissingPackageError, match="pip install lpips"):
            lpips_of(frames, frames)


@pytest.mark.parametrize(
    "change", [lambda x: (x * 255).byte(), lambda x: x * 255, lambda x: x * 2 - 1, lambda x: x / 0]
)
def test_frames_of_another_range_are_refused(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Bytes were subtracted as bytes, which wrap around, and gave a ratio of -48 dB."""
    x = torch.rand(2, 3, 12, 12)
    for made, original in ((change(x), x), (x, change(x))):
        with pytest.raises(DataError, match="expected floats from 0 to 1"):
            psnr(made, original)
