"""BitFit: train the biases, nothing else.

Idea: of `y = W x + b` only b (dim_out,) is trained, in every projection, and beta of every normalisation.
Points: all `linear` points (q, k and v of a fused projection share one stored bias) and all `norm` points.
Equations: b <- b + db from the pretrained value; W frozen.
Defaults: every bias of the backbone, patch embedding included: ViT-B/16 102,912 = linear 82,944 + norms 19,200 + patch 768;
Swin-T 52,224, Swin-B 137,216.
Source: Ben Zaken, Ravfogel, Goldberg, "BitFit", 2021.
Deviations: relative position bias tables (Swin) are weights over positions, not biases of a projection, and stay frozen;
substring filters on "bias" in published code catch them too (Swin-B: 63,544 more parameters).
"""

from __future__ import annotations

from dataclasses import dataclass

from zoo.adapters.base import Adapter
from zoo.engine.changes import BiasDelta
from zoo.errors import AttachError
from zoo.points import LinearPoint, NormPoint, Points
from zoo.points.merger import Merger
from zoo.registry import register_adapter


@register_adapter("bitfit")
@dataclass
class BitFit(Adapter):
    """Train biases.

    Args:
        targets: selector among linear and norm points, e.g. `("q", "up")` for the paper's smaller set; None takes all.
    """

    targets: str | tuple[str, ...] | None = None

    default_lr = 1e-3
    paper = "Ben Zaken et al. 2021"
    looks_back = True
    taxonomy = "selective"
    sums = True

    def attach(self, points: Points) -> None:
        """Train the bias of every selected point that has one."""
        biased = self.selected(points)
        if not biased:
            raise AttachError(f"'bitfit' needs biases, and none of the chosen points of {points.backbone} has one.")
        for point in biased:
            point.train("bias")

    def selected(self, points: Points) -> list[LinearPoint | NormPoint]:
        """The chosen points that have a bias."""
        kinds = [k for k in ("linear", "norm") if k in points.kinds]
        chosen = points.select(self.targets, kind=kinds)
        return [p for p in chosen if p.holder("bias") is not None]

    def merge(self, merger: Merger) -> None:
        """Trained biases are in the merged copy already, except slices of a fused one, which are kept as differences."""
        parts = dict(self.named_modules())
        for point in self.selected(merger.points):
            part = parts.get(point.name)
            if isinstance(part, BiasDelta):
                merger.add_bias(point, part.bias - part.frozen)  # type: ignore[operator]
