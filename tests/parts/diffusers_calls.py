"""The library's own call of each class of transformers, written out as its pipeline makes it, by the pipeline's own helpers."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

from zoo.registry import family

FAMILIES = ("mmdit", "mmdit-video", "cross-dit", "cross-dit-video", "cogview", "single-dit")
MEMBERS = {made: name for name in FAMILIES for made in family(name).members}  # type: ignore[attr-defined]


def make(made: str, *adapters: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """A tiny random member with adapters that are not at their start, and a batch of two."""
    import zoo

    member = family(MEMBERS[made]).members[made]  # type: ignore[attr-defined]
    torch.manual_seed(0)
    model = zoo.load(f"diffusers:{made}", pretrained=False, **member.tiny).eval()
    batch = model.family.tiny_batch()
    torch.manual_seed(1)
    for adapter in adapters:
        model.add_adapter(adapter)
    with torch.no_grad():
        for parameter in model.parameters_to_train().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, batch


def _packed(pipe: Any, module: Any, latents: Tensor, **call: Any) -> Tensor:
    count, channels, height, width = latents.shape
    flow = module(hidden_states=pipe._pack_latents(latents, count, channels, height, width), **call).sample
    return diffusers.FluxPipeline._unpack_latents(flow, 8 * height, 8 * width, 8)


def library_call(made: str, module: Any, batch: tuple[Tensor, ...]) -> Tensor:
    """What the library answers to a tiny batch."""
    latents, steps, text, *more = batch
    count, height, width = len(latents), latents.shape[-2], latents.shape[-1]
    words = text.shape[1]
    if made == "ChromaTransformer2DModel":
        pipe = diffusers.ChromaPipeline
        grid = pipe._prepare_latent_image_ids(count, height // 2, width // 2, "cpu", torch.float32)
        mask = torch.cat([more[0], torch.ones(count, height * width // 4)], dim=1)
        call = {"img_ids": grid, "txt_ids": torch.zeros(words, 3), "attention_mask": mask}
        return _packed(pipe, module, latents, timestep=steps / 1000, encoder_hidden_states=text, **call)
    if made == "BriaTransformer2DModel":
        grid = diffusers.BriaPipeline._prepare_latent_image_ids(count, height // 2, width // 2, "cpu", torch.float32)
        call = {"img_ids": grid, "txt_ids": torch.zeros(words, 3)}
        return _packed(diffusers.BriaPipeline, module, latents, timestep=steps, encoder_hidden_states=text, **call)
    if made == "LongCatImageTransformer2DModel":
        from diffusers.pipelines.longcat_image.pipeline_longcat_image import prepare_pos_ids

        call = {
            "img_ids": prepare_pos_ids(1, "image", (512, 512), height=height // 2, width=width // 2),
            "txt_ids": prepare_pos_ids(0, "text", (0, 0), num_token=words),
        }
        pipe = diffusers.LongCatImagePipeline
        return _packed(pipe, module, latents, timestep=steps / 1000, encoder_hidden_states=text, **call)
    if made == "OvisImageTransformer2DModel":
        pipe = diffusers.OvisImagePipeline
        places = torch.zeros(words, 3)
        places[:, 1:] = torch.arange(words)[:, None]
        grid = pipe._prepare_latent_image_ids(count, height // 2, width // 2, "cpu", torch.float32)
        call = {"img_ids": grid, "txt_ids": places}
        return _packed(pipe, module, latents, timestep=steps / 1000, encoder_hidden_states=text, **call)
    if made == "Flux2Transformer2DModel":
        pipe = diffusers.Flux2Pipeline
        flow = module(
            hidden_states=pipe._pack_latents(latents),
            timestep=steps / 1000,
            guidance=torch.full((count,), 4.0),
            encoder_hidden_states=text,
            txt_ids=pipe._prepare_text_ids(text),
            img_ids=pipe._prepare_latent_ids(latents),
        ).sample
        return flow.permute(0, 2, 1).reshape(latents.shape)
    if made == "QwenImageTransformer2DModel":
        shapes = [[(1, height // 2, width // 2)]] * count
        call = {"encoder_hidden_states_mask": more[0].bool(), "img_shapes": shapes, "guidance": None}
        pipe = diffusers.QwenImagePipeline
        return _packed(pipe, module, latents, timestep=steps / 1000, encoder_hidden_states=text, **call)
    if made == "AuraFlowTransformer2DModel":
        return module(latents, encoder_hidden_states=text, timestep=steps / 1000).sample
    if made == "HunyuanImageTransformer2DModel":
        return module(latents, steps, text, more[0]).sample
    if made == "HunyuanVideoTransformer3DModel":
        return module(latents, steps, text, more[0], more[1], torch.full((count,), 6000.0)).sample
    if made == "HunyuanVideo15Transformer3DModel":
        mask, words_2, mask_2, image, joined = more
        call = {"encoder_hidden_states_2": words_2, "encoder_attention_mask_2": mask_2, "image_embeds": image}
        return module(torch.cat([latents, joined], dim=1), steps, text, mask, **call).sample
    if made == "MochiTransformer3DModel":
        return module(latents, text, steps, more[0].bool()).sample
    if made == "HunyuanDiT2DModel":
        from diffusers.models.embeddings import get_2d_rotary_pos_embed
        from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

        grid = (height // 2, width // 2)
        region = get_resize_crop_region_for_grid(grid, 32)
        turned = get_2d_rotary_pos_embed(module.config.attention_head_dim, region, grid, device="cpu", output_type="pt")
        size = torch.tensor([[8.0 * height, 8.0 * width] * 2 + [0.0, 0.0]] * count)
        mask, text_t5, mask_t5 = more
        call = {"image_meta_size": size, "style": torch.zeros(count, dtype=torch.long), "image_rotary_emb": turned}
        return module(
            latents,
            steps,
            encoder_hidden_states=text,
            text_embedding_mask=mask,
            encoder_hidden_states_t5=text_t5,
            text_embedding_mask_t5=mask_t5,
            **call,
        ).sample
    if made in ("SanaTransformer2DModel", "SanaVideoTransformer3DModel"):
        return module(latents, encoder_hidden_states=text, timestep=steps, encoder_attention_mask=more[0]).sample
    if made in ("WanTransformer3DModel", "SkyReelsV2Transformer3DModel"):
        return module(latents, steps, text).sample
    if made == "LTXVideoTransformer3DModel":
        packed = diffusers.LTXPipeline._pack_latents(latents, 1, 1)
        frames = latents.shape[2]
        call = {"num_frames": frames, "height": height, "width": width, "rope_interpolation_scale": (8 / 25, 32, 32)}
        flow = module(packed, text, steps, more[0], **call).sample
        return diffusers.LTXPipeline._unpack_latents(flow, frames, height, width, 1, 1)
    if made == "LatteTransformer3DModel":
        return module(latents, timestep=steps, encoder_hidden_states=text).sample
    if made in ("CogView3PlusTransformer2DModel", "CogView4Transformer2DModel"):
        size = torch.tensor([[8.0 * height, 8.0 * width]] * count)
        return module(latents, text, steps, size, size, torch.zeros(count, 2)).sample
    if made == "Lumina2Transformer2DModel":
        return -module(latents, 1 - steps / 1000, text, more[0].bool()).sample
    if made == "ZImageTransformer2DModel":
        texts = [one[keep.bool()] for one, keep in zip(text, more[0], strict=True)]
        found = module(list(latents.unsqueeze(2).unbind(0)), (1000 - steps) / 1000, texts).sample
        return -torch.stack(found).squeeze(2)
    raise AssertionError(f"no call of a {made} is written down")
