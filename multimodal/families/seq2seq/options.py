"""The fields of a text network's configuration that a saved adapter may name, each with its range (`zoo.disk.trust`)."""

from __future__ import annotations

from typing import Any

_SIZES = (
    *("d_model", "d_kv", "d_ff", "num_heads", "relative_attention_num_buckets", "relative_attention_max_distance"),
    *("encoder_attention_heads", "decoder_attention_heads", "encoder_ffn_dim", "decoder_ffn_dim"),
    *("max_position_embeddings", "feat_dim", "n_images"),
)
_NUMBERS = (
    *("dropout_rate", "layer_norm_epsilon", "initializer_factor", "dropout", "attention_dropout", "activation_dropout"),
    *("classifier_dropout", "encoder_layerdrop", "decoder_layerdrop", "init_std"),
)
_YES_NO = (
    *("use_vis_order_embedding", "use_vis_layer_norm", "individual_vis_layer_norm", "tie_word_embeddings"),
    *("scale_embedding", "use_cache"),
)
# What a saved adapter may say of its backbone: fields of the configuration; never a `checkpoint`
OPTIONS: dict[str, Any] = {
    **dict.fromkeys(_SIZES, range(1, 65537)),
    **dict.fromkeys(("num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"), range(1, 257)),
    "vocab_size": range(1, 1_000_001),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), range(1_000_001)),
    **dict.fromkeys(_NUMBERS, float),
    **dict.fromkeys(_YES_NO, bool),
    "feed_forward_proj": ("relu", "gelu", "gated-gelu", "gated-silu"),
    "activation_function": ("gelu", "gelu_new", "relu", "silu"),
    "words": str,
}
