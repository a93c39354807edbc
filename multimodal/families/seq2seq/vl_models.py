"""VL-T5 and VL-BART as modules: transformers' T5 and BART, whose encoder also takes visual tokens.

    encoder input = [text ; visual]        text (B, L, d), visual (B, N, d) of `VisualEmbedding`

VL-T5: the relative position bias is that of the text among itself; every pair with a visual token in it has the bias 0.
VL-BART: visual tokens have no position embedding, and BART's embedding norm is for the text alone. The decoder is the library's,
and reads text and visual tokens. Without visual input both are the library's network, to the bit.

The keys are those of the library, and `encoder.visual_embedding.*` (`model.encoder.visual_embedding.*`), as in the released
files. This module imports transformers; it is imported when a network is built.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BartForConditionalGeneration, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.bart.modeling_bart import BartEncoder
from transformers.models.t5.modeling_t5 import T5LayerNorm, T5Stack

from multimodal.families.seq2seq.releases import cache_name
from multimodal.families.seq2seq.visual_embedding import VisualEmbedding

# What this release of the library calls the key-value cache in the forwards of its networks
_CACHE = cache_name(T5ForConditionalGeneration.forward) or "past_key_values"


def _visual_embedding(config: Any, norm: Any) -> VisualEmbedding:
    norms = "none"
    if config.use_vis_layer_norm:
        norms = "individual" if config.individual_vis_layer_norm else "sum"
    order = config.use_vis_order_embedding
    return VisualEmbedding(
        config.feat_dim, config.d_model, config.vocab_size, config.n_images, norms, norm, order=order
    )


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask (B, K), 1 where there is a token -> (B, 1, 1, K), 0 there and the least number elsewhere."""
    return (1 - mask[:, None, None].to(dtype)) * torch.finfo(dtype).min


def joint_mask(mask: Tensor, tokens: int, visual_mask: Tensor | None) -> Tensor:
    """The text's mask (B, L) and that of the visual tokens (B, N) (None: all are there) -> (B, L + N)."""
    if visual_mask is None:
        visual_mask = mask.new_ones(mask.shape[0], tokens)
    return torch.cat([mask, visual_mask.to(mask.dtype)], dim=1)


class _JointEncoder:
    """An encoder of the library, for text or for text and visual tokens."""

    embed_tokens: Any
    visual_embedding: VisualEmbedding

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        visual_features: Tensor | None = None,
        boxes: Tensor | None = None,
        image_ids: Tensor | None = None,
        object_ids: Tensor | None = None,
        visual_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """`last_hidden_state` (B, L + N, d); the library's own output without `visual_features`."""
        if visual_features is None:
            return super().forward(  # type: ignore[misc]
                input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
            )
        text = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        visual = self.visual_embedding(visual_features, boxes, image_ids, object_ids)
        return self.joint(text, attention_mask, visual, visual_mask)

    def joint(self, text: Tensor, mask: Tensor | None, visual: Tensor, visual_mask: Tensor | None) -> BaseModelOutput:
        """The output for text (B, L, d), without positions, and visual tokens (B, N, d), with their masks."""
        raise NotImplementedError


class JointT5Encoder(_JointEncoder, T5Stack):  # type: ignore[misc]
    """T5's encoder, for text or for text and visual tokens."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.visual_embedding = _visual_embedding(
            config, lambda: T5LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        )

    def joint(self, text: Tensor, mask: Tensor | None, visual: Tensor, visual_mask: Tensor | None) -> BaseModelOutput:
        """See `_JointEncoder`."""
        tokens, pairs = text.shape[1], visual.shape[1]
        if mask is None:
            mask = text.new_ones(text.shape[:2])
        mask = additive(joint_mask(mask, pairs, visual_mask), text.dtype)
        first: Any = self.block[0]
        bias = first.layer[0].SelfAttention.compute_bias(tokens, tokens, device=text.device)
        # One sum for all blocks: older releases of the library take the mask to be in a bias that is given
        bias = F.pad(bias.to(text.dtype), (0, pairs, 0, pairs)) + mask
        hidden = self.dropout(torch.cat([text, visual], dim=1))
        for block in self.block:
            hidden = block(hidden, None, bias)[0]
        return BaseModelOutput(last_hidden_state=self.dropout(self.final_layer_norm(hidden)))


class JointBartEncoder(_JointEncoder, BartEncoder):  # type: ignore[misc]
    """BART's encoder, for text or for text and visual tokens."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.visual_embedding = _visual_embedding(config, lambda: nn.LayerNorm(config.d_model))

    def joint(self, text: Tensor, mask: Tensor | None, visual: Tensor, visual_mask: Tensor | None) -> BaseModelOutput:
        """See `_JointEncoder`."""
        return encode_bart(self, text, mask, visual=visual, visual_mask=visual_mask)


def encode_bart(
    encoder: Any,
    words: Tensor,
    mask: Tensor | None,
    *,
    prompts: Tensor | None = None,
    visual: Tensor | None = None,
    visual_mask: Tensor | None = None,
) -> BaseModelOutput:
    """BART's encoder on [prompts ; words ; visual]; words (B, L, d) without positions, mask (B, L).

    Positions are those of the words; the embedding norm is for prompts and words.
    """
    if mask is None:
        mask = words.new_ones(words.shape[:2])
    text = words + encoder.embed_positions(words[:, :, -1]).to(words.device)  # it looks at the shape alone
    if prompts is not None:
        text = torch.cat([prompts, text], dim=1)
        mask = F.pad(mask, (prompts.shape[1], 0), value=1)
    hidden = encoder.layernorm_embedding(text)
    if visual is not None:
        hidden = torch.cat([hidden, visual], dim=1)
        mask = joint_mask(mask, visual.shape[1], visual_mask)
    hidden = F.dropout(hidden, p=encoder.dropout, training=encoder.training)
    added = additive(mask, hidden.dtype)
    for layer in encoder.layers:
        if encoder.training and encoder.layerdrop > 0 and torch.rand([]) < encoder.layerdrop:
            continue
        hidden = layer(hidden, added)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden  # as older releases of the library give it
    return BaseModelOutput(last_hidden_state=hidden)


class _Visual:
    """What both networks add to the library's: visual input to `forward` and `generate`."""

    config: Any
    _tied_weights_keys: Any

    def _tie(self, encoder: str, words: str) -> None:
        """Make the embedding of the object order that of the words, once more than the library does by itself."""
        if self.config.use_vis_order_embedding:
            own = {f"{encoder}visual_embedding.obj_order_embedding.weight": words}
            self._tied_weights_keys = {**self._tied_weights_keys, **own}
        self.post_init()  # type: ignore[attr-defined]

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None, **visual: Any) -> tuple[Any, Tensor]:
        """The encoder's output for text and visual tokens, and their mask (B, L + N).

        Without `attention_mask` the padding word is what is masked.
        """
        if attention_mask is None:
            attention_mask = input_ids.ne(self.config.pad_token_id).long()
        outputs = self.get_encoder()(input_ids=input_ids, attention_mask=attention_mask, **visual)  # type: ignore[attr-defined]
        return outputs, joint_mask(attention_mask, visual["visual_features"].shape[1], visual.get("visual_mask"))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        *,
        # The library's `generate` reads these names off the signature.
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        cache: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        visual_features: Tensor | None = None,
        boxes: Tensor | None = None,
        image_ids: Tensor | None = None,
        object_ids: Tensor | None = None,
        visual_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the library's; with `visual_features` (B, N, feat_dim) the encoder reads text and visual tokens."""
        if visual_features is not None:
            assert input_ids is not None
            encoder_outputs, attention_mask = self.encode(
                input_ids,
                attention_mask,
                visual_features=visual_features,
                boxes=boxes,
                image_ids=image_ids,
                object_ids=object_ids,
                visual_mask=visual_mask,
            )
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{_CACHE: past_key_values if cache is None else cache},
            **kwargs,
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        visual_features: Tensor | None = None,
        boxes: Tensor | None = None,
        image_ids: Tensor | None = None,
        object_ids: Tensor | None = None,
        visual_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The library's `generate` (`num_beams`, `max_new_tokens` and so on), also with visual input: the encoder runs once."""
        if visual_features is None:
            return super().generate(input_ids, attention_mask=attention_mask, **kwargs)  # type: ignore[misc]
        assert input_ids is not None
        outputs, mask = self.encode(
            input_ids,
            attention_mask,
            visual_features=visual_features,
            boxes=boxes,
            image_ids=image_ids,
            object_ids=object_ids,
            visual_mask=visual_mask,
        )
        return super().generate(encoder_outputs=outputs, attention_mask=mask, **kwargs)  # type: ignore[misc]


class VLT5(_Visual, T5ForConditionalGeneration):  # type: ignore[misc]
    """T5 with visual input (Cho et al., ICML 2021)."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.encoder = JointT5Encoder(self.encoder.config)
        self._tie("encoder.", "shared.weight")


class VLBart(_Visual, BartForConditionalGeneration):  # type: ignore[misc]
    """BART with visual input (Cho et al., ICML 2021)."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.encoder = JointBartEncoder(config)
        self._tie("model.encoder.", "model.shared.weight")
