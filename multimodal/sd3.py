"""Text-to-image with joint attention: diffusers' `SD3Transformer2DModel` (Stable Diffusion 3 and 3.5, MM-DiT of Esser et al.).

Image and text have projections, MLPs and modulations of their own in each block and meet in one attention over [image | text].
Points of the text stand under `blocks.i.text`. Nobody reads what the last block makes of the text, so its queries are no point.
Blocks of 3.5-medium have a second attention of the image alone, `blocks.i.dual`. Block points see the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from multimodal.diffusers_family import FEED_FORWARD, DiffusersBackbone, timesteps
from zoo.backbone import Row
from zoo.points import Point
from zoo.registry import register_backbone

if TYPE_CHECKING:
    from zoo.sites import Site

MEDIUM: dict[str, Any] = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}
# What the text's stream of a block shares with Flux
TEXT = (
    Row("linear", "modulation", "text.modulation", "norm1_context.linear"),
    Row("linear", "q", "text.attn.q", "attn.add_q_proj"),
    Row("linear", "k", "text.attn.k", "attn.add_k_proj"),
    Row("linear", "v", "text.attn.v", "attn.add_v_proj"),
    Row("norm", "norm", "text.attn.q_norm", "attn.norm_added_q"),
    Row("norm", "norm", "text.attn.k_norm", "attn.norm_added_k"),
    Row("linear", "o", "text.attn.o", "attn.to_add_out"),
    Row("sublayer", "attn", "text.attn", "attn.to_add_out", entry="norm1_context", exit="attn.to_add_out:output"),
    Row("linear", "up", "text.mlp.up", "ff_context.net.0.proj"),
    Row("linear", "down", "text.mlp.down", "ff_context.net.2"),
    Row(
        "sublayer",
        "mlp",
        "text.mlp",
        "ff_context",
        entry="ff_context:input",
        exit="ff_context:output",
        stream="norm2_context",
    ),
)
IMAGE = (
    Row("linear", "modulation", "modulation", "norm1.linear"),
    Row("linear", "q", "attn.q", "attn.to_q"),
    Row("linear", "k", "attn.k", "attn.to_k"),
    Row("linear", "v", "attn.v", "attn.to_v"),
    Row("norm", "norm", "attn.q_norm", "attn.norm_q"),
    Row("norm", "norm", "attn.k_norm", "attn.norm_k"),
    Row("attention", "attn", "attn.product", "attn"),
    Row("linear", "o", "attn.o", "attn.to_out.0"),
    Row("sublayer", "attn", "attn", "attn", entry="norm1", exit="attn:output"),
)
IMAGE_MLP = (
    *FEED_FORWARD,
    Row("sublayer", "mlp", "mlp", "ff", entry="ff:input", exit="ff:output", stream="norm2"),
)
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
class SD3(DiffusersBackbone):
    """`sd3-medium`, or `diffusers:<repository or folder>` with a transformer of this class."""

    family = "sd3"
    diffusers_class = "SD3Transformer2DModel"
    aliases = {"sd3-medium": "diffusers:stabilityai/stable-diffusion-3-medium-diffusers"}
    configs = {"diffusers:stabilityai/stable-diffusion-3-medium-diffusers": MEDIUM}
    licences = {"diffusers:stabilityai/stable-diffusion-3-medium-diffusers": "other"}
    schedule = ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
    front = (
        ("linear", "patch", "patch_embed", "pos_embed.proj"),
        ("condition", "time", "condition.time", "time_text_embed.timestep_embedder"),
        ("linear", "time", "condition.time.in", "time_text_embed.timestep_embedder.linear_1"),
        ("linear", "time", "condition.time.out", "time_text_embed.timestep_embedder.linear_2"),
        ("condition", "pooled", "condition.pooled", "time_text_embed.text_embedder"),
        ("linear", "pooled", "condition.pooled.in", "time_text_embed.text_embedder.linear_1"),
        ("linear", "pooled", "condition.pooled.out", "time_text_embed.text_embedder.linear_2"),
        ("condition", "text", "condition.text", "context_embedder"),
        ("linear", "text", "condition.text.proj", "context_embedder"),
    )
    block_table = (*IMAGE, *DUAL, *IMAGE_MLP, *TEXT, Row("block", "block", "", ""))
    back = (
        ("linear", "modulation", "final.modulation", "norm_out.linear"),
        ("linear", "final", "final", "proj_out"),
    )
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

    def site_kind(self, module: nn.Module, kind: type[Site]) -> type[Site]:
        """A block gives (text, image)."""
        if type(module).__name__ != "JointTransformerBlock":
            return super().site_kind(module, kind)
        from multimodal.diffusers_attention import ImageBlock

        return ImageBlock

    def run(self, module: nn.Module, *inputs: Any, **kwargs: Any) -> Tensor:
        """What the transformer answers.

        Args:
            inputs: latents (B, C, H, W), time steps (B,) or one for all, text embeddings (B, L, d_text), pooled text
                (B, d_pooled). Further keywords go to the library.

        Returns:
            (B, C, H, W): the prediction of the flow, noise - latents.

        Raises:
            DataError: other channels or widths, or latents that are not of whole patches.
        """
        return self._run(module, *inputs, **kwargs)

    def _run(
        self,
        module: nn.Module,
        latents: Any,
        timestep: Any,
        encoder_hidden_states: Any,
        pooled_projections: Any,
        **rest: Any,
    ) -> Tensor:
        self.check_latents(latents, "B C H W", self.latent_channels)
        self.check_text(encoder_hidden_states, latents, int(self.config.joint_attention_dim))
        self.check_text(pooled_projections, latents, int(self.config.pooled_projection_dim), "pooled_projections")
        return module(
            latents,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timesteps(timestep, latents),
            return_dict=False,
            **rest,
        )[0]

    def tiny_batch(self) -> tuple[Tensor, ...]:
        """Random latents, time steps, text and pooled text, a batch of two."""
        config, size = self.config, int(self.config.sample_size)
        text = torch.randn(2, 5, int(config.joint_attention_dim))
        pooled = torch.randn(2, int(config.pooled_projection_dim))
        return torch.randn(2, self.latent_channels, size, size), torch.tensor([3.0, 700.0]), text, pooled
