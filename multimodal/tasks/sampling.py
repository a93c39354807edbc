"""Sampling of images from a class-conditional diffusion transformer, from noise, with or without an autoencoder.

`generate` does what diffusers' `DiTPipeline` does, and more where that cannot: models of other than 1,000 classes, whose "no
class" label is another one, and models that work on pixels. Text-conditioned models are sampled by the library's own pipelines
(`multimodal.families.diffusion.pipelines`). With guidance w the prediction is that of no class, moved towards that of the class:

    e = e(x, none) + w (e(x, y) - e(x, none))
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.errors import ConfigError

if TYPE_CHECKING:
    from zoo.host import Host


@torch.no_grad()
def generate(
    model: Host,
    labels: Sequence[int] | Tensor,
    *,
    steps: int = 50,
    guidance: float = 1.0,
    scheduler: Any = None,
    vae: Any = None,
    seed: int = 0,
    batch_size: int = 64,
) -> Tensor:
    """Images (n, 3, H, W) in [0, 1], on the CPU, one for each label, with the active adapters.

    Args:
        model: of the family "dit".
        labels: classes, n of them.
        steps: of the scheduler.
        guidance: w; 1 is none, and needs half the time.
        scheduler: one of diffusers, which is copied; by default the family's (DDIM).
        vae: the autoencoder of diffusers that turns latents into pixels; not for a model that works on pixels.
        seed: of the noise; image i depends on it and on i, not on the other labels or on `batch_size`.

    Raises:
        ConfigError: another family, no autoencoder for latents, or a setting out of range. DataError: a label outside.
    """
    family: Any = model.family
    if family.family != "dit":
        raise ConfigError(
            f"'{model.backbone_name}' is not class-conditional; sample it by "
            "multimodal.families.diffusion.pipelines.pipeline(model)."
        )
    if steps < 1 or batch_size < 1:
        raise ConfigError(f"steps is {steps} and batch_size {batch_size}; expected 1 or more.")
    if vae is None and family.latent_channels != 3:
        raise ConfigError(
            f"'{model.backbone_name}' makes latents; pass the autoencoder that turns them into pixels: vae=..."
        )
    classes = torch.as_tensor(labels)
    shape = (family.latent_channels, int(family.config.sample_size), int(family.config.sample_size))
    sources = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in range(len(classes))]
    noise = [torch.randn(shape, generator=source) for source in sources]
    training, images = model.training, []
    model.eval()
    try:
        for start in range(0, len(classes), batch_size):
            rows = slice(start, start + batch_size)
            fresh = copy.deepcopy(family.scheduler() if scheduler is None else scheduler)
            latents = torch.stack(noise[rows]).to(model.device, model.dtype)
            latents = denoise(model, latents, classes[rows].to(model.device), fresh, steps, guidance, sources[rows])
            images.append(to_pixels(latents, vae).cpu())
    finally:
        model.train(training)
    return torch.cat(images) if images else torch.zeros(0, 3, *shape[1:])


def denoise(
    model: Host,
    latents: Tensor,
    labels: Tensor,
    scheduler: Any,
    steps: int,
    guidance: float,
    generators: list[torch.Generator] | None = None,
) -> Tensor:
    """Noise (n, C, H, W) -> latents, by `steps` steps of the scheduler."""
    family: Any = model.family
    channels, extra = latents.shape[1], {}
    takes_noise = "generator" in _arguments(scheduler.step)
    if takes_noise and generators is not None:
        extra = {"generator": generators}
    learned = str(getattr(scheduler.config, "variance_type", "")).startswith("learned")
    none = torch.full_like(labels, family.num_classes)
    scheduler.set_timesteps(steps)
    x = latents * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for step in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, step) if hasattr(scheduler, "scale_model_input") else x
        if guidance == 1:
            prediction = model(seen, step, labels)
        else:
            both = model(torch.cat([seen, seen]), step, torch.cat([labels, none])).chunk(2)
            told, untold = (p[:, :channels] for p in both)
            prediction = torch.cat([untold + guidance * (told - untold), both[0][:, channels:]], dim=1)
        if not learned:
            prediction = prediction[:, :channels]
        x = scheduler.step(prediction, step, x, **extra).prev_sample.to(latents.dtype)
    return x


def to_pixels(latents: Tensor, vae: Any = None) -> Tensor:
    """Latents (n, C, H, W), or pixels in [-1, 1] without an autoencoder -> images in [0, 1]."""
    if vae is not None:
        shift = float(getattr(vae.config, "shift_factor", None) or 0.0)
        scaled = latents / float(vae.config.scaling_factor) + shift
        latents = vae.to(latents.device).decode(scaled.to(vae.dtype)).sample
    return (latents.float() / 2 + 0.5).clamp(0, 1)


def _arguments(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)
