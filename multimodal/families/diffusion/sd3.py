"""Text-to-image with joint attention: diffusers' `SD3Transformer2DModel` (Stable Diffusion 3 and 3.5, MM-DiT of Esser et al.).

Image and text have projections, MLPs and modulations of their own in each block and meet in one attention over [image | text].
Points of the text stand under `blocks.i.text`. Nobody reads what the last block makes of the text, so its queries are no point.
Blocks of 3.5-medium have a second attention of the image alone, `blocks.i.dual`. Block points see the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from multimodal.families.diffusion.joint import IMAGE, IMAGE_MLP, TEXT, TEXTS, TIME, JointBackbone
from zoo.points import Point
from zoo.points.rows import Row
from zoo.registry import register_backbone

MEDIUM: dict[str, Any] = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}
DUAL = (
    Row("linear", "q", "dual.q", "attn2.to_q"),
    Row("linear", "k", "dual.k", "attn2.to_k"),
    Row("linear", "v", "dual.v", "attn2.to_v"),
    Row("norm", "norm", "dual.q_norm", "attn2.norm_q"),
    Row("norm", "norm", "dual.k_norm", "attn2.norm_k"),
    Row("attention", "attn", "dual.product", "attn2"),
    Row("linear", "o", "dual.o", "attn2.to_out.0"),
    Row("sublayer", "attn", "dual", "attn2", entry="attn2:input", exit="attn2:output", stream="norm1"),
)


@register_backbone
class SD3(JointBackbone):
    """`sd3-medium`, or `diffusers:<repository or folder>` with a transformer of this class."""

    family = "sd3"
    diffusers_class = "SD3Transformer2DModel"
    pipeline_class = "StableDiffusion3Pipeline"
    aliases = {"sd3-medium": "diffusers:stabilityai/stable-diffusion-3-medium-diffusers"}
    configs = {"diffusers:stabilityai/stable-diffusion-3-medium-diffusers": MEDIUM}
    licences = {"diffusers:stabilityai/stable-diffusion-3-medium-diffusers": "other"}
    text_tokens = 333
    schedule = ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
    front = (
        ("linear", "patch", "patch_embed", "pos_embed.proj"),
        *TIME,
        *TEXTS,
    )
    block_table = (*IMAGE, *DUAL, *IMAGE_MLP, *TEXT, Row("block", "block", "", ""))
    two_streams = ("JointTransformerBlock",)
    elementwise = ("norm1.norm", "norm1_context.norm", "norm2", "norm2_context")
    tiny = (
        "sd3-medium",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "sample_size": 8,
            "pos_embed_max_size": 8,
            "joint_attention_dim": 12,
            "pooled_projection_dim": 10,
            "caption_projection_dim": 16,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
    )

    def points_at(
        self, block: nn.Module, name: str, path: str, index: int, table: Sequence[Row] | None = None
    ) -> list[Point]:
        """Points of one block, without those whose output nobody reads."""
        found = super().points_at(block, name, path, index, table)
        unread = {f"{name}.text.attn.q", f"{name}.text.attn.q_norm"} if block.context_pre_only else set()
        return [p for p in found if p.name not in unread]
