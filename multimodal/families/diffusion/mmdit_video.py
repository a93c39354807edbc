"""Text-to-video by joint attention: diffusers' classes of Flux's and SD3's shape that make videos, as `mmdit` has the images."""

from __future__ import annotations

from typing import Any

from multimodal.families.diffusion import calls
from multimodal.families.diffusion.described_video import DescribedVideo
from multimodal.families.diffusion.family import embedder
from multimodal.families.diffusion.flux import JOINT
from multimodal.families.diffusion.members import Blocks, Input, Member, Released, aliases_of, tiny_of
from multimodal.families.diffusion.mmdit import FINAL, REFINED, REFINERS, TWO
from multimodal.families.diffusion.tables import BLOCK, added, attention, mlp
from zoo.points.rows import Row
from zoo.registry import register_backbone

# Behind each branch stands a norm that the time scales, so a branch ends in front of it. Its processor attends sample by
# sample, to the words that the mask leaves, so there is no attention point.
MOCHI = (
    Row("linear", "modulation", "modulation", "norm1.linear"),
    *attention("attn", "attn1", product=False),
    Row("sublayer", "attn", "attn", "attn1", entry="norm1", exit="attn1:output"),
    *mlp("mlp", "ff", "norm3", gated=True),
    Row("linear", "modulation", "text.modulation", "norm1_context.linear"),
    Row("linear", "modulation", "text.modulation", "norm1_context.linear_1"),
    *added("attn1"),
    Row("sublayer", "attn", "text.attn", "attn1.to_add_out", entry="norm1_context", exit="attn1.to_add_out:output"),
    *mlp("text.mlp", "ff_context", "norm3_context", gated=True),
    BLOCK,
)


TINY: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "num_refiner_layers": 1,
    "text_embed_dim": 12,
    "rope_axes_dim": (4, 4, 8),
    "pixels": 64,
    "frames": 5,
}

MEMBERS = {
    "HunyuanVideoTransformer3DModel": Member(
        blocks=(REFINERS, *TWO),
        call=calls.hunyuan,
        inputs=(
            Input("encoder_hidden_states", "text", "text_embed_dim"),
            Input("encoder_attention_mask", "mask"),
            Input("pooled_projections", "pooled", "pooled_projection_dim"),
        ),
        tiny={**TINY, "num_single_layers": 1, "pooled_projection_dim": 10},
        front=(
            ("linear", "patch", "patch_embed", "x_embedder.proj"),
            *embedder("time", "time_text_embed.timestep_embedder"),
            *embedder("pooled", "time_text_embed.text_embedder"),
            *embedder("guidance", "time_text_embed.guidance_embedder"),
            *REFINED,
        ),
        back=FINAL,
        released={"hunyuan-video": Released("hunyuanvideo-community/HunyuanVideo")},
        schedule=("FlowMatchEulerDiscreteScheduler", {"shift": 7.0}),
        pipeline="HunyuanVideoPipeline",
        pixels=(720, 1280),
        frames=129,
        frame_ratio=4,
    ),
    "HunyuanVideo15Transformer3DModel": Member(
        blocks=(REFINERS, Blocks("blocks", "transformer_blocks", JOINT)),
        call=calls.hunyuan15,
        inputs=(
            Input("encoder_hidden_states", "text", "text_embed_dim"),
            Input("encoder_attention_mask", "mask"),
            Input("encoder_hidden_states_2", "text", "text_embed_2_dim"),
            Input("encoder_attention_mask_2", "mask"),
            Input("image_embeds", "image", "image_embed_dim"),
            Input("image_latents", "latents"),
        ),
        tiny={**TINY, "in_channels": 9, "num_layers": 2, "text_embed_2_dim": 8, "image_embed_dim": 10},
        front=(
            ("linear", "patch", "patch_embed", "x_embedder.proj"),
            *embedder("time", "time_embed.timestep_embedder"),
            *REFINED,
            ("norm", "norm", "condition.words.norm", "context_embedder_2.norm"),
            ("condition", "text", "condition.words", "context_embedder_2"),
            *(("linear", "text", f"condition.words.{i}", f"context_embedder_2.linear_{i}") for i in (1, 2, 3)),
            ("norm", "norm", "condition.image.norm_in", "image_embedder.norm_in"),
            ("condition", "image", "condition.image", "image_embedder"),
            ("linear", "image", "condition.image.in", "image_embedder.linear_1"),
            ("linear", "image", "condition.image.out", "image_embedder.linear_2"),
            ("norm", "norm", "condition.image.norm_out", "image_embedder.norm_out"),
        ),
        back=FINAL,
        schedule=("FlowMatchEulerDiscreteScheduler", {"shift": 5.0}),
        pipeline="HunyuanVideo15Pipeline",
        channels="out_channels",
        text_tokens=1000,
        pixels=(480, 832),
        ratio=16,
        frames=121,
        frame_ratio=4,
    ),
    "MochiTransformer3DModel": Member(
        blocks=(Blocks("blocks", "transformer_blocks", MOCHI),),
        call=calls.mochi,
        inputs=(Input("encoder_hidden_states", "text", "text_embed_dim"), Input("encoder_attention_mask", "mask")),
        tiny={
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 4,
            "max_sequence_length": 16,
            "pixels": 64,
            "frames": 7,
        },
        front=(
            ("linear", "patch", "patch_embed", "patch_embed.proj"),
            *embedder("time", "time_embed.timestep_embedder"),
            ("linear", "q", "condition.pooled.q", "time_embed.pooler.to_q"),
            ("linear", "kv", "condition.pooled.kv", "time_embed.pooler.to_kv"),
            ("linear", "o", "condition.pooled.o", "time_embed.pooler.to_out"),
            ("condition", "text", "condition.text", "time_embed.caption_proj"),
            ("linear", "text", "condition.text.proj", "time_embed.caption_proj"),
        ),
        back=FINAL,
        released={"mochi-1": Released("genmo/mochi-1-preview", licence="apache-2.0")},
        schedule=("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}),
        pipeline="MochiPipeline",
        text_width="pooled_projection_dim",
        pixels=(480, 848),
        frames=85,
        frame_ratio=6,
    ),
}


@register_backbone
class MMDiTVideo(DescribedVideo):
    """HunyuanVideo, HunyuanVideo 1.5, Mochi: the aliases, or `diffusers:<repository or folder>`."""

    family = "mmdit-video"
    members = MEMBERS
    aliases = aliases_of(MEMBERS)
    tiny = tiny_of(MEMBERS, "HunyuanVideoTransformer3DModel")
