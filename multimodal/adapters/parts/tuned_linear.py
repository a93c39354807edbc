"""A projection with a bias and a scale of its own (LLaMA-Adapter V2): of its output, of its input, or the bias alone.

`tuned(x, W, b)` is what the projection of x becomes, for tokens that do not pass the backbone's module.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adapters.parts.rescale import Rescale

__all__ = ["TUNED", "Bias", "InputScale", "OutputScale"]


class Bias(nn.Module):
    """`y + b`."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(dim_out))

    def forward(self, x: Tensor) -> Tensor:
        """b (dim_out,), which is added."""
        return self.bias

    def tuned(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the projection of x becomes."""
        return F.linear(x, weight, bias) + self.bias.to(x.dtype)


class OutputScale(Rescale):
    """`s * (y + b)`, that is `s * y + s * b`."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        nn.Module.__init__(self)
        self.scale, self.bias = nn.Parameter(torch.ones(dim_out)), nn.Parameter(torch.zeros(dim_out))

    @property
    def shift(self) -> Tensor:  # type: ignore[override]
        """s * b."""
        return self.scale * self.bias

    def tuned(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the projection of x becomes."""
        return self(F.linear(x, weight, bias))  # type: ignore[no-any-return]


class InputScale(nn.Module):
    """`W (s * x) + b`: s scales the columns of W."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.ones(dim_in)), nn.Parameter(torch.zeros(dim_out))

    @staticmethod
    def linear_group(parts: Any, run: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The slices of a projection that several points share, each with a scale and a bias of its own."""
        scales, shifts = weight.new_ones(weight.shape), weight.new_zeros(weight.shape[0])
        pieces, moved, at = [], [], 0
        for module, start, stop in parts:
            pieces += [scales[at:start], module.scale.to(weight.dtype).expand(stop - start, -1)]
            moved += [shifts[at:start], module.bias.to(weight.dtype)]
            at = stop
        whole, shift = torch.cat([*pieces, scales[at:]]), torch.cat([*moved, shifts[at:]])
        return run(x, weight * whole, shift if bias is None else bias + shift)  # type: ignore[no-any-return]

    def tuned(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the projection of x becomes."""
        return F.linear(x * self.scale.to(x.dtype), weight, bias) + self.bias.to(x.dtype)


TUNED: dict[str, type[Bias] | type[OutputScale] | type[InputScale]] = {
    "output": OutputScale,
    "input": InputScale,
    "none": Bias,
}
