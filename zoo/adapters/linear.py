"""Linear probe: the frozen features and a trained head, nothing else.

Source: Alain & Bengio, "Understanding intermediate layers using linear classifier probes", 2016. No points, no parameters
besides the head. The backbone is in front of everything that is trained, so nothing of it is kept for backward.
"""

from __future__ import annotations

from dataclasses import dataclass

from zoo.adapters.base import Adapter
from zoo.points import Points
from zoo.points.merger import Merger
from zoo.registry import register_adapter


@register_adapter("linear")
@dataclass
class Linear(Adapter):
    """Train only the head."""

    stateless = True
    default_lr = 1e-2
    paper = "Alain and Bengio 2016"
    looks_back = True
    taxonomy = "selective"

    def attach(self, points: Points) -> None:
        """Attaches nothing."""

    def merge(self, merger: Merger) -> None:
        """Nothing to fold: the head alone was trained."""
