"""Text-to-image by joint attention (MM-DiT): diffusers' classes of Flux's and SD3's shape.

Image and text have projections, MLPs and modulations of their own in each `blocks.i` and meet in one attention over both;
points of the text stand under `blocks.i.text`. Where there are `single.i` blocks behind, one sequence runs through attention and
MLP side by side (`multimodal.families.diffusion.flux`). What differs between the classes is here: the modulation (one for all
blocks in Flux 2, none but what a network of its own makes in Chroma), fused projections, and how a class counts places and time.

Where a class modulates the text outside of a module, the input of its attention is no module's output, so the text's attention
has no sublayer point there. Nobody reads what the last block makes of the text if no single block follows; these points are left
out.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from multimodal.families.diffusion import calls
from multimodal.families.diffusion.described import DescribedBackbone
from multimodal.families.diffusion.family import embedder
from multimodal.families.diffusion.flux import JOINT, SINGLE
from multimodal.families.diffusion.members import Blocks, Input, Member, Released, aliases_of, tiny_of
from multimodal.families.diffusion.tables import (
    BLOCK,
    added,
    attention,
    branch,
    mlp,
    norms,
)
from zoo.points.rows import Row
from zoo.registry import register_backbone

TEXT = Input("encoder_hidden_states", "text", "joint_attention_dim")
CONTEXT = (
    ("condition", "text", "condition.text", "context_embedder"),
    ("linear", "text", "condition.text.proj", "context_embedder"),
)
FINAL = (("linear", "modulation", "final.modulation", "norm_out.linear"), ("linear", "final", "final", "proj_out"))
PATCH = (("linear", "patch", "patch_embed", "x_embedder"),)


# -- Flux's two tables ------------------------------------------------------------------------------------------------------


GATED_JOINT = (
    Row("linear", "modulation", "modulation", "norm1.linear"),
    *attention("attn", "attn"),
    Row("sublayer", "attn", "attn", "attn", entry="norm1", exit="attn:output"),
    *mlp("mlp", "ff", "norm2", gated=True),
    Row("linear", "modulation", "text.modulation", "norm1_context.linear"),
    *added(),
    Row("sublayer", "attn", "text.attn", "attn.to_add_out", entry="norm1_context", exit="attn.to_add_out:output"),
    *mlp("text.mlp", "ff_context", "norm2_context", gated=True),
    BLOCK,
)
GATED_SINGLE = (
    *(row for row in SINGLE if row.role != "up"),
    Row("linear", "up", "mixer.up", "proj_mlp", part=(0, 2)),
    Row("linear", "gate", "mixer.gate", "proj_mlp", part=(1, 2)),
)


# -- Flux 2 -----------------------------------------------------------------------------------------------------------------

FLUX2_JOINT = (
    *attention("attn", "attn"),
    branch("attn", "attn", "attn", "norm1"),
    Row("linear", "gate", "mlp.gate", "ff.linear_in", part=(0, 2)),
    Row("linear", "up", "mlp.up", "ff.linear_in", part=(1, 2)),
    Row("linear", "down", "mlp.down", "ff.linear_out"),
    branch("mlp", "ff", "mlp", "norm2"),
    *added(),
    Row("linear", "gate", "text.mlp.gate", "ff_context.linear_in", part=(0, 2)),
    Row("linear", "up", "text.mlp.up", "ff_context.linear_in", part=(1, 2)),
    Row("linear", "down", "text.mlp.down", "ff_context.linear_out"),
    branch("text.mlp", "ff_context", "mlp", "norm2_context"),
    BLOCK,
)
FLUX2_SINGLE = (
    Row("linear", "in", "mixer.in", "attn.to_qkv_mlp_proj"),  # its parts: `_flux2_parts`
    *norms(("attn.q_norm", "attn.norm_q"), ("attn.k_norm", "attn.norm_k")),
    Row("attention", "attn", "attn.product", "attn"),
    Row("linear", "down", "mixer.down", "attn.to_out"),
    branch("mixer", "attn", "mixer", "norm"),
    BLOCK,
)


def _flux2_parts(projection: nn.Linear) -> tuple[tuple[str, str, int], ...]:
    """Rows of the fused projection of a single block, in their order: q, k, v, and the MLP's gate and up."""
    width = projection.in_features
    hidden = (projection.out_features - 3 * width) // 2
    return (
        ("attn.q", "q", width),
        ("attn.k", "k", width),
        ("attn.v", "v", width),
        ("mixer.gate", "gate", hidden),
        ("mixer.up", "up", hidden),
    )


# -- Qwen-Image, AuraFlow, HunyuanImage ---------------------------------------------------------------------------------------

QWEN = (
    Row("linear", "modulation", "modulation", "img_mod.1"),
    *attention("attn", "attn"),
    branch("attn", "attn", "attn", "img_norm1"),
    *mlp("mlp", "img_mlp", "img_norm2"),
    Row("linear", "modulation", "text.modulation", "txt_mod.1"),
    *added(),
    *mlp("text.mlp", "txt_mlp", "txt_norm2"),
    BLOCK,
)


def _gated(name: str, path: str, stream: str) -> tuple[Row, ...]:
    """AuraFlow's MLP: silu(gate) * up, and down."""
    return (
        Row("linear", "gate", f"{name}.gate", f"{path}.linear_1"),
        Row("linear", "up", f"{name}.up", f"{path}.linear_2"),
        Row("linear", "down", f"{name}.down", f"{path}.out_projection"),
        branch(name, path, "mlp", stream),
    )


AURA_IMAGE = (
    Row("linear", "modulation", "modulation", "norm1.linear"),
    *attention("attn", "attn"),
    Row("sublayer", "attn", "attn", "attn", entry="norm1", exit="attn:output"),
    *_gated("mlp", "ff", "norm2"),
)
AURA_TEXT = (
    Row("linear", "modulation", "text.modulation", "norm1_context.linear"),
    *added(),
    Row("sublayer", "attn", "text.attn", "attn.to_add_out", entry="norm1_context", exit="attn.to_add_out:output"),
    *_gated("text.mlp", "ff_context", "norm2_context"),
)


# The text is refined by blocks of its own in front: self attention with a gate that the time says
REFINER = (
    *norms(("norm1", "norm1"), ("norm2", "norm2")),
    *attention("attn", "attn"),
    Row("sublayer", "attn", "attn", "attn", entry="norm1", exit="attn:output"),
    *mlp("mlp", "ff", "norm2"),
    Row("linear", "modulation", "modulation", "norm_out.linear"),
    BLOCK,
)
REFINED = (
    *embedder("time", "context_embedder.time_text_embed.timestep_embedder", "text.time"),
    *embedder("pooled", "context_embedder.time_text_embed.text_embedder", "text.pooled"),
    ("condition", "text", "condition.text", "context_embedder.proj_in"),
    ("linear", "text", "condition.text.proj", "context_embedder.proj_in"),
)
REFINERS = Blocks("refiner", "context_embedder.token_refiner.refiner_blocks", REFINER)


SMALL: dict[str, Any] = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
FLUX_LIKE: dict[str, Any] = {
    **SMALL,
    "in_channels": 16,
    "joint_attention_dim": 12,
    "axes_dims_rope": (4, 4, 8),
    "pixels": 64,
}
TWO = (Blocks("blocks", "transformer_blocks", JOINT), Blocks("single", "single_transformer_blocks", SINGLE))

MEMBERS = {
    "ChromaTransformer2DModel": Member(
        blocks=TWO,
        call=calls.chroma,
        inputs=(TEXT, Input("mask", "mask")),
        tiny={**FLUX_LIKE, "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1},
        front=(
            *PATCH,
            ("condition", "time", "condition.time", "distilled_guidance_layer"),
            ("linear", "time", "condition.time.in", "distilled_guidance_layer.in_proj"),
            ("linear", "time", "condition.time.layers.*.up", "distilled_guidance_layer.layers.*.linear_1"),
            ("linear", "time", "condition.time.layers.*.down", "distilled_guidance_layer.layers.*.linear_2"),
            ("norm", "norm", "condition.time.layers.*.norm", "distilled_guidance_layer.norms.*"),
            ("linear", "time", "condition.time.out", "distilled_guidance_layer.out_proj"),
            *CONTEXT,
        ),
        back=(("linear", "final", "final", "proj_out"),),
        released={"chroma-hd": Released("lodestones/Chroma1-HD", licence="apache-2.0")},
        schedule=("FlowMatchEulerDiscreteScheduler", {}),
        pipeline="ChromaPipeline",
        text_first=("ChromaTransformerBlock",),
        packed=4,
        patch=2,
        text_tokens=512,
    ),
    "BriaTransformer2DModel": Member(
        blocks=TWO,
        call=calls.bria,
        inputs=(TEXT,),
        tiny=FLUX_LIKE,
        front=(*PATCH, *embedder("time", "time_embed.timestep_embedder"), *CONTEXT),
        back=FINAL,
        pipeline="BriaPipeline",
        text_first=("BriaTransformerBlock", "BriaSingleTransformerBlock"),
        packed=4,
        patch=2,
        text_tokens=128,
    ),
    "LongCatImageTransformer2DModel": Member(
        blocks=TWO,
        call=calls.longcat,
        inputs=(TEXT,),
        tiny=FLUX_LIKE,
        front=(*PATCH, *embedder("time", "time_embed.timestep_embedder"), *CONTEXT),
        back=FINAL,
        pipeline="LongCatImagePipeline",
        text_first=("LongCatImageTransformerBlock", "LongCatImageSingleTransformerBlock"),
        packed=4,
        patch=2,
        text_tokens=512,
    ),
    "OvisImageTransformer2DModel": Member(
        blocks=(
            Blocks("blocks", "transformer_blocks", GATED_JOINT),
            Blocks("single", "single_transformer_blocks", GATED_SINGLE),
        ),
        call=calls.ovis,
        inputs=(TEXT,),
        tiny={**FLUX_LIKE, "out_channels": 16},
        front=(
            *PATCH,
            *embedder("time", "timestep_embedder"),
            ("norm", "norm", "condition.text.norm", "context_embedder_norm"),
            *CONTEXT,
        ),
        back=FINAL,
        released={"ovis-image": Released("AIDC-AI/Ovis-Image-7B", licence="apache-2.0")},
        pipeline="OvisImagePipeline",
        text_first=("OvisImageTransformerBlock", "OvisImageSingleTransformerBlock"),
        packed=4,
        patch=2,
    ),
    "Flux2Transformer2DModel": Member(
        blocks=(
            Blocks("blocks", "transformer_blocks", FLUX2_JOINT),
            Blocks("single", "single_transformer_blocks", FLUX2_SINGLE),
        ),
        call=calls.flux2,
        inputs=(TEXT,),
        tiny={**FLUX_LIKE, "in_channels": 8, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 16},
        front=(
            *PATCH,
            *embedder("time", "time_guidance_embed.timestep_embedder"),
            *embedder("guidance", "time_guidance_embed.guidance_embedder"),
            ("linear", "modulation", "modulation", "double_stream_modulation_img.linear"),
            ("linear", "modulation", "text.modulation", "double_stream_modulation_txt.linear"),
            ("linear", "modulation", "single.modulation", "single_stream_modulation.linear"),
            *CONTEXT,
        ),
        back=FINAL,
        released={"flux2-dev": Released("black-forest-labs/FLUX.2-dev")},
        schedule=("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True}),
        pipeline="Flux2Pipeline",
        text_first=("Flux2TransformerBlock",),
        patch=1,
        parts={"mixer.in": _flux2_parts},
        text_tokens=512,
        ratio=16,
    ),
    "QwenImageTransformer2DModel": Member(
        blocks=(Blocks("blocks", "transformer_blocks", QWEN),),
        call=calls.qwen,
        inputs=(TEXT, Input("encoder_hidden_states_mask", "mask")),
        tiny={
            **{k: v for k, v in FLUX_LIKE.items() if k != "num_single_layers"},
            "num_layers": 2,
            "out_channels": 4,
            "axes_dims_rope": (8, 4, 4),
        },
        front=(
            ("linear", "patch", "patch_embed", "img_in"),
            *embedder("time", "time_text_embed.timestep_embedder"),
            ("norm", "norm", "condition.text.norm", "txt_norm"),
            ("condition", "text", "condition.text", "txt_in"),
            ("linear", "text", "condition.text.proj", "txt_in"),
        ),
        back=FINAL,
        released={"qwen-image": Released("Qwen/Qwen-Image", licence="apache-2.0")},
        schedule=(
            "FlowMatchEulerDiscreteScheduler",
            {
                "use_dynamic_shifting": True,
                "base_shift": 0.5,
                "max_shift": 0.9,
                "shift_terminal": 0.02,
                "time_shift_type": "exponential",
                "max_image_seq_len": 8192,
            },
        ),
        pipeline="QwenImagePipeline",
        text_first=("QwenImageTransformerBlock",),
        packed=4,
        patch=2,
        text_tokens=512,
    ),
    "AuraFlowTransformer2DModel": Member(
        blocks=(
            Blocks("blocks", "joint_transformer_blocks", (*AURA_IMAGE, *AURA_TEXT, BLOCK)),
            Blocks("single", "single_transformer_blocks", (*AURA_IMAGE, BLOCK)),
        ),
        call=calls.aura,
        inputs=(TEXT,),
        tiny={
            "sample_size": 8,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_projection_dim": 16,
            "joint_attention_dim": 12,
            "pos_embed_max_size": 64,
            "pixels": 64,
        },
        front=(
            ("linear", "patch", "patch_embed", "pos_embed.proj"),
            *embedder("time", "time_step_proj"),
            *CONTEXT,
        ),
        back=FINAL,
        released={"auraflow-0.3": Released("fal/AuraFlow-v0.3", {"pos_embed_max_size": 9216}, "apache-2.0")},
        schedule=("FlowMatchEulerDiscreteScheduler", {"shift": 1.73}),
        pipeline="AuraFlowPipeline",
        text_first=("AuraFlowJointTransformerBlock",),
    ),
    "HunyuanImageTransformer2DModel": Member(
        blocks=(REFINERS, *TWO),
        call=calls.hunyuan_image,
        inputs=(Input("encoder_hidden_states", "text", "text_embed_dim"), Input("encoder_attention_mask", "mask")),
        tiny={
            **SMALL,
            "in_channels": 4,
            "out_channels": 4,
            "num_refiner_layers": 1,
            "text_embed_dim": 12,
            "rope_axes_dim": (8, 8),
            "pixels": 128,
        },
        front=(
            ("linear", "patch", "patch_embed", "x_embedder.proj"),
            *embedder("time", "time_guidance_embed.timestep_embedder"),
            *embedder("guidance", "time_guidance_embed.guidance_embedder"),
            *REFINED,
        ),
        back=FINAL,
        schedule=("FlowMatchEulerDiscreteScheduler", {"shift": 5.0}),
        pipeline="HunyuanImagePipeline",
        text_tokens=1000,
        pixels=(2048, 2048),
        ratio=32,
    ),
}


@register_backbone
class MMDiT(DescribedBackbone):
    """Chroma, Bria, LongCat-Image, Ovis-Image, Flux 2, Qwen-Image, AuraFlow, HunyuanImage: aliases, or `diffusers:<source>`."""

    family = "mmdit"
    members = MEMBERS
    aliases = aliases_of(MEMBERS)
    tiny = tiny_of(MEMBERS, "OvisImageTransformer2DModel")
