"""Text-to-image with one set of weights for both streams: diffusers' CogView3-Plus and CogView4 (CogVideoX's shape, of images).

Image and text pass the same projections and the same MLP, each with a modulation of its own, and meet in one attention. Sublayer
`attn` sees the image's tokens; `mlp` sees both (CogView4 runs it for each in turn). Block points see the image.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from multimodal.families.diffusion import calls
from multimodal.families.diffusion.described import DescribedBackbone
from multimodal.families.diffusion.family import embedder
from multimodal.families.diffusion.members import Blocks, Input, Member, Released, aliases_of, tiny_of
from multimodal.families.diffusion.mmdit import FINAL
from multimodal.families.diffusion.tables import BLOCK, attention, branch, mlp
from zoo.points.rows import Row
from zoo.registry import register_backbone

TABLE = (
    Row("linear", "modulation", "modulation", "norm1.linear"),
    *attention("attn", "attn1"),
    replace(branch("attn", "attn1", "attn"), unmergeable="its projections read the tokens of the text, too"),
    *mlp("mlp", "ff"),
    BLOCK,
)
FRONT = (
    ("linear", "patch", "patch_embed", "patch_embed.proj"),
    ("condition", "text", "condition.text", "patch_embed.text_proj"),
    ("linear", "text", "condition.text.proj", "patch_embed.text_proj"),
    *embedder("time", "time_condition_embed.timestep_embedder"),
    *embedder("size", "time_condition_embed.condition_embedder"),
)
TEXT = Input("encoder_hidden_states", "text", "text_embed_dim")


TINY: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "text_embed_dim": 12,
    "time_embed_dim": 8,
    "condition_dim": 4,
    "sample_size": 8,
    "pixels": 64,
}
MEMBERS = {
    "CogView3PlusTransformer2DModel": Member(
        blocks=(Blocks("blocks", "transformer_blocks", TABLE),),
        call=calls.cogview,
        inputs=(TEXT,),
        tiny={**TINY, "pos_embed_max_size": 8},
        front=FRONT,
        back=FINAL,
        released={"cogview3-plus": Released("THUDM/CogView3-Plus-3B", licence="apache-2.0")},
        schedule=(
            "CogVideoXDDIMScheduler",
            {
                "beta_schedule": "scaled_linear",
                "prediction_type": "v_prediction",
                "rescale_betas_zero_snr": True,
                "snr_shift_scale": 4.0,
                "timestep_spacing": "trailing",
            },
        ),
        pipeline="CogView3PlusPipeline",
        text_tokens=224,
    ),
    "CogView4Transformer2DModel": Member(
        blocks=(Blocks("blocks", "transformer_blocks", TABLE),),
        call=calls.cogview,
        inputs=(TEXT,),
        tiny={**TINY, "rope_axes_dim": (16, 16)},
        front=FRONT,
        back=FINAL,
        released={
            "cogview4": Released(
                "THUDM/CogView4-6B",
                {"num_layers": 28, "attention_head_dim": 128, "num_attention_heads": 32},
                "apache-2.0",
            )
        },
        schedule=(
            "FlowMatchEulerDiscreteScheduler",
            {
                "use_dynamic_shifting": True,
                "base_shift": 0.25,
                "max_shift": 0.75,
                "base_image_seq_len": 256,
                "max_image_seq_len": 4096,
            },
        ),
        pipeline="CogView4Pipeline",
        text_tokens=1024,
    ),
}


@register_backbone
class CogView(DescribedBackbone):
    """CogView3-Plus, CogView4: the aliases, or `diffusers:<repository or folder>`."""

    family = "cogview"
    members = MEMBERS
    aliases = aliases_of(MEMBERS)
    tiny = tiny_of(MEMBERS, "CogView4Transformer2DModel")
