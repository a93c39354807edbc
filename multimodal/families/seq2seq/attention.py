"""Prefixes and prompts on transformers' T5 and BART. See `zoo.engine.attention` for the idea.

Extra keys have no position: on T5 their relative position bias is 0, in every block, and no mask hides them, neither in the
encoder nor in the causal decoder. With a key-value cache they stand in front of what the cache holds, and are no part of it.

Prompts of one block (deep) stand in front of the text at the entry of that encoder block, and are keys and values only: T5
norms them with the block's own norm; BART's blocks have no norm in front, and the embedding norm is behind them already.

Prompts that flow stand in front of the text as words do, [prompts ; text ; visual]: on T5 they have the relative positions of
words; on BART no position, but the embedding norm. They leave the encoder in front of its output; with `pooled` they stay in
it, and the decoder's cross-attention reads them (as in VL-Adapter).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.families.seq2seq.releases import cache_name
from zoo.engine.attention import AttentionSite, Given, Prompts, SplitKeys, by_head, recorder
from zoo.engine.sites import Site
from zoo.errors import AttachError
from zoo.families.cached_keys import keys_values, pair_bias
from zoo.points import Point

if TYPE_CHECKING:
    from zoo.points.recorder import Recorder


@dataclass(eq=False)
class LibraryAttention(AttentionSite):
    """What the attentions of T5 and BART have in common."""

    @property
    def fused(self) -> bool:
        """Whether the library would call torch's fused product."""
        config = getattr(
            self.module, "config", None
        )  # older releases have none in T5, nor anything but the plain product
        return config is not None and config._attn_implementation != "eager"

    @property
    def scale(self) -> float:
        """1 in T5, whose older releases do not name it."""
        return float(getattr(self.module, "scaling", 1.0))

    @property
    def dropout(self) -> float:
        """Of the attention weights, 0 in evaluation."""
        return float(self.module.dropout) if self.module.training else 0.0  # type: ignore[arg-type]


@dataclass(eq=False)
class T5Site(LibraryAttention):
    """T5's attention: self-attention of the encoder, causal self-attention, cross-attention."""

    def extended(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """(output (B, M, d), position bias of the own keys, which later blocks use again, no weights)."""
        attention: Any = self.module
        held = past_key_values if cache is None else cache
        width, index, cross = attention.key_value_proj_dim, attention.layer_idx, key_value_states is not None
        q = by_head(attention.q(hidden_states), width)
        seen = held.get_seq_length(index) if held is not None else 0
        project = SplitKeys(None, attention.k, attention.v, width)
        states = hidden_states if key_value_states is None else key_value_states
        k, v = keys_values(states, held, index, cross, project)
        count = k.shape[2]
        # In older releases of the library a bias that is handed on holds the mask, and nothing stands behind it
        older = not hasattr(attention, "scaling")
        if position_bias is None:
            position_bias = q.new_zeros(1, attention.n_heads, q.shape[2], count)
            if attention.has_relative_attention_bias:
                position_bias = _relative(attention, q.shape[2], count, seen)
            if older and mask is not None:
                position_bias = position_bias + mask[..., :count]
        bias = pair_bias(None if older else mask, position_bias, not older and attention.is_causal, q, count)
        y = self.attend(q, k, v, q.shape[0], bias).transpose(1, 2).flatten(2)
        return (attention.o(y), position_bias) if older else (attention.o(y), position_bias, None)


def _relative(attention: Any, queries: int, keys: int, seen: int) -> Tensor:
    """The relative position bias (1, h, queries, keys) of queries behind `seen` others."""
    if "past_seen_tokens" in inspect.signature(attention.compute_bias).parameters:
        return attention.compute_bias(  # type: ignore[no-any-return]
            queries, keys, device=attention.q.weight.device, past_seen_tokens=seen
        )
    whole = attention.compute_bias(seen + queries, keys, device=attention.q.weight.device)
    return whole[:, :, seen:]  # type: ignore[no-any-return]


@dataclass(eq=False)
class BartSite(LibraryAttention):
    """BART's attention: self-attention of the encoder, causal self-attention, cross-attention."""

    def extended(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """(output (B, M, d), no weights)."""
        attention: Any = self.module
        held = past_key_values if cache is None else cache
        width, index, cross = attention.head_dim, attention.layer_idx, key_value_states is not None
        q = by_head(attention.q_proj(hidden_states), width)
        project = SplitKeys(None, attention.k_proj, attention.v_proj, width)
        states = hidden_states if key_value_states is None else key_value_states
        k, v = keys_values(states, held, index, cross, project)
        bias = pair_bias(attention_mask, None, attention.is_causal, q, k.shape[2])
        y = self.attend(q, k, v, q.shape[0], bias).transpose(1, 2).flatten(2)
        return attention.out_proj(y), None


@dataclass(eq=False)
class EncoderSite(Site):
    """A whole encoder, in front of whose words prompts flow; the `fn` of its ops are the prompts' modules."""

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """The library's output with `last_hidden_state` (B, [prompts that stay] + L + N, d)."""
        if not self.forwards:
            return self.original(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        words = kwargs.pop("inputs_embeds", None)
        if words is None:
            words = self.module.embed_tokens(input_ids)  # type: ignore[operator]
        if attention_mask is None:
            attention_mask = words.new_ones(words.shape[:2])
        found: list[Tensor] = []
        for op in self.forwards:
            self._seen(op)
            found.append(self.state.run(op.fn, words.shape[0]).to(words.dtype).expand(words.shape[0], -1, -1))
        output = self.run(torch.cat(found, dim=1), words, attention_mask, kwargs)
        hidden = output.last_hidden_state
        sizes = [p.shape[1] for p in found]
        *prompts, own = hidden.split([*sizes, hidden.shape[1] - sum(sizes)], dim=1)
        staying = [p for p, op in zip(prompts, self.forwards, strict=True) if op.verb == "prompt, pooled"]
        output.last_hidden_state = torch.cat([*staying, own], dim=1) if staying else own
        return output

    def run(self, prompts: Tensor, words: Tensor, mask: Tensor, kwargs: dict[str, Any]) -> Any:
        """The encoder's output for [prompts ; words ; visual]; each family has its own."""
        raise NotImplementedError


@dataclass(eq=False)
class T5EncoderSite(EncoderSite):
    """T5's encoder: prompts are embeddings like those of words."""

    def run(self, prompts: Tensor, words: Tensor, mask: Tensor, kwargs: dict[str, Any]) -> Any:
        """The library's own forward on embeddings."""
        mask = F.pad(mask, (prompts.shape[1], 0), value=1)
        return self.original(inputs_embeds=torch.cat([prompts, words], dim=1), attention_mask=mask, **kwargs)


@dataclass(eq=False)
class BartEncoderSite(EncoderSite):
    """BART's encoder: prompts come behind the positions and in front of the embedding norm."""

    def run(self, prompts: Tensor, words: Tensor, mask: Tensor, kwargs: dict[str, Any]) -> Any:
        """The encoder put together from its parts, since the library adds positions to whatever it is given."""
        from multimodal.families.seq2seq.vl_models import encode_bart

        features = kwargs.get("visual_features")
        visual = None
        if features is not None:
            given = (kwargs.get(name) for name in ("boxes", "image_ids", "object_ids"))
            visual = self.module.visual_embedding(features, *given)  # type: ignore[operator]
        return encode_bart(
            self.module, words, mask, prompts=prompts, visual=visual, visual_mask=kwargs.get("visual_mask")
        )


@dataclass(eq=False)
class DecoderSite(Site):
    """A whole decoder that reads prompts which stayed in the encoder's output: nothing hides them."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The library's forward, with the encoder's mask as long as its output."""
        states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        for op in self.forwards:
            self._seen(op)
        if self.forwards and states is not None and mask is not None:
            kwargs["encoder_attention_mask"] = F.pad(mask, (states.shape[1] - mask.shape[1], 0), value=1)
        return self.original(*args, **kwargs)


def record(
    family: Any,
    session: Recorder,
    point: Point,
    verb: str,
    module: nn.Module,
    keep: bool = False,
    pooled: bool = False,
) -> None:
    """Record the ops of `extend` and `prompt`.

    Raises:
        AttachError: `pooled` prompts of one block, or an attention of another release of the library.
    """
    kind = family.attention_site
    op = recorder(session, point, verb, module)
    if keep:
        entry = "prompt, pooled" if pooled else verb
        op(family.encoder, family.encoder_site, "forward", module, entry, per_row=False)
        if pooled:
            op(family.decoder, DecoderSite, "forward", module, per_row=False)
        return
    attention = point.module if verb in ("extend", "gate") else family.self_attention(point.module)
    if cache_name(type(attention).forward) is None:
        raise AttachError(
            f"the attention at '{point.name}' is that of an older transformers, whose call is not described here. Update it: "
            "pip install -U transformers"
        )
    if verb in ("extend", "gate"):
        op(attention, kind, "forward", Given(module))
        return
    if pooled:
        raise AttachError(
            f"prompts of one block, as at '{point.name}', leave nothing behind for the decoder to read. Leave out pool='all', or "
            "let them flow (deep=False)."
        )
    project = family.prompt_keys(point.module)
    through = tuple(m for m in (project.norm, project.k, project.v) if m is not None)
    op(attention, kind, "forward", Prompts(session.owner, module, through, project))
