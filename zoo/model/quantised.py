"""A projection with int8 weights: W (o, i) = scale (o,) * int8 (o, i), symmetric, one scale for each output.

Rounding: scale_o = max_i |W_oi| / 127, int8 = round(W / scale); the error of an entry is at most scale / 2. The product is that
of the rounded weight, exactly. Backward gives the input's gradient, and keeps the int8 numbers rather than a float copy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.engine.memory import recomputable

__all__ = ["Int8Linear"]


class Int8Linear(nn.Linear):
    """An `nn.Linear` whose `weight` is made of int8 numbers when it is asked for; it has no weight to train or to merge into."""

    int8: Tensor
    scale: Tensor

    @classmethod
    def of(cls, linear: nn.Linear) -> Int8Linear:
        """The same projection, rounded."""
        weight = linear.weight.detach()
        wide = weight.float()
        scale = wide.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        return cls.made(
            (wide / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale.to(weight.dtype), linear.bias
        )

    @classmethod
    def made(cls, int8: Tensor, scale: Tensor, bias: nn.Parameter | None) -> Int8Linear:
        """Of its parts."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.out_features, self.in_features = int8.shape
        self.register_buffer("int8", int8)
        self.register_buffer("scale", scale)
        self.register_parameter(
            "bias", None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        )
        return self

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W (o, i) in the precision of the scale."""
        return _wide(self.int8, self.scale)

    def forward(self, input: Tensor) -> Tensor:
        """x (..., i) -> (..., o). Backward makes the weight once more instead of keeping it."""
        return F.linear(input, recomputable(_wide, self.int8, self.scale, constant=True), self.bias)

    def extra_repr(self) -> str:
        """As torch's."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _wide(int8: Tensor, scale: Tensor) -> Tensor:
    return int8.to(scale.dtype) * scale[:, None]
