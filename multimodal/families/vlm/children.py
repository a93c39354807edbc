"""Cheaper sublayers for decoder language models: shared keys and values, fewer neurons, one projection, nothing.

Fewer heads are heads of keys and values: those that are merged become their mean, all queries stay, and the cache is smaller by
as much (`zoo.families.children`). A block without attention keeps nothing in the cache; the first block alone, by which the
library counts how long a text is, puts one number for each word there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from multimodal.families.seq2seq.releases import CACHE_NAMES
from zoo.errors import ConfigError
from zoo.families.children import Alone, Children, Nothing, product, resized

__all__ = ["LanguageChildren"]


def counted(hidden: Tensor, layer: int, given: dict[str, Any]) -> None:
    """Let the library's cache know how many words passed, where it looks at this layer for it."""
    cache = next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)
    if layer == 0 and cache is not None:
        one = hidden.new_ones(hidden.shape[0], 1, hidden.shape[1], 1)
        cache.update(one, one, layer)


class NoAttention(Nothing):
    """No attention; called as the library's is."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """x (B, M, d) -> (0, no weights)."""
        counted(hidden_states, self.layer_idx, kwargs)
        return super().forward(hidden_states), None


class ValueAttention(Alone):
    """`W_o W_v`; called as the library's attention is."""

    packed = True

    def __init__(self, last: str, weight: Tensor, bias: Tensor | None, layer_idx: int) -> None:
        super().__init__(last, weight, bias)
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """x (B, M, d) -> (W_o W_v x, no weights)."""
        counted(hidden_states, self.layer_idx, kwargs)
        return super().forward(hidden_states), None


class LanguageChildren(Children):
    """Of transformers' LLaMA, Qwen and the language networks of models with eyes that are built alike."""

    blocks = (
        *("LlamaDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "Qwen2VLDecoderLayer"),
        *("Qwen2_5_VLDecoderLayer", "Qwen3VLTextDecoderLayer"),
    )
    unit = {"attn": "heads of keys and values", "mlp": "neurons"}
    divides = True

    def parts(self, role: str) -> tuple[str, ...]:
        """The norm and the sublayer."""
        return ("input_layernorm", "self_attn") if role == "attn" else ("post_attention_layernorm", "mlp")

    def whole(self, name: str, block: Any, role: str) -> int:
        """Heads of keys and values, or hidden channels."""
        wanted = ("q_proj", "k_proj", "v_proj", "o_proj") if role == "attn" else ("gate_proj", "up_proj", "down_proj")
        module = block._modules[self.parts(role)[-1]]
        for part in wanted:
            if type(module._modules.get(part)) is not nn.Linear:
                raise ConfigError(
                    f"'{name}.{role}': its {part} is a {type(module._modules.get(part)).__name__}; cheaper sublayers are made of "
                    "plain projections. Begin with a network that is not quantised."
                )
        if role == "attn":
            return int(module.k_proj.out_features // module.head_dim)
        return int(module.up_proj.out_features)

    def reader(self, block: Any, role: str) -> tuple[nn.Linear, int]:
        """`o_proj`, whose channels are those of the heads of queries; `down_proj`."""
        if role == "mlp":
            return block.mlp.down_proj, 1
        attention = block.self_attn
        return attention.o_proj, attention.o_proj.in_features // self.whole("", block, "attn")

    @torch.no_grad()
    def shrink(self, name: str, block: Any, role: str, kept: Sequence[int]) -> None:
        """Cut neurons out; merge keys and values of neighbouring heads."""
        if role == "mlp":
            index = torch.tensor(list(kept), device=block.mlp.up_proj.weight.device)
            for part in (block.mlp.gate_proj, block.mlp.up_proj):
                resized(part, part.weight[index], None if part.bias is None else part.bias[index])
            resized(block.mlp.down_proj, block.mlp.down_proj.weight[:, index], block.mlp.down_proj.bias)
            if hasattr(block.mlp, "intermediate_size"):
                block.mlp.intermediate_size = len(kept)
            return
        attention = block.self_attn
        count, width = self.whole(name, block, role), attention.head_dim
        for part in (attention.k_proj, attention.v_proj):
            merged = [
                None if x is None else x.unflatten(0, (len(kept), count // len(kept), width)).mean(1).flatten(0, 1)
                for x in (part.weight, part.bias)
            ]
            resized(part, merged[0], merged[1])  # type: ignore[arg-type]
        attention.num_key_value_groups = attention.q_proj.out_features // width // len(kept)
        if hasattr(attention, "num_key_value_heads"):
            attention.num_key_value_heads = len(kept)

    def linear(self, block: Any, role: str) -> nn.Module:
        """`W_o W_v`, the value of each head once for each query that reads it; `W_down W_up`, without the gate."""
        if role == "mlp":
            return Alone("down_proj", *product(block.mlp.down_proj, block.mlp.up_proj))
        attention = block.self_attn
        groups, width = int(attention.num_key_value_groups), int(attention.head_dim)
        made = product(attention.o_proj, attention.v_proj, repeat=groups, width=width)
        return ValueAttention("o_proj", *made, layer_idx=attention.layer_idx)

    def nothing(self, block: Any, role: str) -> nn.Module:
        """An attention that gives no weights either, or nothing."""
        return NoAttention(block.self_attn.layer_idx) if role == "attn" else Nothing()
