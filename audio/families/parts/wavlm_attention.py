"""WavLM's attention with projections that are called as modules.

The library hands their weights to torch's `multi_head_attention_forward`, so hooks on `q_proj` and the others would never run.
`OpenAttention` computes the same of the same parameters; only the class of the module is another one while it is ours. As
long as nothing stands at its projections it is the library's own computation, to the bit; else sums are formed in another order.

    y = W_o concat_h(softmax(q k^T / sqrt(c) + g(x) B) v)        B: bias of relative positions (h, N, N), of the first block

g(x) (B h, N, 1) is made of each head's part of the tokens. Extra keys have no place and get no bias.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.wavlm.modeling_wavlm import WavLMAttention

from zoo.engine.attention import mask_bias
from zoo.engine.sites import site_at
from zoo.families.split_attention import SplitAttention, widened


def idle(module: nn.Module) -> bool:
    """Whether nothing happens when a projection is called but its product."""
    site, hooks = site_at(module), len(module._forward_hooks) + len(module._forward_pre_hooks)
    return hooks == 0 if site is None else hooks == 2 and not any(site.running())


class OpenAttention(WavLMAttention):  # type: ignore[misc]
    """See the top of this file."""

    def gate(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, N, d) and the bias of relative positions (B h, N, N), made if it is None -> the bias, and the gated one."""
        batch, length, _ = x.shape
        if bias is None:
            bias = self.compute_bias(length, length)
            bias = bias.unsqueeze(0).repeat(batch, 1, 1, 1).view(batch * self.num_heads, length, length)
        parts = x.view(batch, length, self.num_heads, -1).permute(0, 2, 1, 3)
        gates = self.gru_rel_pos_linear(parts).view(*parts.shape[:-1], 2, 4).sum(-1)
        first, second = torch.sigmoid(gates).chunk(2, dim=-1)
        gate = first * (second * self.gru_rel_pos_const - 1.0) + 2.0
        return bias, (gate.view(batch * self.num_heads, -1, 1) * bias).view(-1, length, length)

    def split(self, x: Tensor) -> Tensor:
        """(B, N, d) -> (B h, N, c)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2).flatten(0, 1)

    def torch_multi_head_self_attention(
        self, hidden_states: Tensor, attention_mask: Any, gated_position_bias: Tensor
    ) -> Any:
        """As the library's, (B, N, d), weights or None; attention_mask (B, N) is 1 where a key is seen."""
        if all(map(idle, (self.q_proj, self.k_proj, self.v_proj, self.out_proj))):
            return super().torch_multi_head_self_attention(hidden_states, attention_mask, gated_position_bias)
        q, k, v = (self.split(p(hidden_states)) for p in (self.q_proj, self.k_proj, self.v_proj))
        bias = gated_position_bias
        if attention_mask is not None:
            hidden = attention_mask.ne(1).repeat_interleave(self.num_heads, dim=0)[:, None]
            bias = bias.masked_fill(hidden, float("-inf"))
        scores = torch.baddbmm(bias, q * math.sqrt(1.0 / self.head_dim), k.transpose(-2, -1))
        weights = nn.functional.dropout(scores.softmax(dim=-1), self.dropout, self.training)
        y = torch.bmm(weights, v).unflatten(0, (-1, self.num_heads)).transpose(1, 2).flatten(2)
        return self.out_proj(y), None


@dataclass(eq=False)
class GatedSite(SplitAttention):
    """`OpenAttention` extended; it answers (y, None, bias of relative positions)."""

    @property
    def fused(self) -> bool:
        """Torch's fused product takes the bias as a mask; the plain one is what the library computes."""
        return False

    def extended(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        index: int = 0,
        **kwargs: Any,
    ) -> Any:
        """x (B, N, d) -> (B, N, d). Extra keys are seen by every query, without a bias."""
        attention: Any = self.module
        wide, tokens = position_bias, hidden_states.shape[1]
        if wide is not None and wide.shape[-1] < tokens:  # prompts that came in behind the first block have no place
            wide = widened(wide, tokens - wide.shape[-1], 0)
        wide, gated = attention.gate(hidden_states, wide)
        position_bias = wide if position_bias is None else position_bias
        bias = gated.unflatten(0, (-1, attention.num_heads))
        if attention_mask is not None:
            bias = bias.masked_fill(attention_mask.ne(1)[:, None, None], float("-inf"))
        q, k, v = self.project(hidden_states)
        y = self.attend(q, k, v, hidden_states.shape[0], mask_bias(bias)).transpose(1, 2).flatten(2)
        return attention.out_proj(y), None, position_bias


def opened(module: nn.Module) -> nn.Module:
    """The network with attentions of ours, in place."""
    for part in module.modules():
        if type(part) is WavLMAttention:
            part.__class__ = OpenAttention
    return module


def closed(module: nn.Module) -> nn.Module:
    """The network as the library has it, in place."""
    for part in module.modules():
        if type(part) is OpenAttention:
            part.__class__ = WavLMAttention  # type: ignore[assignment]
    return module
