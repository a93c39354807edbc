"""SSF: scale and shift the features behind every operation.

Idea: the features of the frozen network, channel by channel, are fitted to the new task by a linear map of their own; a
linear map behind a projection or a norm disappears into its weights, so inference costs nothing.
Points: `linear` (patch embedding, q, k, v, o, up, down) and `norm`, all of them.

    y <- gamma * y + beta          y (..., d), gamma and beta (d,)

behind the patch embedding (d), norm1 (d), q, k and v (3 d), o (d), norm2 (d), up (4 d, in front of the GELU), down (d), and the
final norm (d). gamma ~ N(1, 0.02^2), beta ~ N(0, 0.02^2) as the authors start them: near the pretrained function, not equal
to it. `init_std=0` starts at gamma = 1, beta = 0, which is equal to it to the bit.
Merged: W <- gamma W, b <- gamma b + beta; of a norm likewise.
Count on ViT-B/16: 12 * 2 * 11 d + 4 d = 205,824.
Source: Lian, Zhou, Feng, Wang, "Scaling & Shifting Your Features", 2022 (dongzelian/SSF). As there, the reduction of Swin's
patch merging is left out; it has no bias to merge into.
Deviations: q, k and v have tensors of their own; theirs is one of 3 d, with the same numbers in all. The norm of Swin's patch
merging is scaled, as their text and module say; their blocks hand it a list in place of a name, so it never happens there.

In memory: backward needs the unscaled output of each projection; the scaled one, and the outputs of norms, are recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass

from zoo.adapters.base import Adapter
from zoo.adapters.parts.rescale import Rescale
from zoo.points import LinearPoint, NormPoint, Points
from zoo.points.merger import Merger
from zoo.registry import register_adapter


@register_adapter("ssf")
@dataclass
class SSF(Adapter):
    """Scale and shift.

    Args:
        targets: selector among linear and norm points; None takes all but the reduction of patch merging.
        init_std: spread of gamma around 1 and of beta around 0; 0 starts at the pretrained function.
    """

    targets: str | tuple[str, ...] | None = None
    init_std: float = 0.02

    default_lr = 1e-3
    paper = "Lian et al. 2022"
    looks_back = True
    taxonomy = "reparametrised"
    sums = True
    identity = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.init_std >= 0, f"init_std is {self.init_std}; expected 0 or more.")

    def attach(self, points: Points) -> None:
        """Rescale the output of every selected point."""
        points.require("linear", "ssf")
        for point in self.selected(points):
            point.rescale(Rescale(point.dim_out, std=self.init_std))

    def selected(self, points: Points) -> list[LinearPoint | NormPoint]:
        """The points behind which features are scaled and shifted."""
        kinds = [k for k in ("linear", "norm") if k in points.kinds]
        chosen = points.select(self.targets, kind=kinds)
        return [p for p in chosen if p.role != "merge"] if self.targets is None else chosen

    def merge(self, merger: Merger) -> None:
        """W <- gamma W, b <- gamma b + beta."""
        for point in self.selected(merger.points):
            part = self.module_at(point)
            merger.rescale(point, part.scale, part.shift)  # type: ignore[arg-type]
