"""Pixels to the latents that a transformer of diffusers works on, by the autoencoder that belongs to it.

Autoencoders say in their configuration how their latents are brought to unit variance, in one of three ways:

    z = (E(x) - shift_factor) * scaling_factor                        most of images, HunyuanVideo, CogVideoX
    z = (E(x) - latents_mean) / latents_std * scaling_factor          for each channel: Wan, Qwen-Image, LTX, Mochi
    z = (P(E(x)) - mean) / sqrt(variance + eps)                       Flux 2: P packs 2 x 2, the numbers are of a batch norm
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def encode(vae: Any, pixels: Tensor, draw: bool, video: bool) -> Tensor:
    """Pixels (B, 3, H, W) -> latents (B, C, h, w), or clips (B, 3, F, H, W) -> (B, C, f, h, w), in float32.

    Args:
        vae: an autoencoder of diffusers. draw: a sample of its posterior; otherwise its mode.
    """
    vae = vae.to(pixels.device)
    x = pixels.to(vae.dtype)
    convolves_time = any(isinstance(m, nn.Conv3d) for m in vae.modules())
    batch = len(x)
    if video and not convolves_time:  # frame by frame
        x = x.transpose(1, 2).flatten(0, 1)
    elif not video and convolves_time:  # an image is a video of one frame
        x = x.unsqueeze(2)
    encoded = vae.encode(x)
    posterior = getattr(encoded, "latent_dist", None)
    if posterior is None:
        latents = encoded.latent
    else:
        latents = posterior.sample() if draw else posterior.mode()
    latents = latents.float()
    if video and not convolves_time:
        latents = latents.unflatten(0, (batch, -1)).transpose(1, 2)
    elif not video and convolves_time:
        latents = latents.squeeze(2)
    return scaled(vae, latents)


def scaled(vae: Any, latents: Tensor) -> Tensor:
    """The autoencoder's latents (B, C, ...) brought to unit variance; Flux 2's come out packed, (B, 4 C, h / 2, w / 2)."""
    config = vae.config
    norm = getattr(vae, "bn", None)
    if isinstance(norm, nn.BatchNorm2d):
        packed = F.pixel_unshuffle(latents, 2)
        mean, variance = (
            torch.as_tensor(t).view(1, -1, 1, 1).to(latents) for t in (norm.running_mean, norm.running_var)
        )
        return (packed - mean) / torch.sqrt(variance + float(config.batch_norm_eps))
    scale = float(getattr(config, "scaling_factor", None) or 1.0)
    means, stds = _numbers(vae, "latents_mean"), _numbers(vae, "latents_std")
    if means is None or stds is None:
        return (latents - float(getattr(config, "shift_factor", None) or 0.0)) * scale
    shape = (1, -1, *[1] * (latents.ndim - 2))
    return (latents - means.to(latents).view(shape)) * scale / stds.to(latents).view(shape)


def _numbers(vae: Any, name: str) -> Tensor | None:
    """One number for each channel, from the configuration, or from a buffer of the autoencoder (LTX)."""
    found = getattr(vae.config, name, None)
    found = getattr(vae, name, None) if found is None else found
    return None if found is None else torch.as_tensor(found)


def decode(vae: Any, latents: Tensor, video: bool) -> Tensor:
    """The reverse of `encode`: latents (B, C, h, w) or (B, C, f, h, w) -> pixels (B, 3, H, W) or clips (B, 3, F, H, W)."""
    vae = vae.to(latents.device)
    x, batch = unscaled(vae, latents.float()), len(latents)
    convolves_time = any(isinstance(m, (nn.Conv3d, nn.ConvTranspose3d)) for m in vae.modules())
    if video and not convolves_time:
        x = x.transpose(1, 2).flatten(0, 1)
    elif not video and convolves_time:
        x = x.unsqueeze(2)
    pixels: Tensor = vae.decode(x.to(vae.dtype)).sample.float()
    if video and not convolves_time:
        return pixels.unflatten(0, (batch, -1)).transpose(1, 2)
    return pixels.squeeze(2) if not video and convolves_time else pixels


def unscaled(vae: Any, latents: Tensor) -> Tensor:
    """The reverse of `scaled`."""
    config = vae.config
    norm = getattr(vae, "bn", None)
    if isinstance(norm, nn.BatchNorm2d):
        mean, variance = (
            torch.as_tensor(t).view(1, -1, 1, 1).to(latents) for t in (norm.running_mean, norm.running_var)
        )
        return F.pixel_shuffle(latents * torch.sqrt(variance + float(config.batch_norm_eps)) + mean, 2)
    scale = float(getattr(config, "scaling_factor", None) or 1.0)
    means, stds = _numbers(vae, "latents_mean"), _numbers(vae, "latents_std")
    if means is None or stds is None:
        return latents / scale + float(getattr(config, "shift_factor", None) or 0.0)
    shape = (1, -1, *[1] * (latents.ndim - 2))
    return latents * stds.to(latents).view(shape) / scale + means.to(latents).view(shape)
