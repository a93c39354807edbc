"""Full fine-tuning: every parameter of the backbone is trained. The upper bound that the other methods are measured against.

Idea and equations: theta <- theta + d theta for all of the backbone. Points: none in particular.
Defaults: all parameters; ViT-B/16 without head 85,798,656. Deviations: none.
While active, trainable copies stand in the place of the backbone's parameters; switching off or removing gives the original
weights back. Saved keys are the library's parameter names under `backbone.`, the one exception to naming by points.
"""

from __future__ import annotations

from dataclasses import dataclass

from zoo.adapters.base import Adapter
from zoo.points import Points
from zoo.points.merger import Merger
from zoo.registry import register_adapter


@register_adapter("full")
@dataclass
class Full(Adapter):
    """Train the whole backbone."""

    trains_backbone = True
    default_lr = 5e-5
    looks_back = True
    taxonomy = "selective"
    sums = True

    def attach(self, points: Points) -> None:
        """Put a trainable copy of every parameter in its place."""
        points.train_everything()

    def merge(self, merger: Merger) -> None:
        """The trained values are in the merged copy already."""
