"""Text-to-image: diffusers' `FluxTransformer2DModel` (FLUX.1 of Black Forest Labs).

The first blocks are SD3's, with positions turned into queries and keys of [text | image]. The others, `single.i`, run one
sequence through attention and MLP side by side, with one projection out of both:

    z = LN(x) * (1 + b) + a                y = x + g * W_out [Attn(z) | GELU(W_up z)]

a branch with one sublayer point, `mixer`. The library takes latents packed 2 x 2 and time steps in [0, 1]; here they are
(B, C, H, W) and those of the scheduler (0..1000), as for every other family, and are packed and divided on the way in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.diffusers_family import DiffusersBackbone, timesteps
from multimodal.sd3 import IMAGE, IMAGE_MLP, TEXT
from zoo.backbone import Row
from zoo.points import Point
from zoo.registry import register_backbone

if TYPE_CHECKING:
    from zoo.sites import Site

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
class Flux(DiffusersBackbone):
    """`flux-dev`, `flux-schnell`, or `diffusers:<repository or folder>` with a transformer of this class."""

    family = "flux"
    diffusers_class = "FluxTransformer2DModel"
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
    schedule = ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True})
    front = (
        ("linear", "patch", "patch_embed", "x_embedder"),
        ("condition", "time", "condition.time", "time_text_embed.timestep_embedder"),
        ("linear", "time", "condition.time.in", "time_text_embed.timestep_embedder.linear_1"),
        ("linear", "time", "condition.time.out", "time_text_embed.timestep_embedder.linear_2"),
        ("condition", "guidance", "condition.guidance", "time_text_embed.guidance_embedder"),
        ("linear", "guidance", "condition.guidance.in", "time_text_embed.guidance_embedder.linear_1"),
        ("linear", "guidance", "condition.guidance.out", "time_text_embed.guidance_embedder.linear_2"),
        ("condition", "pooled", "condition.pooled", "time_text_embed.text_embedder"),
        ("linear", "pooled", "condition.pooled.in", "time_text_embed.text_embedder.linear_1"),
        ("linear", "pooled", "condition.pooled.out", "time_text_embed.text_embedder.linear_2"),
        ("condition", "text", "condition.text", "context_embedder"),
        ("linear", "text", "condition.text.proj", "context_embedder"),
    )
    block_table = JOINT
    back = (
        ("linear", "modulation", "final.modulation", "norm_out.linear"),
        ("linear", "final", "final", "proj_out"),
    )
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
        half = (0.5, 0.5, 0.5)
        size = (3, 1024, 1024)
        return {"input_size": size, "mean": half, "std": half, "crop_pct": 1.0, "interpolation": "bicubic"}

    def points(self) -> list[Point]:
        """Points of the embeddings, of the joint blocks, of the single ones, and of the final projection."""
        found = super().points()
        behind = len(found) - sum(p.name.startswith("final") for p in found)
        joint = len(self.module.transformer_blocks)  # type: ignore[arg-type]
        single: list[Point] = []
        for i, block in enumerate(self.module.single_transformer_blocks):  # type: ignore[arg-type]
            single += self.points_at(block, f"single.{i}", f"single_transformer_blocks.{i}", joint + i, SINGLE)
        return [*found[:behind], *single, *found[behind:]]

    def site_kind(self, module: nn.Module, kind: type[Site]) -> type[Site]:
        """A block gives (text, image)."""
        if type(module).__name__ not in ("FluxTransformerBlock", "FluxSingleTransformerBlock"):
            return super().site_kind(module, kind)
        from multimodal.diffusers_attention import ImageBlock

        return ImageBlock

    def run(self, module: nn.Module, *inputs: Any, **kwargs: Any) -> Tensor:
        """What the transformer answers.

        Args:
            inputs: latents (B, C, H, W), time steps (B,) or one for all, of the scheduler (0..1000), text embeddings
                (B, L, d_text), pooled text (B, d_pooled). `guidance`: a number or (B,), 3.5 by default, for a model that was
                distilled with it. Further keywords go to the library.

        Returns:
            (B, C, H, W): the prediction of the flow, noise - latents.

        Raises:
            DataError: other channels or widths, or an odd height or width.
        """
        return self._run(module, *inputs, **kwargs)

    def _run(
        self,
        module: nn.Module,
        latents: Any,
        timestep: Any,
        encoder_hidden_states: Any,
        pooled_projections: Any,
        guidance: Any = 3.5,
        **rest: Any,
    ) -> Tensor:
        self.check_latents(latents, "B C H W", self.latent_channels, patch=2)
        self.check_text(encoder_hidden_states, latents, int(self.config.joint_attention_dim))
        self.check_text(pooled_projections, latents, int(self.config.pooled_projection_dim), "pooled_projections")
        height, width = latents.shape[-2] // 2, latents.shape[-1] // 2
        packed = F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)
        strength = timesteps(guidance, latents).float() if self.config.guidance_embeds else None
        flow = module(
            packed,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timesteps(timestep, latents).to(latents.dtype) / 1000,
            img_ids=_places(height, width, latents),
            txt_ids=latents.new_zeros(encoder_hidden_states.shape[1], 3),
            guidance=strength,
            return_dict=False,
            **rest,
        )[0]
        return F.pixel_shuffle(flow.transpose(1, 2).unflatten(2, (height, width)), 2)

    def tiny_batch(self) -> tuple[Tensor, ...]:
        """Random latents, time steps, text and pooled text, a batch of two."""
        text = torch.randn(2, 5, int(self.config.joint_attention_dim))
        pooled = torch.randn(2, int(self.config.pooled_projection_dim))
        return torch.randn(2, self.latent_channels, 8, 8), torch.tensor([3.0, 700.0]), text, pooled


def _places(height: int, width: int, like: Tensor) -> Tensor:
    """(height * width, 3): a zero, the row and the column of every patch."""
    rows, columns = (torch.arange(n, device=like.device, dtype=like.dtype) for n in (height, width))
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
    return F.pad(grid, (1, 0)).flatten(0, 1)
