"""Text-to-image by one stream of words and patches: diffusers' Lumina-Image 2.0 and Z-Image.

Words and patches are refined apart by a few blocks each (`text.i`, without a modulation, and `noise.i`), and then run through
the `blocks.i` as one sequence [text | image] or [image | text] with one set of weights. Norms stand in front of a branch and
behind it:

    y = x + tanh(g) * Norm2(F(Norm1(x) * (1 + s)))

A branch ends in front of its second norm. Both classes take time from noise (0) to image (1) and predict image - noise; here
they take the scheduler's steps and give noise - image, as their pipelines do.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from multimodal.families.diffusion import calls
from multimodal.families.diffusion.described import DescribedBackbone
from multimodal.families.diffusion.family import embedder
from multimodal.families.diffusion.members import Blocks, Input, Member, Released, aliases_of, tiny_of
from multimodal.families.diffusion.tables import BLOCK, attention, branch, norms
from zoo.errors import ConfigError
from zoo.points.rows import Row
from zoo.registry import register_backbone


def _gated(path: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """silu(gate) * up, and down."""
    return (
        Row("linear", "gate", "mlp.gate", f"{path}.{gate}"),
        Row("linear", "up", "mlp.up", f"{path}.{up}"),
        Row("linear", "down", "mlp.down", f"{path}.{down}"),
        branch("mlp", path, "mlp", "ffn_norm1"),
    )


LUMINA = (
    Row("linear", "modulation", "modulation", "norm1.linear"),
    *norms(("norm1", "norm1.norm"), ("norm1", "norm1")),
    *attention("attn", "attn"),
    Row("sublayer", "attn", "attn", "attn", entry="norm1", exit="attn:output"),
    *norms(("attn.norm", "norm2"), ("norm2", "ffn_norm1")),
    *_gated("feed_forward", "linear_1", "linear_3", "linear_2"),
    *norms(("mlp.norm", "ffn_norm2")),
    BLOCK,
)
Z_IMAGE = (
    Row("linear", "modulation", "modulation", "adaLN_modulation.0"),
    *norms(("norm1", "attention_norm1")),
    *attention("attn", "attention"),
    branch("attn", "attention", "attn", "attention_norm1"),
    *norms(("attn.norm", "attention_norm2"), ("norm2", "ffn_norm1")),
    *_gated("feed_forward", "w1", "w3", "w2"),
    *norms(("mlp.norm", "ffn_norm2")),
    BLOCK,
)


MEMBERS = {
    "Lumina2Transformer2DModel": Member(
        blocks=(
            Blocks("text", "context_refiner", LUMINA),
            Blocks("noise", "noise_refiner", LUMINA),
            Blocks("blocks", "layers", LUMINA),
        ),
        call=calls.lumina,
        inputs=(Input("encoder_hidden_states", "text", "cap_feat_dim"), Input("encoder_attention_mask", "mask")),
        tiny={
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 2,
            "cap_feat_dim": 12,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (512, 128, 128),
            "pixels": 64,
        },
        front=(
            *embedder("time", "time_caption_embed.timestep_embedder"),
            ("norm", "norm", "condition.text.norm", "time_caption_embed.caption_embedder.0"),
            ("condition", "text", "condition.text", "time_caption_embed.caption_embedder.1"),
            ("linear", "text", "condition.text.proj", "time_caption_embed.caption_embedder.1"),
            ("linear", "patch", "patch_embed", "x_embedder"),
        ),
        back=(
            ("linear", "modulation", "final.modulation", "norm_out.linear_1"),
            ("linear", "final", "final", "norm_out.linear_2"),
        ),
        released={"lumina2": Released("Alpha-VLLM/Lumina-Image-2.0", {"cap_feat_dim": 2304}, "apache-2.0")},
        schedule=("FlowMatchEulerDiscreteScheduler", {"shift": 6.0}),
        pipeline="Lumina2Pipeline",
        width="hidden_size",
    ),
    "ZImageTransformer2DModel": Member(
        blocks=(
            Blocks("noise", "noise_refiner", Z_IMAGE),
            Blocks("text", "context_refiner", Z_IMAGE),
            Blocks("blocks", "layers", Z_IMAGE),
        ),
        call=calls.z_image,
        inputs=(Input("encoder_hidden_states", "text", "cap_feat_dim"), Input("mask", "mask")),
        tiny={
            "in_channels": 4,
            "dim": 16,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 12,
            "axes_dims": (4, 2, 2),
            "axes_lens": (128, 64, 64),
            "pixels": 64,
        },
        front=(
            ("linear", "patch", "patch_embed", "all_x_embedder.2-1"),
            ("condition", "time", "condition.time", "t_embedder.mlp"),
            ("linear", "time", "condition.time.in", "t_embedder.mlp.0"),
            ("linear", "time", "condition.time.out", "t_embedder.mlp.2"),
            ("norm", "norm", "condition.text.norm", "cap_embedder.0"),
            ("condition", "text", "condition.text", "cap_embedder.1"),
            ("linear", "text", "condition.text.proj", "cap_embedder.1"),
        ),
        back=(
            ("linear", "modulation", "final.modulation", "all_final_layer.2-1.adaLN_modulation.1"),
            ("linear", "final", "final", "all_final_layer.2-1.linear"),
        ),
        released={"z-image-turbo": Released("Tongyi-MAI/Z-Image-Turbo", licence="apache-2.0")},
        schedule=("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        pipeline="ZImagePipeline",
        width="dim",
        patch=2,
        text_tokens=512,
    ),
}


@register_backbone
class SingleDiT(DescribedBackbone):
    """Lumina-Image 2.0, Z-Image: the aliases, or `diffusers:<repository or folder>`."""

    family = "single-dit"
    members = MEMBERS
    aliases = aliases_of(MEMBERS)
    tiny = tiny_of(MEMBERS, "Lumina2Transformer2DModel")

    def check_routed(self, *inputs: Any) -> None:
        """Texts of several lengths are put one behind the other, so that rows cannot be told apart."""
        mask = inputs[3] if len(inputs) > 3 else None
        if isinstance(mask, Tensor) and type(self.module).__name__ == "ZImageTransformer2DModel":
            lengths = mask.bool().sum(dim=1)
            if bool((lengths != lengths[0]).any()):
                raise ConfigError(
                    f"'{self.name}' puts the words of all texts one behind the other, and these are of several lengths: adapters "
                    "for each sample cannot tell them apart. Give texts of one length, or a batch for each adapter."
                )
