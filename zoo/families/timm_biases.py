"""Biases that timm keeps beside a fused projection (EVA, BEiT, Swin V2), brought to where hooks see them.

Their attention holds `qkv` without a bias, and `q_bias` and `v_bias` itself (k has none, since it would change no softmax). It
multiplies by the weight of `qkv` past the module, F.linear(x, W, [q_bias, 0, v_bias]), so nothing that stands at the module runs.
(timm's own switch `qkv_bias_separate` calls the module, but adds the biases afterwards: another rounding, in the last bits of
float32 and by 0.03 in bfloat16.)

Here the classes of the two modules change and nothing else: the projection's `bias` is [q_bias, 0, v_bias] of its attention, and
the attention believes that it has none of its own, so timm's forward calls the projection. Parameters stay where they are, the
`state_dict` is the library's, and the product is the same to the bit in every precision.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.swin_transformer_v2 import WindowAttention
from torch import Tensor, nn

from zoo.engine.swaps import held

__all__ = ["close_biases", "open_biases"]


class OpenProjection(nn.Linear):
    """`qkv` whose bias stands in its attention, (3 h c,)."""

    owner: tuple[nn.Module]  # in a tuple, so that it is no submodule

    @property
    def bias(self) -> Tensor:  # type: ignore[override]
        """[q_bias, 0, v_bias]."""
        (attention,) = self.owner
        own: dict[str, Any] = {**held(attention), **attention._buffers}
        return torch.cat((own["q_bias"], own["k_bias"], own["v_bias"]))


class _Open:
    """An attention that finds no bias beside its projection."""

    q_bias = property(lambda self: None)


class OpenEvaAttention(_Open, EvaAttention):
    """EVA's."""


class OpenBeitAttention(_Open, BeitAttention):
    """BEiT's."""


class OpenWindowAttention(_Open, WindowAttention):
    """Swin V2's."""


OPEN: dict[type[nn.Module], type[nn.Module]] = {
    EvaAttention: OpenEvaAttention,
    BeitAttention: OpenBeitAttention,
    WindowAttention: OpenWindowAttention,
}
CLOSED = {ours: library for library, ours in OPEN.items()}


def open_biases(module: nn.Module) -> None:
    """Open every attention of these classes that has biases beside its projection."""
    for part in list(module.modules()):
        if type(part) in OPEN and part._parameters.get("q_bias") is not None:
            projection: Any = part.qkv
            projection.__dict__["owner"] = (part,)
            projection.__class__ = OpenProjection
            part.__class__ = OPEN[type(part)]


def close_biases(module: nn.Module) -> None:
    """The library's own classes again."""
    parts: list[Any] = list(module.modules())
    for part in parts:
        if type(part) in CLOSED:
            part.__class__ = CLOSED[type(part)]
        elif isinstance(part, OpenProjection):
            del part.__dict__["owner"]
            part.__class__ = nn.Linear  # type: ignore[assignment]
