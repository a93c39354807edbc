"""Text-to-image: diffusers' `FluxTransformer2DModel` (FLUX.1 of Black Forest Labs).

The first blocks are SD3's, with positions turned into queries and keys of [text | image]. The others, `single.i`, run one
sequence through attention and MLP side by side, with one projection out of both:

    z = LN(x) * (1 + b) + a                y = x + g * W_out [Attn(z) | GELU(W_up z)]

a branch with one sublayer point, `mixer`. The library takes latents packed 2 x 2 and time steps in [0, 1]; here they are
(B, C, H, W) and those of the scheduler (0..1000), as for every other family, and are packed and divided on the way in.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.families.diffusion.family import embedder, pixel_config, timesteps
from multimodal.families.diffusion.joint import IMAGE, IMAGE_MLP, TEXT, TEXTS, TIME, JointBackbone
from zoo.points import Point
from zoo.points.rows import Row
from zoo.registry import register_backbone

JOINT = (*IMAGE, *IMAGE_MLP, *TEXT, Row("block", "block", "", ""))
SINGLE = (
    Row("linear", "modulation", "modulation", "norm.linear"),
    Row("linear", "up", "mixer.up", "proj_mlp"),
    Row("linear", "q", "attn.q", "attn.to_q"),
    Row("linear", "k", "attn.k", "attn.to_k"),
    Row("linear", "v", "attn.v", "attn.to_v"),
    Row("norm", "norm", "attn.q_norm", "attn.norm_q"),
    Row("norm", "norm", "attn.k_norm", "attn.norm_k"),
    Row("attention", "attn", "attn.product", "attn"),
    Row("linear", "down", "mixer.down", "proj_out"),
    Row("sublayer", "mixer", "mixer", "proj_out", entry="norm", exit="proj_out:output"),
    Row("block", "block", "", ""),
)


@register_backbone
class Flux(JointBackbone):
    """`flux-dev`, `flux-schnell`, or `diffusers:<repository or folder>` with a transformer of this class."""

    family = "flux"
    diffusers_class = "FluxTransformer2DModel"
    pipeline_class = "FluxPipeline"
    aliases = {
        "flux-dev": "diffusers:black-forest-labs/FLUX.1-dev",
        "flux-schnell": "diffusers:black-forest-labs/FLUX.1-schnell",
    }
    configs = {
        "diffusers:black-forest-labs/FLUX.1-dev": {"guidance_embeds": True},
        "diffusers:black-forest-labs/FLUX.1-schnell": {},
    }
    licences = {
        "diffusers:black-forest-labs/FLUX.1-dev": "other",
        "diffusers:black-forest-labs/FLUX.1-schnell": "apache-2.0",
    }
    text_tokens = 512
    schedule = ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True})
    front = (
        ("linear", "patch", "patch_embed", "x_embedder"),
        *TIME,
        *embedder("guidance", "time_text_embed.guidance_embedder"),
        *TEXTS,
    )
    block_table = JOINT
    two_streams = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    patch = 2
    elementwise = ("norm1.norm", "norm1_context.norm", "norm2", "norm2_context", "norm.norm", "act_mlp")
    tiny = (
        "flux-dev",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "joint_attention_dim": 12,
            "pooled_projection_dim": 10,
            "axes_dims_rope": (4, 4, 8),
        },
    )

    @property
    def latent_channels(self) -> int:
        """Channels in front of the packing."""
        return int(self.config.in_channels) // 4

    @property
    def feature_dim(self) -> int:
        """Channels of the prediction."""
        return int(self.config.out_channels or self.config.in_channels) // 4

    def data_config(self) -> dict[str, Any]:
        """Pixels in [-1, 1], 1,024 along a side."""
        return pixel_config(1024, 1024)

    def points(self) -> list[Point]:
        """Points of the embeddings, of the joint blocks, of the single ones, and of the final projection."""
        found = super().points()
        behind = len(found) - sum(p.name.startswith("final") for p in found)
        joint = len(self.module.transformer_blocks)  # type: ignore[arg-type]
        single: list[Point] = []
        for i, block in enumerate(self.module.single_transformer_blocks):  # type: ignore[arg-type]
            single += self.points_at(block, f"single.{i}", f"single_transformer_blocks.{i}", joint + i, SINGLE)
        return [*found[:behind], *single, *found[behind:]]

    def _predict(self, module: nn.Module, latents: Tensor, steps: Tensor, guidance: Any = 3.5, **rest: Any) -> Tensor:
        height, width = latents.shape[-2] // 2, latents.shape[-1] // 2
        flow = module(
            F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2),
            timestep=steps.to(latents.dtype) / 1000,
            img_ids=_places(height, width, latents),
            txt_ids=latents.new_zeros(rest["encoder_hidden_states"].shape[1], 3),
            guidance=timesteps(guidance, latents).float() if self.config.guidance_embeds else None,
            **rest,
        )[0]
        return F.pixel_shuffle(flow.transpose(1, 2).unflatten(2, (height, width)), 2)


def _places(height: int, width: int, like: Tensor) -> Tensor:
    """(height * width, 3): a zero, the row and the column of every patch."""
    rows, columns = (torch.arange(n, device=like.device, dtype=like.dtype) for n in (height, width))
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
    return F.pad(grid, (1, 0)).flatten(0, 1)
