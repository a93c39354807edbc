"""Noise for training: what a scheduler of diffusers adds to latents at a time step, and what is to be predicted then.

Diffusion (any scheduler with `alphas_cumprod`), with a_t the share of the signal's variance, x the latents and n the noise:

    x_t = sqrt(a_t) x + sqrt(1 - a_t) n
    to be predicted: n ("epsilon"), sqrt(a_t) n - sqrt(1 - a_t) x ("v_prediction"), or x ("sample")

Flow matching (`FlowMatch...`), with s_t the scheduler's sigma:

    x_t = (1 - s_t) x + s_t n              to be predicted: n - x
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ConfigError

WEIGHTINGS = ("uniform", "logit-normal")


@dataclass
class Schedule:
    """The training side of a scheduler: nothing in it depends on how many steps samples are made with."""

    steps: Tensor  # (T,) what the model is told
    signal: Tensor  # (T,) factor of the latents
    noise: Tensor  # (T,) factor of the noise
    predicts: str  # "epsilon", "v_prediction", "sample" or "flow"

    def times(self, count: int, weighting: str, even: bool = False) -> Tensor:
        """(count,) indices of time steps: at random, or (for evaluation) evenly spread."""
        if even:
            share = (torch.arange(count) + 0.5) / count
        elif weighting == "logit-normal":
            share = torch.randn(count).sigmoid()
        else:
            share = torch.rand(count)
        return (share * len(self.steps)).long().clamp(max=len(self.steps) - 1)

    def add(self, latents: Tensor, noise: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and noise (B, ...), indices (B,) -> noisy latents, and what is to be predicted."""
        shape = (-1, *[1] * (latents.ndim - 1))
        signal, strength = (f[index].to(latents).view(shape) for f in (self.signal, self.noise))
        noisy = signal * latents + strength * noise
        if self.predicts == "epsilon":
            return noisy, noise
        if self.predicts == "v_prediction":
            return noisy, signal * noise - strength * latents
        return noisy, latents if self.predicts == "sample" else noise - latents


def schedule_of(scheduler: Any) -> Schedule:
    """What a scheduler of diffusers says about training.

    Raises:
        ConfigError: it is no scheduler, or of a kind that is not described here.
    """
    config = getattr(scheduler, "config", None)
    if config is None:
        raise ConfigError(
            f"the scheduler is a {type(scheduler).__name__}; expected one of diffusers, such as DDPMScheduler()."
        )
    fresh = type(scheduler).from_config(config)  # one that has sampled holds the time steps of that
    alphas = getattr(fresh, "alphas_cumprod", None)
    if alphas is not None:
        alphas, predicts = torch.as_tensor(alphas).double(), str(config.get("prediction_type", "epsilon"))
        if predicts not in ("epsilon", "v_prediction", "sample"):
            raise ConfigError(f"the scheduler predicts '{predicts}'; known are epsilon, v_prediction and sample.")
        return Schedule(torch.arange(len(alphas)), alphas.sqrt(), (1 - alphas).sqrt(), predicts)
    if type(scheduler).__name__.startswith("FlowMatch"):
        sigmas = fresh.sigmas[: len(fresh.timesteps)].double()
        return Schedule(fresh.timesteps, 1 - sigmas, sigmas, "flow")
    raise ConfigError(
        f"the scheduler is a {type(scheduler).__name__}, which has neither alphas_cumprod nor a flow's sigmas. Train with "
        "DDPMScheduler or FlowMatchEulerDiscreteScheduler of the same settings, and sample with this one."
    )
