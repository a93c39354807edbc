"""What SD3 and Flux share: blocks in which image and text have weights of their own and meet in one attention over both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from multimodal.families.diffusion.family import FEED_FORWARD, DiffusersBackbone, embedder, timesteps
from zoo.points.rows import Row

if TYPE_CHECKING:
    from zoo.engine.sites import Site

TIME = embedder("time", "time_text_embed.timestep_embedder")
TEXTS = (
    *embedder("pooled", "time_text_embed.text_embedder"),
    ("condition", "text", "condition.text", "context_embedder"),
    ("linear", "text", "condition.text.proj", "context_embedder"),
)
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


class JointBackbone(DiffusersBackbone):
    """A transformer of latents (B, C, H, W), time steps, text embeddings (B, L, d_text) and pooled text (B, d_pooled)."""

    back = (
        ("linear", "modulation", "final.modulation", "norm_out.linear"),
        ("linear", "final", "final", "proj_out"),
    )
    two_streams: ClassVar[tuple[str, ...]] = ()  # classes of blocks that give (text, image)
    patch: ClassVar[int | None] = None  # latents along a side of a patch, if not the configuration's `patch_size`

    def site_kind(self, module: nn.Module, kind: type[Site]) -> type[Site]:
        """A block gives (text, image)."""
        if type(module).__name__ not in self.two_streams:
            return super().site_kind(module, kind)
        from multimodal.families.diffusion.attention import ImageBlock

        return ImageBlock

    def run(self, module: nn.Module, *inputs: Any, **kwargs: Any) -> Tensor:
        """What the transformer answers.

        Args:
            inputs: latents (B, C, H, W), time steps (B,) or one for all, of the scheduler (0..1000), text embeddings
                (B, L, d_text), pooled text (B, d_pooled). Further keywords go to the library. Flux also takes `guidance`: a
                number or (B,), 3.5 by default, for a model that was distilled with it.

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
        *more: Any,
        **rest: Any,
    ) -> Tensor:
        self.check_latents(latents, "B C H W", self.latent_channels, self.patch)
        self.check_text(encoder_hidden_states, latents, int(self.config.joint_attention_dim))
        self.check_text(pooled_projections, latents, int(self.config.pooled_projection_dim), "pooled_projections")
        conditions = {"encoder_hidden_states": encoder_hidden_states, "pooled_projections": pooled_projections}
        return self._predict(
            module, latents, timesteps(timestep, latents), *more, **conditions, return_dict=False, **rest
        )

    def _predict(self, module: nn.Module, latents: Tensor, steps: Tensor, **rest: Any) -> Tensor:
        return module(latents, timestep=steps, **rest)[0]

    def tiny_batch(self) -> tuple[Tensor, ...]:
        """Random latents, time steps, text and pooled text, a batch of two."""
        size = int(self.config.get("sample_size", 8))
        text = torch.randn(2, 5, int(self.config.joint_attention_dim))
        pooled = torch.randn(2, int(self.config.pooled_projection_dim))
        return torch.randn(2, self.latent_channels, size, size), torch.tensor([3.0, 700.0]), text, pooled
