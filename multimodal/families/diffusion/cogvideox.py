"""Text-to-video and image-to-video: diffusers' `CogVideoXTransformer3DModel` (CogVideoX of Yang et al.).

One sequence [text | video] runs through every block, with one set of weights and a modulation for each of the two streams:

    a, b, g (video), a', b', g' (text) = W_mod silu(c)                 W_mod (6 d, d_time)
    z = [LN(text) * (1 + b') + a' | LN(video) * (1 + b) + a]
    [text | video] <- [text | video] + [g' | g] * F(z)                 F: attention, then the MLP

The attention norms queries and keys for each head, and turns those of the video (not of the text) by their position in time,
height and width (rotary; the 2B model adds positions to the patches instead). Sublayer points see the whole sequence, text
first; block points see the video. The library's block hands the two streams around separately, so the modulation's site
joins and parts them again.

Latents are in the library's order (B, F, C, H, W). An image-to-video model takes the latents of the image, in as many channels
more, zero behind the first frame.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from multimodal.families.diffusion.family import FEED_FORWARD, embedder, pixel_config, timesteps
from multimodal.families.diffusion.video import VideoBackbone
from zoo.errors import ConfigError, DataError
from zoo.points.rows import Row
from zoo.registry import register_backbone

if TYPE_CHECKING:
    from zoo.engine.sites import Site

FIVE_B: dict[str, Any] = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
I2V: dict[str, Any] = {**FIVE_B, "in_channels": 32, "use_learned_positional_embeddings": True}
LICENCE = "other"  # the CogVideoX License of the 5B models


@register_backbone
class CogVideoX(VideoBackbone):
    """`cogvideox-2b`, `cogvideox-5b`, `cogvideox-5b-i2v`, or `diffusers:<repository or folder>` of this class (1.5 too)."""

    family = "cogvideox"
    diffusers_class = "CogVideoXTransformer3DModel"
    aliases = {
        "cogvideox-2b": "diffusers:THUDM/CogVideoX-2b",
        "cogvideox-5b": "diffusers:THUDM/CogVideoX-5b",
        "cogvideox-5b-i2v": "diffusers:THUDM/CogVideoX-5b-I2V",
    }
    configs = {
        "diffusers:THUDM/CogVideoX-2b": {},  # the library's defaults
        "diffusers:THUDM/CogVideoX-5b": FIVE_B,
        "diffusers:THUDM/CogVideoX-5b-I2V": I2V,
    }
    licences = {
        "diffusers:THUDM/CogVideoX-2b": "apache-2.0",
        "diffusers:THUDM/CogVideoX-5b": LICENCE,
        "diffusers:THUDM/CogVideoX-5b-I2V": LICENCE,
    }
    schedule = (
        "CogVideoXDDIMScheduler",
        {
            "beta_schedule": "scaled_linear",
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        },
    )
    front = (
        *embedder("time", "time_embedding"),
        *embedder("offset", "ofs_embedding"),
        ("condition", "text", "condition.text", "patch_embed.text_proj"),
        ("linear", "text", "condition.text.proj", "patch_embed.text_proj"),
        ("linear", "patch", "patch_embed", "patch_embed.proj"),
    )
    block_table = (
        Row("linear", "modulation", "attn.modulation", "norm1.linear"),
        Row("norm", "norm", "norm1", "norm1.norm"),
        Row("linear", "q", "attn.q", "attn1.to_q"),
        Row("linear", "k", "attn.k", "attn1.to_k"),
        Row("linear", "v", "attn.v", "attn1.to_v"),
        Row("norm", "norm", "attn.q_norm", "attn1.norm_q"),
        Row("norm", "norm", "attn.k_norm", "attn1.norm_k"),
        Row("attention", "attn", "attn.product", "attn1"),
        Row("linear", "o", "attn.o", "attn1.to_out.0"),
        Row("sublayer", "attn", "attn", "attn1", entry="norm1", exit="attn1.to_out.1"),
        Row("linear", "modulation", "mlp.modulation", "norm2.linear"),
        Row("norm", "norm", "norm2", "norm2.norm"),
        *FEED_FORWARD,
        Row("sublayer", "mlp", "mlp", "ff", entry="norm2", exit="ff:output"),
        Row("block", "block", "", ""),
    )
    back = (
        ("norm", "norm", "norm", "norm_final"),
        ("linear", "modulation", "final.modulation", "norm_out.linear"),
        ("norm", "norm", "final.norm", "norm_out.norm"),
        ("linear", "final", "final", "proj_out"),
    )
    tiny = (
        "cogvideox-5b",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": 12,
            "num_layers": 2,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 9,
            "max_text_seq_length": 5,
        },
    )

    @property
    def latent_channels(self) -> int:
        """Channels that are denoised; an image-to-video model takes those of the image besides."""
        return int(self.config.out_channels)

    @property
    def takes_image(self) -> bool:  # type: ignore[override]
        """Whether it is an image-to-video model."""
        return int(self.config.in_channels) != self.latent_channels

    @property
    def pipeline_class(self) -> str:  # type: ignore[override]
        """For an image-to-video model, or for one of text alone."""
        return "CogVideoXImageToVideoPipeline" if self.takes_image else "CogVideoXPipeline"

    @property
    def frame_patch(self) -> int:
        """Latent frames in one patch."""
        return int(self.config.patch_size_t or 1)

    @property
    def clip_frames(self) -> int:
        """Frames of pixels that it was trained on."""
        return int(self.config.sample_frames)

    @property
    def frame_ratio(self) -> int:
        """Frames of pixels in a latent frame."""
        return int(self.config.temporal_compression_ratio)

    def site_kind(self, module: nn.Module, kind: type[Site]) -> type[Site]:
        """The modulated norms of a block take and give two streams."""
        if type(module).__name__ != "CogVideoXLayerNormZero":
            return super().site_kind(module, kind)
        from multimodal.families.diffusion.attention import TwoStreams

        return TwoStreams

    def data_config(self) -> dict[str, Any]:
        """Pixels in [-1, 1] of (H, W) = 8 x the latents' height and width."""
        return pixel_config(int(self.config.sample_height) * 8, int(self.config.sample_width) * 8)

    def hub_task(self, num_classes: int) -> str | None:
        """Videos of a text, or of an image and a text."""
        return "image-to-video" if self.takes_image else "text-to-video"

    def usage(self, num_classes: int) -> tuple[list[str], list[str]]:
        """As `DiffusersBackbone.usage`, with the image where the model takes one."""
        imports, lines = super().usage(num_classes)
        if not imports or not self.takes_image:
            return imports, lines
        lines = ['frames = pipeline(model)(image=Image.open("photo.jpg"), prompt="a cat crosses a lawn").frames[0]']
        return ["from PIL import Image", *imports], lines

    def scheduler(self) -> Any:
        """As `DiffusersBackbone.scheduler`; the 2B model was trained with its signal-to-noise ratio shifted by 3, the 5B by 1."""
        made = super().scheduler()
        return type(made).from_config(made.config, snr_shift_scale=1.0 if self._rotary else 3.0)

    @property
    def _rotary(self) -> bool:
        return bool(self.config.use_rotary_positional_embeddings)

    def run(self, module: nn.Module, *inputs: Any, **kwargs: Any) -> Tensor:
        """What the transformer answers.

        Args:
            inputs: latents (B, F, C, H, W), time steps (B,) or one for all, text embeddings (B, L, d_text) and, for an
                image-to-video model, the image's latents (B, F or 1, C, H, W), where the frames that are not given are zero.
                Further keywords go to the library; `image_rotary_emb` and `ofs` are made here unless they are given.

        Returns:
            (B, F, C, H, W): the prediction.

        Raises:
            DataError: other channels, frames or text widths; ConfigError: an image for a model that takes none, or the reverse.
        """
        latents, steps, text, rest = self._named(*inputs, **kwargs)
        if self._rotary and rest.get("image_rotary_emb") is None:
            from multimodal.families.diffusion.attention import video_positions

            rest["image_rotary_emb"] = video_positions(self.config, latents)
        if self.config.ofs_embed_dim and rest.get("ofs") is None:
            rest["ofs"] = latents.new_full((latents.shape[0],), 2.0)  # the constant of the library's pipeline
        return module(latents, encoder_hidden_states=text, timestep=steps, return_dict=False, **rest)[0]

    def _named(
        self, latents: Any, timestep: Any, encoder_hidden_states: Any, image_latents: Any = None, **rest: Any
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        self.check_latents(latents, "B F C H W", self.latent_channels)
        frames, patch = latents.shape[1], self.frame_patch
        self._check_places(latents)
        if frames % patch:
            raise DataError(
                f"The video has {frames} latent frames; '{self.name}' takes them in chunks of {patch}. Repeat the first one, or "
                f"give {frames + patch - frames % patch} ({self.config.temporal_compression_ratio} frames of pixels each)."
            )
        text = encoder_hidden_states
        self.check_text(text, latents, int(self.config.text_embed_dim))
        tokens = int(self.config.max_text_seq_length)
        if not self._rotary and text.shape[1] != tokens:
            raise DataError(
                f"The text has {text.shape[1]} tokens; the positions of '{self.name}' are made for {tokens}. Pad it to these."
            )
        if self.takes_image != (image_latents is not None):
            raise ConfigError(
                f"'{self.name}' is an image-to-video model: give the image's latents as image_latents (B, F or 1, C, H, W)."
                if self.takes_image
                else f"'{self.name}' makes videos of text alone and takes no image; use 'cogvideox-5b-i2v'."
            )
        if image_latents is not None:
            latents = torch.cat([latents, self._image(image_latents, latents)], dim=2)
        return latents, timesteps(timestep, latents), text, rest

    def _check_places(self, latents: Tensor) -> None:
        config, size = self.config, tuple(latents.shape[3:])
        own = (int(config.sample_height), int(config.sample_width))
        if config.use_learned_positional_embeddings and size != own:
            raise DataError(
                f"Latents are of {size[0]} x {size[1]}; the positions of '{self.name}' were learned for {own[0]} x {own[1]}, "
                f"of videos of {8 * own[0]} x {8 * own[1]} pixels."
            )

    def _image(self, image: Tensor, latents: Tensor) -> Tensor:
        """The image's latents at every frame: zero behind the first patch of frames."""
        if image.ndim != 5 or image.shape[1] not in (1, latents.shape[1]) or image.shape[2:] != latents.shape[2:]:
            raise DataError(
                f"image_latents are {tuple(image.shape)} for latents {tuple(latents.shape)}; expected the same, or one frame."
            )
        image = image.to(latents.dtype)
        if image.shape[1] == latents.shape[1]:
            return image
        first = image.expand(-1, self.frame_patch, -1, -1, -1)
        return torch.cat([first, torch.zeros_like(latents[:, self.frame_patch :])], dim=1)

    def tiny_batch(self) -> tuple[Tensor, ...]:
        """Random latents of four frames, time steps and text, a batch of two; latents of an image where the model takes them."""
        height, width = int(self.config.sample_height), int(self.config.sample_width)
        video = torch.randn(2, 4, self.latent_channels, height, width)
        text = torch.randn(2, int(self.config.max_text_seq_length), int(self.config.text_embed_dim))
        image = (torch.randn(2, 1, *video.shape[2:]),) if self.takes_image else ()
        return video, torch.tensor([3, 700]), text, *image

    def example_batch(self, size: int = 2, classify: bool = False) -> tuple[Tensor, ...]:
        """As `tiny_batch`, with as many frames as the checkpoint was trained on."""
        video, *rest = super().example_batch(size)
        frames = (int(self.config.sample_frames) - 1) // int(self.config.temporal_compression_ratio) + 1
        frames += -frames % self.frame_patch
        return torch.randn(size, frames, *video.shape[2:]), *rest
