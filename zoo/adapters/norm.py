"""Norm tuning: train the scale and shift of every normalisation.

Idea: gamma and beta of `LN(x) = gamma * (x - mean) / std + beta` are few, and reach every channel of every block.
Points: all `norm` points. Equations: gamma, beta (d,) become trainable, from their pretrained values.
Defaults: weight and bias of all norms (ViT-B/16: 25 norms * 2 * 768 = 38,400).
Source: Basu et al., "Strong Baselines for Parameter Efficient Few-Shot Fine-tuning", 2023 (LN-tune); Qi et al., "Parameter-
Efficient Tuning on Layer Normalization for Pre-trained Language Models", 2022.
Deviations: none.
"""

from __future__ import annotations

from dataclasses import dataclass

from zoo.adapters.base import Adapter
from zoo.points import Points
from zoo.points.merger import Merger
from zoo.registry import register_adapter


@register_adapter("norm")
@dataclass
class Norm(Adapter):
    """Train the normalisations.

    Args:
        targets: selector among norm points; None takes all.
        weight: train the scales. bias: train the shifts.
    """

    targets: str | tuple[str, ...] | None = None
    weight: bool = True
    bias: bool = True

    default_lr = 1e-3
    paper = "Qi et al. 2022; Basu et al. 2023"
    looks_back = True
    taxonomy = "selective"
    sums = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.weight or self.bias, "weight and bias are both off; nothing would be trained.")

    def attach(self, points: Points) -> None:
        """Train the selected norms; a norm without a shift (RMS) trains its scale."""
        points.require("norm", "norm")
        for point in points.select(self.targets, kind="norm"):
            names = [n for n, on in (("weight", self.weight), ("bias", self.bias)) if on]
            point.train(*(n for n in names if point.module._parameters.get(n) is not None))

    def merge(self, merger: Merger) -> None:
        """The trained values are in the merged copy already."""
