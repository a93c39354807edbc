"""Prompts that an attention reads by a second softmax, behind a gate (LLaMA-Adapter): keys and values by its own projections.

K_P = W_k P + b_k,   V_P = W_v P + b_v        P (T, d) learned, or made for each image (B, T, d), or the sum of both
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import LinearPoint
from zoo.points import AttentionPoint

__all__ = ["GatedPrompt"]


class GatedPrompt(nn.Module):
    """K_P, V_P and tanh(g) of one attention; `made` is the image as prompts, if it is read here.

    k, v: the points of the projections; tuned: their bias and scale, or None; norm: what norms keys, or None.
    """

    def __init__(
        self,
        point: AttentionPoint,
        k: LinearPoint,
        v: LinearPoint,
        tuned: tuple[Any, Any],
        norm: nn.Module | None,
        num_tokens: int,
        made: Any = None,
        visual: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.randn(num_tokens, k.dim_in)) if num_tokens else None
        self.gate = nn.Parameter(torch.zeros(1, point.query_heads or point.num_heads, 1, 1))
        self.places, self.width, self.made, self.norm = (k, v), point.head_dim, made, (norm,)
        self.shared = tuple(m for m in (*tuned, visual) if m is not None)
        self.tuned = tuple(tuned)

    def forward(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values (1 or batch, heads of keys, T, c), and the gate (1, heads, 1, 1)."""
        image = None if self.made is None else self.made.get()
        prompt = None if self.prompt is None else self.prompt[None]
        if image is not None:
            prompt = image if prompt is None else prompt + image
        if prompt is None:  # no image: a token that is multiplied by 0
            weight: Tensor = self.places[0].module.weight  # type: ignore[union-attr, assignment]
            nothing = weight.new_zeros(1, self.places[0].dim_out // self.width, 1, self.width)
            return nothing, nothing, torch.zeros_like(self.gate)
        keys, values = (self._projected(prompt, i) for i in (0, 1))
        return keys, values, self.gate.tanh()

    def _projected(self, prompt: Tensor, which: int) -> Tensor:
        """(n, T, d) -> (n, heads, T, c)."""
        point: Any = self.places[which]
        whole = point.module.weight  # held while it is used: a quantised one is made here, and not kept for backward
        weight = whole[point.start : point.stop]
        bias = None if point.module.bias is None else point.module.bias[point.start : point.stop]
        x, own = prompt.to(weight.dtype), self.tuned[which]
        y = F.linear(x, weight, bias) if own is None else own.tuned(x, weight, bias)
        norm: Any = self.norm[0] if which == 0 else None
        if norm is not None and norm.weight.numel() == y.shape[-1]:  # over all heads together
            y, norm = norm(y), None
        split = y.unflatten(-1, (-1, self.width)).transpose(1, 2)
        return split if norm is None else norm(split)
