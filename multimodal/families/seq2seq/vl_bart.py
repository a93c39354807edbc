"""VL-BART and BART: post-norm blocks with learned positions (`BartForConditionalGeneration`).

    encoder: u = LN1(x + D(Attn x)), y = LN2(u + D(MLP u));   decoder: the same with a cross-attention between the two

A sublayer's input is the residual stream itself; the norms stand behind the sum. Visual input:
`multimodal.families.seq2seq.vl_models`.
Sources: Cho et al., ICML 2021 (j-min/VL-T5); Lewis et al., BART, ACL 2020. Counts: BART-base 139,420,416; VL-BART 141,156,864
with norms of their own for features and boxes, as in VL-Adapter. The authors' later runs of VL-BART have one norm over the sum
(`individual_vis_layer_norm=False`); a `checkpoint` tells which.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from multimodal.families.seq2seq.family import Seq2Seq
from multimodal.families.seq2seq.words import VISUAL
from zoo.points.point import tokens_alone
from zoo.points.rows import Row
from zoo.registry import register_backbone

BASE: dict[str, Any] = {
    "vocab_size": 50265,
    "d_model": 768,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_attention_heads": 12,
    "decoder_attention_heads": 12,
    "encoder_ffn_dim": 3072,
    "decoder_ffn_dim": 3072,
    "attention_dropout": 0.1,
    "activation_dropout": 0.1,
}


def _attention(name: str, norm: str, path: str) -> tuple[Row, ...]:
    """Rows of one attention: projections, product, sublayer, and the norm behind the residual sum."""
    return (
        Row("linear", "q", f"{name}.q", f"{path}.q_proj"),
        Row("linear", "k", f"{name}.k", f"{path}.k_proj"),
        Row("linear", "v", f"{name}.v", f"{path}.v_proj"),
        Row("attention", name, f"{name}.product", path),
        Row("linear", "o", f"{name}.o", f"{path}.out_proj"),
        Row("sublayer", name, name, path, entry=f"{path}:input", exit=f"{path}:output"),
        Row("norm", "norm", norm, f"{path}_layer_norm"),
    )


MLP = (
    Row("linear", "up", "mlp.up", "fc1"),
    Row("linear", "down", "mlp.down", "fc2"),
    Row("sublayer", "mlp", "mlp", "fc2", entry="fc1:input", exit="fc2:output"),
    Row("norm", "norm", "norm2", "final_layer_norm"),
    Row("block", "block", "", ""),
)


@register_backbone
class VLBartBackbone(Seq2Seq):
    """`vl-bart`, `bart-base`, or `transformers:<repository or folder>` of the type bart."""

    family = "vl-bart"
    aliases = {"vl-bart": "zoo:vl-bart", "bart-base": "zoo:bart-base"}
    model_type = "bart"
    config_class = "BartConfig"
    classes = ("BartForConditionalGeneration", "VLBart")
    members = {
        "zoo:vl-bart": ("facebook/bart-base", BASE),
        "zoo:bart-base": ("facebook/bart-base", {**BASE, "feat_dim": None}),
    }
    vocabularies = {50265: 50465}
    encoder_path, decoder_path, blocks_path = "model.encoder", "model.decoder", "layers"
    word_key = "model.shared.weight"
    encoder_table = (Row("tokens", "tokens", "tokens", ""), *_attention("attn", "norm1", "self_attn"), *MLP)
    decoder_table = (
        *_attention("attn", "norm1", "self_attn"),
        *_attention("cross", "norm_cross", "encoder_attn"),
        *MLP,
    )
    passed_by = staticmethod(tokens_alone)
    stack_norms = (("embed_norm", "layernorm_embedding"), ("", ""))
    elementwise = ("activation_fn",)
    tiny = (
        "vl-bart",
        {
            "vocab_size": 60,
            "d_model": 32,
            "max_position_embeddings": 40,
            **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
            **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
            **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64),
            "feat_dim": 6,
        },
    )

    @property
    def attention_site(self) -> Any:  # type: ignore[override]
        """The site of an attention whose keys are extended."""
        from multimodal.families.seq2seq.attention import BartSite

        return BartSite

    @property
    def encoder_site(self) -> Any:  # type: ignore[override]
        """The site of the encoder, for prompts that flow."""
        from multimodal.families.seq2seq.attention import BartEncoderSite

        return BartEncoderSite

    def heads(self, stack: Any) -> tuple[int, int]:
        """(number of heads, width of one) in a stack."""
        count = self.config.decoder_attention_heads if stack is self.decoder else self.config.encoder_attention_heads
        return count, self.config.d_model // count

    def self_attention(self, block: Any) -> nn.Module:
        """The self-attention of an encoder block."""
        return block.self_attn  # type: ignore[no-any-return]

    def prompt_keys(self, block: Any) -> Any:
        """As they are: there is no norm in front of the projections."""
        from multimodal.families.seq2seq.attention import SplitKeys

        return SplitKeys(None, block.self_attn.k_proj, block.self_attn.v_proj, block.self_attn.head_dim)

    def visual_words(self) -> list[str]:
        """BART's vocabulary lacks the words of T5's gaps; the released one has both."""
        return [f"<extra_id_{i}>" for i in reversed(range(VISUAL))] + super().visual_words()
