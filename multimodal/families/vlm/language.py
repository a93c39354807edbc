"""The blocks of decoder language models of transformers: rows of their table, and attention with more keys.

    u = x + W_o Attn(N1 x),   y = u + W_down (f(W_gate N2 u) * (W_up N2 u))        N1, N2: RMS norms

Queries have h heads, keys and values h_kv of them, each read by h / h_kv heads of queries: k and v have widths of their own.
Queries and keys are turned by their places (rotary positions); Qwen3 norms both before.

Extra keys (`extend`, `gate`) have h_kv heads and no place: they are not turned, every query sees them, and with a key-value cache
they stand in front of what the cache holds, and are no part of it. The gates of `gate` are those of the h heads of the queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from multimodal.families.seq2seq.releases import cache_name
from zoo.engine.attention import Alone, Bias, Pair, by_head
from zoo.errors import AttachError, ConfigError
from zoo.families.cached_keys import keys_values, pair_bias
from zoo.families.split_attention import SplitAttention, rotated
from zoo.points.rows import Row

__all__ = ["LANGUAGE", "LanguageSite", "check_attention"]

LANGUAGE = (
    Row("norm", "norm", "norm1", "input_layernorm"),
    Row("linear", "q", "attn.q", "self_attn.q_proj"),
    Row("linear", "k", "attn.k", "self_attn.k_proj"),
    Row("linear", "v", "attn.v", "self_attn.v_proj"),
    Row("norm", "norm", "attn.q_norm", "self_attn.q_norm"),
    Row("norm", "norm", "attn.k_norm", "self_attn.k_norm"),
    Row("attention", "attn", "attn.product", "self_attn"),
    Row("linear", "o", "attn.o", "self_attn.o_proj"),
    Row("sublayer", "attn", "attn", "self_attn", entry="input_layernorm", exit="self_attn:output"),
    Row("norm", "norm", "norm2", "post_attention_layernorm"),
    Row("linear", "gate", "mlp.gate", "mlp.gate_proj"),
    Row("linear", "up", "mlp.up", "mlp.up_proj"),
    Row("linear", "down", "mlp.down", "mlp.down_proj"),
    Row("sublayer", "mlp", "mlp", "mlp", entry="post_attention_layernorm", exit="mlp:output"),
    Row("block", "block", "", ""),
)


@dataclass(eq=False)
class LanguageSite(SplitAttention):
    """A causal self-attention whose heads of queries share heads of keys and values."""

    @property
    def groups(self) -> int:
        """Heads of queries that read one head of keys."""
        return int(self.module.num_key_value_groups)  # type: ignore[arg-type]

    def ready(self, pair: Pair) -> Pair:
        """Extra keys and values once for each head of queries; so, too, a mask of them that is one of each head of keys."""
        keys, values, *more = pair
        wide = (self._wide(keys), self._wide(values))
        if isinstance(pair, Alone):
            return Alone(*wide)
        few, every = keys.shape[1], wide[0].shape[1]
        spread = (self._wide(t) if t.dim() == 4 and t.shape[1] == few != every and few > 1 else t for t in more)
        return (*wide, *spread)

    def _wide(self, x: Tensor) -> Tensor:
        """(n, h_kv, ...) -> (n, h, ...)."""
        return x if self.groups == 1 else x.repeat_interleave(self.groups, dim=1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, images: int, bias: Bias) -> Tensor:
        """With an adapter for each sample, all beams of a sample are read with the keys of its own."""
        return super().attend(q, k, v, images if self.state.route is None else self.state.batch, bias)

    def extended(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """x (B, M, d) -> (output (B, M, d), no weights)."""
        attention: Any = self.module
        if attention_mask is not None and attention_mask.dim() != 4:
            raise ConfigError(
                "Prefixes and gated prompts need a mask of queries and keys, which this implementation of attention "
                f"('{attention.config._attn_implementation}') does not make. Load with attn_implementation='sdpa' or 'eager'."
            )
        assert position_embeddings is not None
        cos, sin = (part.unsqueeze(1) for part in position_embeddings)

        def turned(name: str) -> Tensor:
            x = by_head(getattr(attention, f"{name}_proj")(hidden_states), attention.head_dim)
            norm = getattr(attention, f"{name}_norm", None)
            return rotated(x if norm is None else norm(x), cos, sin)

        def project(_: Tensor) -> Pair:
            return turned("k"), by_head(attention.v_proj(hidden_states), attention.head_dim)

        q = turned("q")
        held = past_key_values if cache is None else cache
        k, v = keys_values(hidden_states, held, attention.layer_idx, False, project)
        bias = pair_bias(attention_mask, None, True, q, k.shape[2])
        y = self.attend(q, self._wide(k), self._wide(v), q.shape[0], bias)
        return attention.o_proj(y.transpose(1, 2).flatten(2)), None


def check_attention(attention: Any, name: str) -> None:
    """Raise AttachError if this release of the library calls the attention in another way than described here."""
    if cache_name(type(attention).forward) is None:
        raise AttachError(
            f"the attention at '{name}' is that of an older transformers, whose call is not described here. Update it: pip "
            "install -U transformers"
        )
