"""Text-to-image by cross attention: diffusers' `PixArtTransformer2DModel` (PixArt-alpha of Chen et al.).

One modulation for all blocks, to which each adds a table of its own (`scale_shift_table`, no point; `full` trains it):

    a_1, b_1, g_1, a_2, b_2, g_2 = W_mod silu(time(t)) + S             S (6, d)
    u = x + g_1 * Attn(LN(x) * (1 + b_1) + a_1)
    w = u + Cross(u, text)                              y = w + g_2 * MLP(LN(w) * (1 + b_2) + a_2)

The norms have no parameters. Members for 1,024 pixels also take the size and aspect of the image as a condition.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from multimodal.families.diffusion.family import FEED_FORWARD, DiffusersBackbone, embedder, timesteps
from zoo.points.rows import Row
from zoo.registry import register_backbone

SMALL: dict[str, Any] = {"sample_size": 64, "caption_channels": 4096}
LICENCE = "openrail++"


@register_backbone
class PixArt(DiffusersBackbone):
    """`pixart-xl2` (512 pixels), `pixart-xl2-1024`, or `diffusers:<repository or folder>` with a transformer of this class."""

    family = "pixart"
    diffusers_class = "PixArtTransformer2DModel"
    pipeline_class = "PixArtAlphaPipeline"
    aliases = {
        "pixart-xl2": "diffusers:PixArt-alpha/PixArt-XL-2-512x512",
        "pixart-xl2-1024": "diffusers:PixArt-alpha/PixArt-XL-2-1024-MS",
    }
    configs = {
        "diffusers:PixArt-alpha/PixArt-XL-2-512x512": SMALL,
        "diffusers:PixArt-alpha/PixArt-XL-2-1024-MS": {**SMALL, "sample_size": 128},
    }
    licences = dict.fromkeys(configs, LICENCE)
    text_tokens = 300
    schedule = ("DDPMScheduler", {"beta_schedule": "linear", "clip_sample": False})
    front = (
        ("linear", "patch", "patch_embed", "pos_embed.proj"),
        *embedder("time", "adaln_single.emb.timestep_embedder"),
        *embedder("size", "adaln_single.emb.resolution_embedder"),
        *embedder("size", "adaln_single.emb.aspect_ratio_embedder", "aspect"),
        ("linear", "modulation", "modulation", "adaln_single.linear"),
        *embedder("text", "caption_projection"),
    )
    block_table = (
        Row("linear", "q", "attn.q", "attn1.to_q"),
        Row("linear", "k", "attn.k", "attn1.to_k"),
        Row("linear", "v", "attn.v", "attn1.to_v"),
        Row("attention", "attn", "attn.product", "attn1"),
        Row("linear", "o", "attn.o", "attn1.to_out.0"),
        Row("sublayer", "attn", "attn", "attn1", entry="attn1:input", exit="attn1:output", stream="norm1"),
        Row("linear", "q", "cross.q", "attn2.to_q"),
        Row("linear", "k", "cross.k", "attn2.to_k"),
        Row("linear", "v", "cross.v", "attn2.to_v"),
        Row("attention", "cross", "cross.product", "attn2"),
        Row("linear", "o", "cross.o", "attn2.to_out.0"),
        Row("sublayer", "cross", "cross", "attn2", entry="attn2:input", exit="attn2:output"),
        *FEED_FORWARD,
        Row("sublayer", "mlp", "mlp", "ff", entry="ff:input", exit="ff:output", stream="norm2"),
        Row("block", "block", "", ""),
    )
    back = (("linear", "final", "final", "proj_out"),)
    elementwise = ("norm1", "norm2")
    tiny = (
        "pixart-xl2",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "num_layers": 2,
            "sample_size": 8,
            "cross_attention_dim": 16,
            "caption_channels": 12,
        },
    )

    def run(self, module: nn.Module, *inputs: Any, **kwargs: Any) -> Tensor:
        """What the transformer answers.

        Args:
            inputs: latents (B, C, H, W), time steps (B,) or one for all, text embeddings (B, L, d_text), and optionally a mask of
                the text (B, L), 1 for words and 0 for padding. Further keywords go to the library.

        Returns:
            (B, 2 C, H, W): the prediction, and as many channels of variance.

        Raises:
            DataError: other channels or widths, or latents that are not of whole patches.
        """
        return self._run(module, *inputs, **kwargs)

    def _run(
        self, module: nn.Module, latents: Any, timestep: Any, encoder_hidden_states: Any, mask: Any = None, **rest: Any
    ) -> Tensor:
        self.check_latents(latents, "B C H W", self.latent_channels)
        config = self.config
        self.check_text(encoder_hidden_states, latents, int(config.caption_channels or config.cross_attention_dim))
        if mask is not None:
            rest["encoder_attention_mask"] = mask
        rest.setdefault("added_cond_kwargs", self._size(module, latents))
        steps = timesteps(timestep, latents)
        return module(latents, encoder_hidden_states=encoder_hidden_states, timestep=steps, return_dict=False, **rest)[
            0
        ]

    @staticmethod
    def _size(module: nn.Module, latents: Tensor) -> dict[str, Tensor | None]:
        """The condition on the image's size in pixels: (B, 2) and (B, 1), where the model has it."""
        if not module.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        height, width = (float(8 * n) for n in latents.shape[-2:])
        rows = latents.shape[0]
        size = torch.tensor([[height, width]], device=latents.device, dtype=latents.dtype)
        aspect = torch.tensor([[height / width]], device=latents.device, dtype=latents.dtype)
        return {"resolution": size.repeat(rows, 1), "aspect_ratio": aspect.repeat(rows, 1)}

    def tiny_batch(self) -> tuple[Tensor, ...]:
        """Random latents, time steps, text and a mask of its last word, a batch of two."""
        config = self.config
        size, width = int(config.sample_size), int(config.caption_channels or config.cross_attention_dim)
        mask = torch.ones(2, 5)
        mask[0, 4] = 0
        return torch.randn(2, self.latent_channels, size, size), torch.tensor([3, 700]), torch.randn(2, 5, width), mask

    def example_batch(self, size: int = 2, classify: bool = False) -> tuple[Tensor, ...]:
        """As `tiny_batch`; the text is as long as the pipeline of PixArt-Sigma makes it, and the mask is of it."""
        latents, steps, text, _ = super().example_batch(size)
        return latents, steps, text, torch.ones(text.shape[:2])
