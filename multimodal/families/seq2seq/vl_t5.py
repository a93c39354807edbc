"""VL-T5 and T5: pre-norm blocks with RMS norms, no biases, and relative positions (`T5ForConditionalGeneration`).

    encoder: u = x + D(Attn(N1 x)), y = u + D(MLP(N2 u));   decoder: the same with a cross-attention between the two
    MLP: W_o relu(W_i x), or, gated (v1.1): W_o (gelu(W_0 x) * (W_1 x)), where W_0 is `gate` and W_1 is `up`

Visual input: `multimodal.families.seq2seq.vl_models`. Sources: Cho et al., "Unifying Vision-and-Language Tasks via Text
Generation", ICML 2021
(j-min/VL-T5); Raffel et al., T5, JMLR 2020. Counts: T5-base 222,903,552; VL-T5 224,540,160.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from multimodal.families.seq2seq.family import Seq2Seq
from multimodal.families.seq2seq.words import EASY_VQA, vocabulary_size
from zoo.points.rows import Row
from zoo.registry import register_backbone

BASE: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 3072,
    "num_layers": 12,
    "num_heads": 12,
    "decoder_start_token_id": 0,
}
MICRO: dict[str, Any] = {
    "vocab_size": vocabulary_size(EASY_VQA),
    "d_model": 192,
    "d_kv": 48,
    "d_ff": 512,
    "num_layers": 3,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "feat_dim": 192,
}


def _attention(name: str, norm: str, layer: int, inner: str) -> tuple[Row, ...]:
    """Rows of one attention: its norm, projections, product and sublayer."""
    path = f"layer.{layer}.{inner}"
    return (
        Row("norm", "norm", norm, f"layer.{layer}.layer_norm"),
        Row("linear", "q", f"{name}.q", f"{path}.q"),
        Row("linear", "k", f"{name}.k", f"{path}.k"),
        Row("linear", "v", f"{name}.v", f"{path}.v"),
        Row("attention", name, f"{name}.product", path),
        Row("linear", "o", f"{name}.o", f"{path}.o"),
        Row("sublayer", name, name, path, entry=f"layer.{layer}.layer_norm", exit=f"layer.{layer}.dropout"),
    )


def _mlp(layer: int) -> tuple[Row, ...]:
    path = f"layer.{layer}.DenseReluDense"
    return (
        Row("norm", "norm", "norm2", f"layer.{layer}.layer_norm"),
        Row("linear", "up", "mlp.up", f"{path}.wi"),
        Row("linear", "gate", "mlp.gate", f"{path}.wi_0"),
        Row("linear", "up", "mlp.up", f"{path}.wi_1"),
        Row("linear", "down", "mlp.down", f"{path}.wo"),
        Row("sublayer", "mlp", "mlp", path, entry=f"layer.{layer}.layer_norm", exit=f"layer.{layer}.dropout"),
        Row("block", "block", "", ""),
    )


@register_backbone
class VLT5Backbone(Seq2Seq):
    """`vl-t5`, `t5-base` and so on, or `transformers:<repository or folder>` of the type t5."""

    family = "vl-t5"
    aliases = {
        "vl-t5": "zoo:vl-t5",
        "vl-t5-micro": "zoo:vl-t5-micro",
        "t5-base": "zoo:t5-base",
    }
    model_type = "t5"
    config_class = "T5Config"
    classes = ("T5ForConditionalGeneration", "VLT5")
    members = {
        "zoo:vl-t5": ("google-t5/t5-base", BASE),
        "zoo:t5-base": ("google-t5/t5-base", {**BASE, "feat_dim": None}),
        "zoo:vl-t5-micro": (None, MICRO),
    }
    front_ends = {"vl-t5-micro": ("vit-micro", {"pool": (4, 4), "reduce": "mean"})}
    vocabularies = {32128: 32200}
    encoder_path, decoder_path, blocks_path = "encoder", "decoder", "block"
    word_key = "shared.weight"
    encoder_table = (Row("tokens", "tokens", "tokens", ""), *_attention("attn", "norm1", 0, "SelfAttention"), *_mlp(1))
    decoder_table = (
        *_attention("attn", "norm1", 0, "SelfAttention"),
        *_attention("cross", "norm_cross", 1, "EncDecAttention"),
        *_mlp(2),
    )
    stack_norms = (("", ""), ("norm", "final_layer_norm"))
    elementwise = ("layer.1.DenseReluDense.act", "layer.2.DenseReluDense.act")
    tiny = (
        "vl-t5",
        {
            "vocab_size": 60,
            "d_model": 32,
            "d_ff": 64,
            "d_kv": 8,
            "num_heads": 4,
            "num_layers": 2,
            "feat_dim": 6,
            "initializer_factor": 0.5,
        },
    )

    @property
    def attention_site(self) -> Any:  # type: ignore[override]
        """The site of an attention whose keys are extended."""
        from multimodal.families.seq2seq.attention import T5Site

        return T5Site

    @property
    def encoder_site(self) -> Any:  # type: ignore[override]
        """The site of the encoder, for prompts that flow."""
        from multimodal.families.seq2seq.attention import T5EncoderSite

        return T5EncoderSite

    @staticmethod
    def passed_by(y: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Tokens, and the positions of both attentions as they came."""
        given = dict(zip(("hidden_states", "attention_mask", "position_bias"), args)) | kwargs
        cross = args[5] if len(args) > 5 else given.get("encoder_decoder_position_bias")
        return y, given.get("position_bias"), cross

    def heads(self, stack: Any) -> tuple[int, int]:
        """(number of heads, width of one); T5's heads need not fill the width."""
        return self.config.num_heads, self.config.d_kv

    def self_attention(self, block: Any) -> nn.Module:
        """The self-attention of an encoder block."""
        return block.layer[0].SelfAttention  # type: ignore[no-any-return]

    def prompt_keys(self, block: Any) -> Any:
        """Through the block's norm."""
        from multimodal.families.seq2seq.attention import SplitKeys

        attention = block.layer[0].SelfAttention
        return SplitKeys(block.layer[0].layer_norm, attention.k, attention.v, attention.key_value_proj_dim)
