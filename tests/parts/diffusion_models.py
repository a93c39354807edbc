"""Tiny members of the families of diffusers, and the library's own call of each."""

from __future__ import annotations

import functools
from typing import Any

import diffusers
import torch
from torch import Tensor

import zoo
from zoo.table import tiny_model

XL: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 4}


def make(name: str, *adapters: Any) -> tuple[zoo.Model, tuple[Tensor, ...]]:
    """A tiny random member with adapters that are not at their start, and a batch of two."""
    model, batch = tiny_model(name)
    torch.manual_seed(1)
    for adapter in adapters:
        model.add_adapter(adapter)
    with torch.no_grad():
        for parameter in model.parameters_to_train().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, batch


def library_answer(name: str, module: Any, batch: tuple[Tensor, ...], **more: Any) -> Tensor:
    """The library's own call, written out."""
    latents, steps, *rest = batch
    if name == "dit":
        return module(latents, timestep=steps, class_labels=rest[0]).sample
    if name == "pixart":
        return module(latents, rest[0], steps, {"resolution": None, "aspect_ratio": None}, None, None, rest[1]).sample
    if name == "sd3":
        return module(latents, rest[0], rest[1], steps).sample
    if name == "cogvideox":
        from diffusers import CogVideoXPipeline

        pipe: Any = CogVideoXPipeline(None, None, None, module, None)
        turned = pipe._prepare_rotary_positional_embeddings(64, 64, latents.shape[1], torch.device("cpu"))
        return module(latents, rest[0], steps, image_rotary_emb=turned).sample
    from diffusers import FluxPipeline as Pipe

    count, channels, height, width = latents.shape
    packed = Pipe._pack_latents(latents, count, channels, height, width)
    places = Pipe._prepare_latent_image_ids(count, height // 2, width // 2, latents.device, latents.dtype)
    words, guidance = torch.zeros(rest[0].shape[1], 3), torch.full((count,), 3.5)
    flow = module(packed, rest[0], rest[1], steps / 1000, places, words, guidance).sample
    return Pipe._unpack_latents(flow, 8 * height, 8 * width, 8)


def tiny_vae() -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        layers_per_block=1,
    ).eval()


def tiny_video_vae() -> Any:
    return diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2
    ).eval()


def prepended(own: Any, prefix: Any) -> Any:
    """A processor that puts keys and values in front of those that the library's own one, which it runs, has computed."""
    product = torch.nn.functional.scaled_dot_product_attention

    def longer(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        keys, values = (p.expand(len(key), -1, -1, -1) for p in prefix(len(key)))
        if attn_mask is not None:
            seen = attn_mask.new_full((*attn_mask.shape[:-1], keys.shape[2]), attn_mask.dtype == torch.bool)
            attn_mask = torch.cat([seen, attn_mask], dim=-1)
        more = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
        return product(query, *more, attn_mask=attn_mask, **options)

    @functools.wraps(type(own).__call__)  # the library reads its parameters
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        torch.nn.functional.scaled_dot_product_attention = longer
        try:
            return type(own).__call__(self, *args, **kwargs)
        finally:
            torch.nn.functional.scaled_dot_product_attention = product

    return type("Prepended", (type(own),), {"__call__": call})()
