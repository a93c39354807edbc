"""Building open_clip models by name, with attentions that points can stand in."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from zoo.errors import ConfigError
from zoo.library import library


def parts(name: str) -> tuple[str, str]:
    """ "open_clip:ViT-B-32/openai" -> ("ViT-B-32", "openai"); a schema of open_clip's own (`hf-hub:`) has no tag."""
    name = name.removeprefix("open_clip:")
    if name.startswith(("hf-hub:", "local-dir:")):
        return name, ""
    architecture, _, tag = name.partition("/")
    return architecture, tag


_TOWER: dict[str, Any] = {
    **dict.fromkeys(("width", "image_size", "vocab_size", "context_length"), range(1, 1_000_001)),
    **dict.fromkeys(("layers", "heads", "head_width", "patch_size"), range(1, 257)),
    **dict.fromkeys(("attn_pooler_queries", "attn_pooler_heads"), range(1, 4097)),
    **dict.fromkeys(("pad_id", "eos_id"), range(1_000_001)),
    **dict.fromkeys(("mlp_ratio", "ls_init_value", "patch_dropout"), float),
    **dict.fromkeys(
        (
            *("no_ln_pre", "final_ln_after_pool", "output_tokens", "attentional_pool", "embed_cls", "no_causal_mask"),
            *(
                "proj_bias",
                "qk_norm",
                "scaled_cosine_attn",
                "scale_heads",
                "scale_attn_inner",
                "scale_attn",
                "scale_fc",
            ),
        ),
        bool,
    ),
    "pool_type": ("tok", "avg", "none", "first", "last", "argmax", "eos"),
    "pos_embed_type": ("learnable", "sin_cos_2d"),
    "proj_type": ("linear", "none"),
    "block_type": ("default", "custom"),
    "norm_kwargs": {"eps": float},
    # a tower of timm's own registry (a colon would be somebody's repository), with random weights or those of the whole
    "timm_model_name": re.compile(r"[a-z]\w*"),
    "timm_pool": ("", "avg", "abs_attn", "rot_attn", "map", "token"),
    "timm_proj": ("", "linear", "mlp", "none"),
    "timm_proj_bias": bool,
    **dict.fromkeys(("timm_drop", "timm_drop_path"), float),
}
# What a saved adapter may say of its backbone: sizes and forms, nothing that is read from somewhere
SAVED_OPTIONS: dict[str, Any] = {
    "tower": ("image", "text", "both"),
    "image_size": range(1, 8193),
    "context_length": range(1, 65537),
    "embed_dim": range(1, 65537),
    "vision_cfg": _TOWER,
    "text_cfg": _TOWER,
    **dict.fromkeys(("init_logit_scale", "init_logit_bias"), float),
    **dict.fromkeys(("quick_gelu", "force_quick_gelu", "nonscalar_logit_scale"), bool),
}


def registered(name: str) -> bool:
    """Whether `open_clip:<architecture>[/<tag>]` is all in open_clip's own registry."""
    architecture, tag = parts(name)
    if ":" in architecture:
        return False
    return not tag or tag in library("open_clip", "multimodal").list_pretrained_tags_by_model(architecture)


def tag_config(architecture: str, tag: str) -> dict[str, Any]:
    """What open_clip knows of pretrained weights: their address, preprocessing and activation."""
    from open_clip.pretrained import get_pretrained_cfg

    return dict(get_pretrained_cfg(architecture, tag) or {}) if tag else {}


def create(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    """`open_clip.create_model`, or our own `zoo:clip-micro`.

    Raises:
        ConfigError: weights that cannot be had, or options that open_clip does not take.
    """
    if name.startswith("zoo:"):
        from multimodal.families.clip.micro import build

        for short, part in (("image_size", "vision_cfg"), ("context_length", "text_cfg")):
            if short in options:
                options = {**options, part: {**options.get(part, {}), short: options[short]}}
        return build(pretrained, **{k: v for k, v in options.items() if k not in ("image_size", "context_length")})
    open_clip = library("open_clip", "multimodal")
    architecture, tag = parts(name)
    if pretrained and not tag and ":" not in architecture:
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        raise ConfigError(
            f"'{name}' names no weights: write 'open_clip:{architecture}/<tag>' with one of {', '.join(tags) or '(none)'}, or "
            "pass pretrained=False for random ones."
        )
    try:
        options = _options(open_clip, architecture, tag, pretrained, options)
        with _silent_about_random_weights(pretrained):
            module: nn.Module = open_clip.create_model(architecture, **options)
    except TypeError as error:
        raise ConfigError(f"open_clip does not take these options for '{name}': {error}") from error
    except Exception as error:
        if not pretrained and ":" not in architecture:
            if not isinstance(error, OSError):
                raise
            raise ConfigError(
                f"The text tower of '{name}' is a network of transformers, whose configuration comes from the Hub, for random "
                f"weights, too, and it could not be had: {type(error).__name__}: {error}. Check the network, or use an "
                "architecture with a text tower of open_clip's own."
            ) from error
        what = "pretrained weights" if pretrained else "configuration"
        raise ConfigError(
            f"The {what} of '{name}' could not be loaded: {type(error).__name__}: {error}. Check the network and the name "
            "(open_clip.list_pretrained()), or pass pretrained=False for random weights."
        ) from error
    return module


@contextmanager
def _silent_about_random_weights(pretrained: bool) -> Iterator[None]:
    """open_clip warns, on the root logger, that random weights are random; those who asked for them need no warning."""

    def wanted(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No pretrained weights loaded for model")

    root = logging.getLogger()
    if not pretrained:
        root.addFilter(wanted)
    try:
        yield
    finally:
        root.removeFilter(wanted)


def _options(open_clip: Any, architecture: str, tag: str, pretrained: bool, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `open_clip.create_model`."""
    options = dict(given)
    config, known = open_clip.get_model_config(architecture) or {}, tag_config(architecture, tag)
    for part in ("vision_cfg", "text_cfg"):
        if part in options:
            options[part] = {**config.get(part, {}), **options[part]}
    for short in ("image_size", "context_length"):
        if short in options:
            options[f"force_{short}"] = options.pop(short)
    # open_clip warns, but does not switch, where weights were trained with the approximate GELU
    if known.get("quick_gelu") and not config.get("quick_gelu"):
        options.setdefault("force_quick_gelu", True)
    options.setdefault("device", torch.get_default_device())
    if pretrained:
        return {"pretrained": tag or None, **options}
    preprocessing = {k: known[k] for k in ("mean", "std", "interpolation", "resize_mode") if k in known}
    return {"load_weights": False, "pretrained_hf": False, "force_preprocess_cfg": preprocessing, **options}


def swap(module: nn.Module) -> None:
    """Our attention in place of open_clip's in every block; biases of timm's that stand beside a projection, opened.

    Raises:
        MismatchError: an attention with options that ours does not describe.
    """
    from open_clip.transformer import CustomResidualAttentionBlock, ResidualAttentionBlock

    from multimodal.families.clip.attention import PackedAttention

    for block in module.modules():
        if isinstance(block, (ResidualAttentionBlock, CustomResidualAttentionBlock)):
            block.attn = PackedAttention(block.attn)
    if hasattr(module.visual, "trunk"):
        from zoo.families.timm_biases import open_biases

        open_biases(module)


def data_config(visual: Any) -> dict[str, Any]:
    """open_clip's preprocessing of an image tower, in the words of timm's data configuration."""
    own: dict[str, Any] = visual.preprocess_cfg
    size = own["size"]
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return {
        "input_size": (3, height, width),
        "mean": tuple(own["mean"]),
        "std": tuple(own["std"]),
        "interpolation": own["interpolation"],
        "crop_pct": 1.0,
        "crop_mode": {"shortest": "center", "squash": "squash", "longest": "border"}[own["resize_mode"]],
    }


def repository(name: str) -> str | None:
    """The Hub repository of a checkpoint by its name, as open_clip states it; None for one of ours or without one."""
    if name.startswith("zoo:"):
        return None
    architecture, tag = parts(name)
    if architecture.startswith("hf-hub:"):
        return architecture.removeprefix("hf-hub:")
    return (tag_config(architecture, tag).get("hf_hub") or "").strip("/") or None
