"""Blocks of self attention, cross attention to a text, and MLP: diffusers' classes of PixArt's shape, of images and of videos.

One modulation for all blocks, to which each adds a table of its own (`multimodal.families.diffusion.pixart`); HunyuanDiT has a
norm with a shift instead. Where a class attends linearly (Sana), there is no product that more keys could take part in: such an
attention has no attention point. Sana's MLP is of convolutions on the grid of latents, which have linear points of the role
`conv`, and no sublayer.
"""

from __future__ import annotations

from typing import Any

from multimodal.families.diffusion import calls
from multimodal.families.diffusion.described import DescribedBackbone
from multimodal.families.diffusion.family import embedder
from multimodal.families.diffusion.members import Blocks, Input, Member, Released, aliases_of, tiny_of
from multimodal.families.diffusion.tables import BLOCK, attention, branch, mlp, norms
from zoo.points.rows import Row
from zoo.registry import register_backbone

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


IMAGES = {
    "HunyuanDiT2DModel": Member(
        blocks=(Blocks("blocks", "blocks", HUNYUAN),),
        call=calls.hunyuan_dit,
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
        call=calls.sana,
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


@register_backbone
class CrossDiT(DescribedBackbone):
    """HunyuanDiT, Sana: the aliases, or `diffusers:<repository or folder>` with a transformer of these classes."""

    family = "cross-dit"
    members = IMAGES
    aliases = aliases_of(IMAGES)
    tiny = tiny_of(IMAGES, "HunyuanDiT2DModel")
