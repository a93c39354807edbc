"""Metrics of maps, over all pixels that have a value.

segment   n_kj pixels of class k that were taken for j;  IoU_k = n_kk / (sum_j n_kj + sum_j n_jk - n_kk)
          miou: mean of IoU_k over the classes that occur or were said;  pixel_accuracy = sum_k n_kk / sum n
          mean_accuracy: mean over the classes that occur of n_kk / sum_j n_kj
edges     ods_f = max_t 2 P R / (P + R), precision and recall of the pixels with probability >= t, over the whole set, t in 99
          steps. A pixel beside the right one is wrong: the benchmarks of edges allow for a distance, so these are lower
depth     mae = mean |z - t|;  rmse = sqrt(mean (z - t)^2)
normals   angle_error = mean angle between z / |z| and t / |t| in degrees;  within_30: share of pixels below 30 degrees
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

__all__ = ["Angles", "Contours", "Distances", "Overlap"]


class Overlap(Metric):
    """miou, pixel_accuracy, mean_accuracy of logits (B, K, H, W) and classes (B, H, W); `per_class()` gives each IoU."""

    full_state_update = False
    higher_is_better = True
    counts: Tensor

    def __init__(self, classes: int, ignore: int) -> None:
        super().__init__()
        self.classes, self.ignore = classes, ignore
        self._ious: list[float] = []
        self.add_state("counts", torch.zeros(classes, classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch."""
        kept = targets != self.ignore
        pairs = targets[kept] * self.classes + outputs.argmax(1)[kept]
        self.counts += torch.bincount(pairs, minlength=self.classes**2).view(self.classes, self.classes)

    def per_class(self) -> list[float]:
        """The IoU of each class, as `compute` found it; NaN of one that neither occurs nor was said."""
        return self._ious

    def compute(self) -> dict[str, Tensor]:
        """Shares, 0..1."""
        counts = self.counts.double()
        hits = counts.diag()
        ious = hits / (counts.sum(0) + counts.sum(1) - hits)
        self._ious = ious.tolist()
        return {
            "miou": ious.nanmean(),
            "pixel_accuracy": hits.sum() / counts.sum(),
            "mean_accuracy": (hits / counts.sum(1)).nanmean(),
        }


class Contours(Metric):
    """ods_f of logits (B, 1, H, W) and edges (B, H, W) of 0 and 1."""

    full_state_update = False
    higher_is_better = True
    steps = 99
    edges: Tensor
    others: Tensor

    def __init__(self, ignore: int) -> None:
        super().__init__()
        self.ignore = ignore
        for name in ("edges", "others"):  # pixels by how many thresholds they are above
            self.add_state(name, torch.zeros(self.steps + 1, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch."""
        kept = targets != self.ignore
        level = (outputs[:, 0].sigmoid()[kept] * (self.steps + 1)).long().clamp(0, self.steps)
        edge = targets[kept] == 1
        self.edges += torch.bincount(level[edge], minlength=self.steps + 1)
        self.others += torch.bincount(level[~edge], minlength=self.steps + 1)

    def compute(self) -> dict[str, Tensor]:
        """A share, 0..1; NaN if there is no edge."""
        hits = self.edges.double().flip(0).cumsum(0)[: self.steps]
        said = hits + self.others.double().flip(0).cumsum(0)[: self.steps]
        return {"ods_f": (2 * hits / (said + self.edges.sum())).max() if self.edges.sum() else torch.tensor(torch.nan)}


class _Sums(Metric):
    """Sums over pixels."""

    full_state_update = False
    sums: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(count, dtype=torch.float64), dist_reduce_fx="sum")

    def _add(self, *values: Tensor) -> None:
        found = [v.to(torch.float32 if v.device.type == "mps" else torch.float64).sum() for v in values]
        self.sums += torch.stack(found).to(self.sums)


class Distances(_Sums):
    """mae and rmse of numbers (B, 1, H, W) and (B, H, W); NaN is no measurement."""

    higher_is_better = False

    def __init__(self) -> None:
        super().__init__(3)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch."""
        kept = targets.isfinite()
        error = (outputs[:, 0] - targets)[kept]
        self._add(error.abs(), error.square(), torch.ones_like(error))

    def compute(self) -> dict[str, Tensor]:
        """In the unit of the numbers."""
        return {"mae": self.sums[0] / self.sums[2], "rmse": (self.sums[1] / self.sums[2]).sqrt()}


class Angles(_Sums):
    """angle_error and within_30 of directions (B, 3, H, W) each; NaN is no measurement."""

    higher_is_better = False

    def __init__(self) -> None:
        super().__init__(3)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch."""
        kept = targets.isfinite().all(1)
        cosine = F.cosine_similarity(outputs, targets, dim=1)[kept].clamp(-1, 1)
        angle = cosine.acos().rad2deg()
        self._add(angle, (angle < 30).to(angle), torch.ones_like(angle))

    def compute(self) -> dict[str, Any]:
        """Degrees, and a share."""
        return {"angle_error": self.sums[0] / self.sums[2], "within_30": self.sums[1] / self.sums[2]}
