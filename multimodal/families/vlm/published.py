"""Configurations of published language models with eyes: fields in which they differ from the library's defaults."""

from __future__ import annotations

from typing import Any

__all__ = ["PUBLISHED", "SHORT"]


def _text(width: int, layers: int, heads: int, keys: int, inner: int, words: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "intermediate_size": inner,
        "vocab_size": words,
        **more,
    }


def _turned(theta: float, *sections: int, **more: Any) -> dict[str, Any]:
    """Rotary positions of time, height and width."""
    return {"rope_type": "default", "rope_theta": theta, "mrope_section": list(sections), **more}


def _qwen2(width: int, layers: int, heads: int, keys: int, inner: int, words: int, eyes: str, **vision: Any) -> Any:
    text = _text(width, layers, heads, keys, inner, words, rms_norm_eps=1e-6, max_window_layers=layers)
    text["rope_parameters"] = _turned(1e6, 16, 24, 24)
    return {"text_config": text, "vision_config": {eyes: width, **vision}, "tie_word_embeddings": words < 152000}


def _qwen3(width: int, layers: int, heads: int, inner: int) -> Any:
    text = _text(width, layers, heads, 8, inner, 151936, head_dim=128, max_position_embeddings=262144)
    text["rope_parameters"] = _turned(5e6, 24, 20, 20, mrope_interleaved=True)
    vision = {
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "out_hidden_size": width,
        "deepstack_visual_indexes": [5, 11, 17],
    }
    return {"text_config": text, "vision_config": vision, "tie_word_embeddings": True}


def _siglip(width: int, layers: int, heads: int, inner: int, image: int, patch: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "image_size": image,
        "patch_size": patch,
    }


def _smol(text: dict[str, Any], vision: dict[str, Any], scale: int) -> dict[str, Any]:
    own = {"model_type": "llama", "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, **text}
    return {
        "text_config": own,
        "vision_config": vision,
        "scale_factor": scale,
        "image_token_id": 49190,
    }


_SO400M = (1152, 27, 16, 4304)
_QWEN25 = {"hidden_size": 1280}
_LLAVA: dict[str, Any] = {
    "text_config": {
        "model_type": "llama",
        "vocab_size": 32064,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    "vision_config": {"model_type": "clip_vision_model", "projection_dim": 768, **_siglip(1024, 24, 16, 4096, 336, 14)},
}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen/Qwen2-VL-2B-Instruct": ("qwen2_vl", _qwen2(1536, 28, 12, 2, 8960, 151936, "hidden_size")),
    "Qwen/Qwen2-VL-7B-Instruct": ("qwen2_vl", _qwen2(3584, 28, 28, 4, 18944, 152064, "hidden_size")),
    "Qwen/Qwen2.5-VL-3B-Instruct": (
        "qwen2_5_vl",
        _qwen2(2048, 36, 16, 2, 11008, 151936, "out_hidden_size", **_QWEN25),
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": (
        "qwen2_5_vl",
        _qwen2(3584, 28, 28, 4, 18944, 152064, "out_hidden_size", **_QWEN25),
    ),
    "Qwen/Qwen3-VL-2B-Instruct": ("qwen3_vl", _qwen3(2048, 28, 16, 6144)),
    "Qwen/Qwen3-VL-4B-Instruct": ("qwen3_vl", _qwen3(2560, 36, 32, 9728)),
    "HuggingFaceTB/SmolVLM-256M-Instruct": (
        "idefics3",
        _smol(_text(576, 30, 9, 3, 1536, 49280), _siglip(768, 12, 12, 3072, 512, 16), 4),
    ),
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": (
        "smolvlm",
        _smol(_text(2048, 24, 32, 32, 8192, 49280), _siglip(*_SO400M, 384, 14), 3),
    ),
    "llava-hf/llava-1.5-7b-hf": ("llava", _LLAVA),
}
SHORT = {
    "qwen2-vl-2b": "Qwen/Qwen2-VL-2B-Instruct",
    "qwen2-vl-7b": "Qwen/Qwen2-VL-7B-Instruct",
    "qwen2.5-vl-3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "qwen2.5-vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwen3-vl-2b": "Qwen/Qwen3-VL-2B-Instruct",
    "qwen3-vl-4b": "Qwen/Qwen3-VL-4B-Instruct",
    "smolvlm-256m": "HuggingFaceTB/SmolVLM-256M-Instruct",
    "smolvlm2-2.2b": "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
    "llava-1.5-7b": "llava-hf/llava-1.5-7b-hf",
}
