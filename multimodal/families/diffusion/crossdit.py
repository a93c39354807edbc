"""Blocks of self attention, cross attention to a text, and MLP: diffusers' classes of PixArt's shape, of images and of videos.

One modulation for all blocks, to which each adds a table of its own (`multimodal.families.diffusion.pixart`); HunyuanDiT has a
norm with a shift instead. Where a class attends linearly (Sana), there is no product that more keys could take part in: such an
attention has no attention point. Sana's MLP is of convolutions on the grid of latents, which have linear points of the role
`conv`, and no sublayer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from multimodal.families.diffusion.described import (
    Blocks,
    DescribedBackbone,
    DescribedVideo,
    Input,
    Member,
    Released,
    aliases_of,
    tiny_of,
)
from multimodal.families.diffusion.family import embedder, timesteps
from multimodal.families.diffusion.tables import BLOCK, attention, branch, mlp, norms
from zoo.points.rows import Row
from zoo.registry import register_backbone


def plain(family: Any, module: nn.Module, latents: Tensor, steps: Tensor, **rest: Any) -> Tensor:
    """Latents as they are, time as the scheduler counts it."""
    return module(latents, timestep=steps, return_dict=False, **rest)[0]


def _mask(text: Tensor, mask: Any) -> Tensor:
    return text.new_ones(text.shape[:2]) if mask is None else mask


# -- Sana -----------------------------------------------------------------------------------------------------------------

CONVOLUTIONS = (
    Row("linear", "conv", "mlp.up", "ff.conv_inverted"),
    Row("linear", "conv", "mlp.depth", "ff.conv_depth"),
    Row("linear", "conv", "mlp.down", "ff.conv_point"),
    Row("linear", "conv", "mlp.frames", "ff.conv_temp"),
)
SANA = (
    *attention("attn", "attn1", product=False),
    branch("attn", "attn1", "attn", "norm1"),
    *attention("cross", "attn2", "cross"),
    branch("cross", "attn2", "cross"),
    *CONVOLUTIONS,
    BLOCK,
)
ADALN = (
    *embedder("time", "time_embed.emb.timestep_embedder"),
    ("linear", "modulation", "modulation", "time_embed.linear"),
)
GUIDED = (
    *embedder("time", "time_embed.timestep_embedder"),
    *embedder("guidance", "time_embed.guidance_embedder"),
)
CAPTION = embedder("text", "caption_projection")
PROJ_OUT = (("linear", "final", "final", "proj_out"),)
CAPTIONS = Input("encoder_hidden_states", "text", "caption_channels")
MASK = Input("encoder_attention_mask", "mask")


def sana(family: Any, module: nn.Module, latents: Tensor, steps: Tensor, guidance: Any = 4.5, **rest: Any) -> Tensor:
    """Time times the configuration's scale; a distilled model is told its guidance."""
    if family.config.guidance_embeds:
        scale = float(family.config.guidance_embeds_scale)
        rest["guidance"] = timesteps(guidance, latents).to(latents.dtype) * scale
    return plain(family, module, latents, steps * float(family.config.timestep_scale), **rest)


SANA_TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 12,
    "num_layers": 2,
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 4,
}
# -- HunyuanDiT ---------------------------------------------------------------------------------------------------------------

# The second half of the blocks also read what the first half gave (`skip`). The pooling of the text reads the weights of its
# projections without calling them, so these are no points.
HUNYUAN = (
    *norms(("skip.norm", "skip_norm")),
    Row("linear", "skip", "skip.proj", "skip_linear"),
    Row("linear", "modulation", "modulation", "norm1.linear"),
    *norms(("norm1", "norm1.norm")),
    *attention("attn", "attn1"),
    branch("attn", "attn1", "attn", "norm1"),
    *norms(("norm2", "norm2")),
    *attention("cross", "attn2", "cross"),
    branch("cross", "attn2", "cross", "norm2"),
    *norms(("norm3", "norm3")),
    *mlp("mlp", "ff", "norm3"),
    BLOCK,
)


def hunyuan_dit(
    family: Any,
    module: nn.Module,
    latents: Tensor,
    steps: Tensor,
    text_embedding_mask: Any = None,
    text_embedding_mask_t5: Any = None,
    **rest: Any,
) -> Tensor:
    """Texts of two encoders, each of the length that the tables of positions have; places and the size of the image in pixels."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed
    from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

    config, rows = family.config, len(latents)
    grid = tuple(n // int(config.patch_size) for n in latents.shape[-2:])
    base = 512 // 8 // int(config.patch_size)
    size = [8.0 * n for n in latents.shape[-2:]]
    given: dict[str, Any] = {
        "image_meta_size": latents.new_tensor([[*size, *size, 0.0, 0.0]]).repeat(rows, 1),
        "style": torch.zeros(rows, dtype=torch.long, device=latents.device),
        "image_rotary_emb": get_2d_rotary_pos_embed(
            config.attention_head_dim,
            get_resize_crop_region_for_grid(grid, base),
            grid,
            device=latents.device,
            output_type="pt",
        ),
    } | rest
    return module(
        latents,
        steps.to(latents.dtype),
        text_embedding_mask=_mask(rest["encoder_hidden_states"], text_embedding_mask),
        text_embedding_mask_t5=_mask(rest["encoder_hidden_states_t5"], text_embedding_mask_t5),
        return_dict=False,
        **given,
    )[0]


IMAGES = {
    "HunyuanDiT2DModel": Member(
        blocks=(Blocks("blocks", "blocks", HUNYUAN),),
        call=hunyuan_dit,
        inputs=(
            Input("encoder_hidden_states", "text", "cross_attention_dim", "text_len"),
            Input("text_embedding_mask", "mask", length="text_len"),
            Input("encoder_hidden_states_t5", "text", "cross_attention_dim_t5", "text_len_t5"),
            Input("text_embedding_mask_t5", "mask", length="text_len_t5"),
        ),
        tiny={
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 4,
            "attention_head_dim": 8,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "cross_attention_dim": 12,
            "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 4,
            "text_len": 4,
            "text_len_t5": 5,
            "activation_fn": "gelu-approximate",
            "pixels": 64,
        },
        front=(
            ("linear", "patch", "patch_embed", "pos_embed.proj"),
            *embedder("time", "time_extra_emb.timestep_embedder"),
            ("condition", "style", "condition.style", "time_extra_emb.style_embedder"),
            *embedder("pooled", "time_extra_emb.extra_embedder"),
            *embedder("text", "text_embedder"),
        ),
        back=(
            ("linear", "modulation", "final.modulation", "norm_out.linear"),
            ("linear", "final", "final", "proj_out"),
        ),
        released={
            "hunyuan-dit-1.1": Released(
                "Tencent-Hunyuan/HunyuanDiT-v1.1-Diffusers",
                {
                    "in_channels": 4,
                    "patch_size": 2,
                    "num_layers": 40,
                    "hidden_size": 1408,
                    "mlp_ratio": 4.3637,
                    "sample_size": 128,
                    "activation_fn": "gelu-approximate",
                },
            )
        },
        schedule=(
            "DDPMScheduler",
            {
                "beta_start": 0.00085,
                "beta_end": 0.03,
                "beta_schedule": "scaled_linear",
                "prediction_type": "v_prediction",
            },
        ),
        pipeline="HunyuanDiTPipeline",
        variance=True,
        width="hidden_size",
    ),
    "SanaTransformer2DModel": Member(
        blocks=(Blocks("blocks", "transformer_blocks", SANA),),
        call=sana,
        inputs=(CAPTIONS, MASK),
        tiny={**SANA_TINY, "pixels": 128},
        front=(
            ("linear", "patch", "patch_embed", "patch_embed.proj"),
            *GUIDED,
            *ADALN,
            *CAPTION,
            ("norm", "norm", "condition.text.norm", "caption_norm"),
        ),
        back=PROJ_OUT,
        released={
            "sana-1.6b": Released("Efficient-Large-Model/Sana_1600M_1024px_diffusers"),
            "sana-0.6b": Released(
                "Efficient-Large-Model/Sana_600M_1024px_diffusers",
                {
                    "num_attention_heads": 36,
                    "num_layers": 28,
                    "num_cross_attention_heads": 16,
                    "cross_attention_head_dim": 72,
                    "cross_attention_dim": 1152,
                },
            ),
        },
        pipeline="SanaPipeline",
        text_tokens=300,
        ratio=32,
    ),
}

# -- videos ---------------------------------------------------------------------------------------------------------------

WAN = (
    *attention("attn", "attn1"),
    branch("attn", "attn1", "attn", "norm1"),
    *norms(("norm2", "norm2")),
    *attention("cross", "attn2", "cross"),
    Row("linear", "k", "cross.image.k", "attn2.add_k_proj"),
    Row("linear", "v", "cross.image.v", "attn2.add_v_proj"),
    *norms(("cross.image.k_norm", "attn2.norm_added_k")),
    branch("cross", "attn2", "cross", "norm2"),
    *mlp("mlp", "ffn", "norm3"),
    BLOCK,
)
WAN_FRONT = (
    ("linear", "patch", "patch_embed", "patch_embedding"),
    *embedder("time", "condition_embedder.time_embedder"),
    ("linear", "modulation", "modulation", "condition_embedder.time_proj"),
    *embedder("text", "condition_embedder.text_embedder"),
    ("norm", "norm", "condition.image.norm1", "condition_embedder.image_embedder.norm1"),
    ("condition", "image", "condition.image", "condition_embedder.image_embedder.ff"),
    ("linear", "image", "condition.image.in", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("linear", "image", "condition.image.out", "condition_embedder.image_embedder.ff.net.2"),
    ("norm", "norm", "condition.image.norm2", "condition_embedder.image_embedder.norm2"),
)
WAN_INPUTS = (
    Input("encoder_hidden_states", "text", "text_dim"),
    Input("encoder_hidden_states_image", "image", "image_dim"),
    Input("image_latents", "latents"),
)


def wan(
    family: Any, module: nn.Module, latents: Tensor, steps: Tensor, image_latents: Any = None, **rest: Any
) -> Tensor:
    """An image-to-video model sees the mask and latents of its image as further channels."""
    if image_latents is not None:
        latents = torch.cat([latents, image_latents.to(latents.dtype)], dim=1)
    return plain(family, module, latents, steps, **rest)


WAN_TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 12,
    "freq_dim": 16,
    "ffn_dim": 24,
    "num_layers": 2,
    "rope_max_seq_len": 32,
    "pixels": 64,
    "frames": 5,
}
SMALL_WAN: dict[str, Any] = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
WAN_FLOW = ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})

LTX = (
    *attention("attn", "attn1"),
    branch("attn", "attn1", "attn", "norm1"),
    *attention("cross", "attn2", "cross"),
    branch("cross", "attn2", "cross"),
    *mlp("mlp", "ff", "norm2"),
    *norms(("norm1", "norm1"), ("norm2", "norm2")),
    BLOCK,
)


def ltx(
    family: Any,
    module: nn.Module,
    latents: Tensor,
    steps: Tensor,
    encoder_attention_mask: Any = None,
    frame_rate: float = 25.0,
    **rest: Any,
) -> Tensor:
    """Latents as one token each; places in seconds and pixels, of a video of `frame_rate` frames a second."""
    frames, height, width = latents.shape[2:]
    member = family.member
    flow = module(
        latents.flatten(2).transpose(1, 2),
        timestep=steps,
        encoder_attention_mask=_mask(rest["encoder_hidden_states"], encoder_attention_mask),
        num_frames=frames,
        height=height,
        width=width,
        rope_interpolation_scale=(member.frame_ratio / frame_rate, member.ratio, member.ratio),
        return_dict=False,
        **rest,
    )[0]
    return flow.transpose(1, 2).unflatten(2, (frames, height, width))


# Attention within a frame, then attention of each place over time. Rows of these are frames or places, not samples, so there are
# no attention points: keys of a sample would reach the wrong ones.
LATTE = (
    *attention("attn", "attn1", product=False),
    branch("attn", "attn1", "attn", "norm1"),
    *attention("cross", "attn2", "cross", product=False),
    branch("cross", "attn2", "cross"),
    *mlp("mlp", "ff", "norm2"),
    BLOCK,
)
LATTE_TIME = tuple(row for row in LATTE if not row.name.startswith("cross"))


def latte(family: Any, module: nn.Module, latents: Tensor, steps: Tensor, **rest: Any) -> Tensor:
    """As many latent frames as the table of positions in time has, or one."""
    from zoo.errors import DataError

    frames, length = latents.shape[2], int(family.config.video_length)
    if frames not in (1, length):
        raise DataError(
            f"The video has {frames} latent frames; '{family.name}' has positions of {length}. Cut it to these."
        )
    return plain(family, module, latents, steps, **rest)


VIDEOS = {
    "WanTransformer3DModel": Member(
        blocks=(Blocks("blocks", "blocks", WAN),),
        call=wan,
        inputs=WAN_INPUTS,
        tiny=WAN_TINY,
        front=WAN_FRONT,
        back=PROJ_OUT,
        released={
            "wan-1.3b": Released("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", SMALL_WAN, "apache-2.0"),
            "wan-14b": Released("Wan-AI/Wan2.1-T2V-14B-Diffusers", licence="apache-2.0"),
            "wan-14b-i2v": Released(
                "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
                {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
                "apache-2.0",
            ),
        },
        schedule=WAN_FLOW,
        pipeline="WanPipeline",
        channels="out_channels",
        text_tokens=512,
        pixels=(480, 832),
        frames=81,
        frame_ratio=4,
    ),
    "SkyReelsV2Transformer3DModel": Member(
        blocks=(Blocks("blocks", "blocks", WAN),),
        call=wan,
        inputs=WAN_INPUTS,
        tiny=WAN_TINY,
        front=WAN_FRONT,
        back=PROJ_OUT,
        released={
            "skyreels-v2-14b": Released(
                "Skywork/SkyReels-V2-T2V-14B-540P-Diffusers",
                {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
            )
        },
        schedule=("FlowMatchEulerDiscreteScheduler", {"shift": 8.0}),
        pipeline="SkyReelsV2Pipeline",
        channels="out_channels",
        text_tokens=512,
        pixels=(544, 960),
        frames=97,
        frame_ratio=4,
    ),
    "LTXVideoTransformer3DModel": Member(
        blocks=(Blocks("blocks", "transformer_blocks", LTX),),
        call=ltx,
        inputs=(CAPTIONS, MASK),
        tiny={
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "num_layers": 2,
            "caption_channels": 12,
            "pixels": 128,
            "frames": 9,
        },
        front=(("linear", "patch", "patch_embed", "proj_in"), *ADALN, *CAPTION),
        back=PROJ_OUT,
        released={"ltx-video": Released("Lightricks/LTX-Video")},
        schedule=(
            "FlowMatchEulerDiscreteScheduler",
            {
                "use_dynamic_shifting": True,
                "base_shift": 0.95,
                "max_shift": 2.05,
                "base_image_seq_len": 1024,
                "max_image_seq_len": 4096,
                "shift_terminal": 0.1,
            },
        ),
        pipeline="LTXPipeline",
        text_tokens=128,
        pixels=(512, 704),
        ratio=32,
        frames=161,
        frame_ratio=8,
    ),
    "SanaVideoTransformer3DModel": Member(
        blocks=(Blocks("blocks", "transformer_blocks", SANA),),
        call=plain,
        inputs=(CAPTIONS, MASK),
        tiny={
            **SANA_TINY,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "patch_size": (1, 2, 2),
            "rope_max_seq_len": 32,
            "pixels": 64,
            "frames": 5,
        },
        front=(
            ("linear", "patch", "patch_embed", "patch_embedding"),
            *ADALN,
            *CAPTION,
            ("norm", "norm", "condition.text.norm", "caption_norm"),
        ),
        back=PROJ_OUT,
        released={"sana-video-2b": Released("Efficient-Large-Model/SANA-Video_2B_480p_diffusers")},
        pipeline="SanaVideoPipeline",
        text_tokens=300,
        pixels=(480, 832),
        frames=81,
        frame_ratio=4,
    ),
    "LatteTransformer3DModel": Member(
        blocks=(
            Blocks("blocks", "transformer_blocks", LATTE),
            Blocks("time", "temporal_transformer_blocks", LATTE_TIME),
        ),
        call=latte,
        inputs=(CAPTIONS,),
        tiny={
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "cross_attention_dim": 16,
            "caption_channels": 12,
            "sample_size": 8,
            "video_length": 3,
            "pixels": 64,
            "frames": 3,
        },
        front=(
            ("linear", "patch", "patch_embed", "pos_embed.proj"),
            *embedder("time", "adaln_single.emb.timestep_embedder"),
            ("linear", "modulation", "modulation", "adaln_single.linear"),
            *CAPTION,
        ),
        back=PROJ_OUT,
        released={
            "latte-1": Released(
                "maxin-cn/Latte-1",
                {
                    "num_attention_heads": 16,
                    "attention_head_dim": 72,
                    "in_channels": 4,
                    "out_channels": 8,
                    "num_layers": 28,
                    "cross_attention_dim": 1152,
                    "attention_bias": True,
                    "sample_size": 64,
                    "patch_size": 2,
                    "activation_fn": "gelu-approximate",
                    "num_embeds_ada_norm": 1000,
                    "norm_type": "ada_norm_single",
                    "norm_elementwise_affine": False,
                    "norm_eps": 1e-6,
                    "caption_channels": 4096,
                    "video_length": 16,
                },
            )
        },
        schedule=("DDIMScheduler", {"beta_schedule": "linear", "clip_sample": False}),
        pipeline="LattePipeline",
        variance=True,
        text_tokens=120,
        pixels=(512, 512),
        frames=16,
    ),
}


@register_backbone
class CrossDiT(DescribedBackbone):
    """HunyuanDiT, Sana: the aliases, or `diffusers:<repository or folder>` with a transformer of these classes."""

    family = "cross-dit"
    members = IMAGES
    aliases = aliases_of(IMAGES)
    tiny = tiny_of(IMAGES, "HunyuanDiT2DModel")


@register_backbone
class CrossDiTVideo(DescribedVideo):
    """Wan, SkyReels-V2, LTX-Video, Sana-Video, Latte: the aliases, or `diffusers:<repository or folder>`."""

    family = "cross-dit-video"
    members = VIDEOS
    aliases = aliases_of(VIDEOS)
    tiny = tiny_of(VIDEOS, "WanTransformer3DModel")
