"""Options of the language network: which a saved adapter may name, and how they are put over a configuration."""

from __future__ import annotations

from typing import Any

from zoo.families.transformers_family import Fields

__all__ = ["TEXT_OPTIONS", "merged"]

# What a saved adapter may say of the language network: fields of its configuration
TEXT_OPTIONS: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"), range(1, 65537)
    ),
    "num_hidden_layers": range(1, 257),
    **dict.fromkeys(
        ("vocab_size", "max_position_embeddings", "sliding_window", "max_window_layers"), range(10_000_001)
    ),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), range(10_000_001)),
    **dict.fromkeys(("rms_norm_eps", "initializer_range", "attention_dropout", "rope_theta"), float),
    **dict.fromkeys(("tie_word_embeddings", "use_sliding_window", "attention_bias", "mlp_bias", "use_cache"), bool),
    "hidden_act": ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"),
    "layer_types": str,
    "model_type": ("llama", "mistral", "qwen2", "qwen3"),
    "rope_parameters": {
        "rope_type": ("default", "linear", "dynamic", "yarn", "longrope", "llama3"),
        "rope_theta": float,
        "factor": float,
        "mrope_section": range(1, 4097),
        "mrope_interleaved": bool,
        **dict.fromkeys(("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), float),
    },
}


def merged(fields: Fields, options: Fields) -> Fields:
    """Fields with options over them, also inside of configurations of parts."""
    found = dict(fields)
    for key, value in options.items():
        own = found.get(key)
        found[key] = merged(own, value) if isinstance(own, dict) and isinstance(value, dict) else value
    return found
