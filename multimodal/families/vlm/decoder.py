"""Decoder language models of transformers: LLaMA, Qwen2 (2.5) and Qwen3 (`LlamaForCausalLM` and so on).

    features(input_ids (B, L), attention_mask (B, L), answer (B, T)) -> scores (B, L, V), or of the answer's words (B, T, V)

Sources: Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", 2023; "Llama 2", 2023; Yang et al., "Qwen2
Technical Report", 2024; "Qwen3 Technical Report", 2025. Counts: LLaMA-7B 6,738,415,616; Qwen2-0.5B 494,032,768; Qwen3-0.6B
596,049,920.
"""

from __future__ import annotations

from typing import Any

from multimodal.families.vlm.base import LanguageBackbone
from zoo.points import Point
from zoo.registry import register_backbone


def llama(width: int, layers: int, heads: int, inner: int, **more: Any) -> dict[str, Any]:
    """Fields of LLaMA's configuration that change with its size."""
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        **more,
    }


QWEN2 = llama(896, 24, 14, 4864, num_key_value_heads=2, tie_word_embeddings=True, vocab_size=151936)
QWEN3 = llama(1024, 28, 16, 3072, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, vocab_size=151936)
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}


@register_backbone
class Decoder(LanguageBackbone):
    """`llama-7b`, `qwen2-0.5b`, `qwen3-0.6b` and so on, or `transformers:<repository or folder>` of these types."""

    family = "decoder"
    modality = "text"
    noun = "texts"
    library_classes = {
        "llama": ("LlamaConfig", "LlamaForCausalLM"),
        "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
        "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    }
    configs = {
        "huggyllama/llama-7b": ("llama", {}),
        "huggyllama/llama-13b": ("llama", llama(5120, 40, 40, 13824)),
        "huggyllama/llama-30b": ("llama", llama(6656, 60, 52, 17920)),
        "huggyllama/llama-65b": ("llama", llama(8192, 80, 64, 22016, rms_norm_eps=1e-5)),
        "meta-llama/Llama-2-7b-hf": ("llama", {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}),
        "Qwen/Qwen2-0.5B-Instruct": ("qwen2", {**QWEN2, **THETA}),
        "Qwen/Qwen2.5-0.5B-Instruct": ("qwen2", {**QWEN2, **THETA}),
        "Qwen/Qwen3-0.6B": ("qwen3", {**QWEN3, **THETA, "max_position_embeddings": 40960}),
    }
    aliases = {
        "llama-7b": "transformers:huggyllama/llama-7b",
        "llama-13b": "transformers:huggyllama/llama-13b",
        "llama-30b": "transformers:huggyllama/llama-30b",
        "llama-65b": "transformers:huggyllama/llama-65b",
        "llama2-7b": "transformers:meta-llama/Llama-2-7b-hf",
        "qwen2-0.5b": "transformers:Qwen/Qwen2-0.5B-Instruct",
        "qwen2.5-0.5b": "transformers:Qwen/Qwen2.5-0.5B-Instruct",
        "qwen3-0.6b": "transformers:Qwen/Qwen3-0.6B",
    }
    layout = ("model.layers.0.self_attn.q_proj",)
    left_out = ("*.rotary_emb.inv_freq",)
    elementwise = ("mlp.act_fn",)
    tiny = (
        "qwen2-0.5b",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 60,
            "initializer_range": 0.3,
        },
    )

    def points(self) -> list[Point]:
        """Those of the blocks, and the norm behind them."""
        return self.language_points("")
