"""Blocks of self attention, cross attention to a text, and MLP that make videos, as `crossdit` has the images.

Wan's cross attention to an image has keys and values of its own beside those of the text, and a product of its own: there, more
keys are refused.
"""

from __future__ import annotations

from typing import Any

from multimodal.families.diffusion import calls
from multimodal.families.diffusion.crossdit import ADALN, CAPTION, CAPTIONS, MASK, PROJ_OUT, SANA, SANA_TINY
from multimodal.families.diffusion.described_video import DescribedVideo
from multimodal.families.diffusion.family import embedder
from multimodal.families.diffusion.members import Blocks, Input, Member, Released, aliases_of, tiny_of
from multimodal.families.diffusion.tables import BLOCK, attention, branch, mlp, norms
from zoo.points.rows import Row
from zoo.registry import register_backbone

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


VIDEOS = {
    "WanTransformer3DModel": Member(
        blocks=(Blocks("blocks", "blocks", WAN),),
        call=calls.wan,
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
        call=calls.wan,
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
        call=calls.ltx,
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
        call=calls.plain,
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
        call=calls.latte,
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
            "patch_size": 2,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
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
class CrossDiTVideo(DescribedVideo):
    """Wan, SkyReels-V2, LTX-Video, Sana-Video, Latte: the aliases, or `diffusers:<repository or folder>`."""

    family = "cross-dit-video"
    members = VIDEOS
    aliases = aliases_of(VIDEOS)
    tiny = tiny_of(VIDEOS, "WanTransformer3DModel")
