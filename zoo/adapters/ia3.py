"""IA3: rescale keys, values and the hidden activations of the MLP.

Idea: Infused Adapter by Inhibiting and Amplifying Inner Activations: one learned factor for each channel at three places of
a block, nothing else.
Points: `linear` points k and v (their outputs), and the input of `mlp.down`.

    k <- l_k * (W_k x + b_k)        v <- l_v * (W_v x + b_v)        l_k, l_v (d,)
    y  = W_down (l_ff * act(W_up x)) + b_down                       l_ff (4 d,)

All factors start at 1: the pretrained function, to the bit.
Merged: rows of W_k, b_k, W_v and b_v, columns of W_down.
Count on ViT-B/16: 12 * (768 + 768 + 3,072) = 55,296.
Source: Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", 2022
(r-three/t-few), with its learning rate 3e-3. In T5's gated MLP it scales the output of the linear branch (wi_1), which
scales the hidden product: the same as l_ff here.
Deviations: none; T5's projections have no bias, here l_k and l_v scale it with the rest of k and v.

In memory: backward needs the unscaled keys and values; the scaled ones and the scaled activations are recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass

from zoo.adapters.base import Adapter
from zoo.adapters.parts.rescale import Rescale
from zoo.points import LinearPoint, Points
from zoo.points.merger import Merger
from zoo.registry import register_adapter


@register_adapter("ia3")
@dataclass
class IA3(Adapter):
    """Learned factors on inner activations.

    Args:
        targets: linear points whose output is scaled; empty for none. The default is `in` on a backbone without attention, and
            nothing where there is no mixer of tokens with such a projection either (ConvNeXt).
        inputs: whole linear points whose input is scaled; empty for none.
    """

    targets: str | tuple[str, ...] = ("k", "v")
    inputs: str | tuple[str, ...] = ("down",)

    default_lr = 3e-3
    paper = "Liu et al. 2022"
    looks_back = True
    taxonomy = "reparametrised"
    sums = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(bool(self.targets or self.inputs), "targets and inputs are both empty; nothing would be trained.")

    def attach(self, points: Points) -> None:
        """Scale the outputs of `targets` and the inputs of `inputs`."""
        points.require("linear", "ia3")
        outputs, inputs = self.selected(points)
        for point in outputs:
            point.rescale(Rescale(point.dim_out, shift=False))
        for point in inputs:
            point.rescale_input(Rescale(point.dim_in, shift=False))

    def selected(self, points: Points) -> tuple[list[LinearPoint], list[LinearPoint]]:
        """The points whose outputs, and those whose inputs are scaled."""
        targets = self.targets
        if targets == IA3.targets:
            targets = points.usual(IA3.targets)  # type: ignore[arg-type]
            if not set(targets) & set(points.roles("linear")):  # no attention and no mixer: the MLP alone
                targets = ()
        outputs = points.select(targets, kind="linear") if targets else []
        inputs = points.select(self.inputs, kind="linear") if self.inputs else []
        return outputs, inputs

    def merge(self, merger: Merger) -> None:
        """Rows of W and b where the output is scaled, columns of W where the input is."""
        outputs, inputs = self.selected(merger.points)
        for point in outputs:
            merger.rescale(point, self.module_at(point).scale)  # type: ignore[arg-type]
        for point in inputs:
            merger.rescale_input(point, self.module_at(point).scale)  # type: ignore[arg-type]
