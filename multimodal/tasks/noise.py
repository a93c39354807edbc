"""Noise for training: what a scheduler of diffusers adds to latents at a time step, and what is to be predicted then.

Everything is linear in the latents x and the noise n, with four factors for each time step (`Schedule`): the model sees
`signal x + noise n` and has to predict `aim_signal x + aim_noise n`.

Diffusion (any scheduler with `alphas_cumprod`), with a_t the share of the signal's variance:

    x_t = sqrt(a_t) x + sqrt(1 - a_t) n
    to be predicted: n ("epsilon"), sqrt(a_t) n - sqrt(1 - a_t) x ("v_prediction"), or x ("sample")

Flow matching (`FlowMatch...`, and the multistep schedulers with `use_flow_sigmas`), with s_t the scheduler's sigma:

    x_t = (1 - s_t) x + s_t n              to be predicted: n - x
    with `invert_sigmas` (Mochi): x_t = s_t x + (1 - s_t) n        to be predicted: x - n

EDM (Karras et al. 2022; `EDM...`), d = sigma_data: the model sees a scaled x_t, is told log(s_t) / 4, and predicts what makes
`c_skip x_t + c_out F` the latents, which weighs all noise alike:

    x_t = (x + s_t n) / sqrt(s_t^2 + d^2)  to be predicted: (x - c_skip (x + s_t n)) / c_out
    c_skip = d^2 / (s_t^2 + d^2)           c_out = +- s_t d / sqrt(s_t^2 + d^2)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ConfigError

WEIGHTINGS = ("uniform", "logit-normal", "mode", "log-normal")
# Of "mode" (SD3), and of "log-normal" (EDM)
MODE_SCALE = 1.29
LOG_MEAN, LOG_STD = -1.2, 1.2


@dataclass
class Schedule:
    """The training side of a scheduler: nothing in it depends on how many steps samples are made with."""

    steps: Tensor  # (T,) what the model is told
    signal: Tensor  # (T,) factor of the latents
    noise: Tensor  # (T,) factor of the noise
    predicts: str  # "epsilon", "v_prediction", "sample", "flow" or "edm"
    aim_signal: Tensor  # (T,) factors of what is to be predicted
    aim_noise: Tensor
    sigmas: Tensor  # (T,) noise for one of the latents, in the order of the steps

    def times(self, count: int, weighting: str, even: bool = False, mean: float = 0.0, std: float = 1.0) -> Tensor:
        """(count,) indices of time steps: at random, or (for evaluation) evenly spread.

        `weighting`: "uniform", "logit-normal" with a mean and a standard deviation, or "mode" (SD3) of a place in the schedule;
        or "log-normal" (EDM) of the noise itself.
        """
        if even:
            share = (torch.arange(count) + 0.5) / count
        elif weighting == "logit-normal":
            share = (mean + std * torch.randn(count)).sigmoid()
        elif weighting == "mode":
            u = torch.rand(count)
            share = 1 - u - MODE_SCALE * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
        elif weighting == "log-normal":
            wanted = (LOG_MEAN + LOG_STD * torch.randn(count, dtype=torch.float64)).exp()
            return (self.sigmas.clamp(min=1e-12).log()[None] - wanted.log()[:, None]).abs().argmin(dim=1)
        else:
            share = torch.rand(count)
        return (share * len(self.steps)).long().clamp(0, len(self.steps) - 1)

    def add(self, latents: Tensor, noise: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and noise (B, ...), indices (B,) -> noisy latents, and what is to be predicted."""
        shape = (-1, *[1] * (latents.ndim - 1))

        def factor(values: Tensor) -> Tensor:
            return values[index].to(latents).view(shape)

        noisy = factor(self.signal) * latents + factor(self.noise) * noise
        if self.predicts in ("epsilon", "sample"):
            return noisy, noise if self.predicts == "epsilon" else latents
        if self.predicts == "flow":
            return noisy, noise - latents if bool(self.aim_noise[0] > 0) else latents - noise
        return noisy, factor(self.aim_noise) * noise + factor(self.aim_signal) * latents

    def shifted(self, shift: float) -> Schedule:
        """A flow whose noise is shifted: s <- shift s / (1 + (shift - 1) s), as for larger images.

        Raises:
            ConfigError: it is no flow, or the shift is not above 0.
        """
        if self.predicts != "flow" or not (shift > 0 and math.isfinite(shift)):
            raise ConfigError(
                f"shift is {shift} for a schedule that predicts '{self.predicts}'; expected a number above 0, and a flow."
            )
        inverse = bool(self.aim_noise[0] < 0)
        sigmas = shift * self.sigmas / (1 + (shift - 1) * self.sigmas)
        return _flow(sigmas, len(self.steps), inverse)


def schedule_of(scheduler: Any) -> Schedule:
    """What a scheduler of diffusers says about training.

    A shift that depends on the size of the images (`use_dynamic_shifting`) is not part of it: see `dynamic_shift`.

    Raises:
        ConfigError: it is no scheduler, or of a kind that is not described here.
    """
    config = getattr(scheduler, "config", None)
    if config is None:
        raise ConfigError(
            f"the scheduler is a {type(scheduler).__name__}; expected one of diffusers, such as DDPMScheduler()."
        )
    fresh = type(scheduler).from_config(config)  # one that has sampled holds the time steps of that
    predicts = str(config.get("prediction_type", "epsilon"))
    if type(scheduler).__name__.startswith("EDM"):
        return _edm(fresh, predicts)
    if type(scheduler).__name__.startswith("FlowMatch"):
        sigmas = fresh.sigmas[: len(fresh.timesteps)].double()
        flow = _flow(sigmas, int(config.num_train_timesteps), bool(config.get("invert_sigmas")))
        if not config.get("invert_sigmas"):
            flow.steps = fresh.timesteps
        return flow
    if config.get("use_flow_sigmas") or predicts == "flow_prediction":
        count, shift = int(config.num_train_timesteps), float(config.get("flow_shift") or 1.0)
        sigmas = torch.linspace(1, 1 / count, count, dtype=torch.float64)
        return _flow(shift * sigmas / (1 + (shift - 1) * sigmas), count)
    alphas = getattr(fresh, "alphas_cumprod", None)
    if alphas is not None:
        alphas = torch.as_tensor(alphas).double()
        signal, noise = alphas.sqrt(), (1 - alphas).sqrt()
        aims = {
            "epsilon": (torch.zeros_like(signal), torch.ones_like(signal)),
            "v_prediction": (-noise, signal),
            "sample": (torch.ones_like(signal), torch.zeros_like(signal)),
        }
        if predicts not in aims:
            raise ConfigError(f"the scheduler predicts '{predicts}'; known are epsilon, v_prediction and sample.")
        return Schedule(
            torch.arange(len(alphas)), signal, noise, predicts, *aims[predicts], noise / signal.clamp(min=1e-12)
        )
    raise ConfigError(
        f"the scheduler is a {type(scheduler).__name__}, which has neither alphas_cumprod nor a flow's sigmas. Train with "
        "DDPMScheduler or FlowMatchEulerDiscreteScheduler of the same settings, and sample with this one."
    )


def unshifted(scheduler: Any) -> Schedule:
    """As `schedule_of`, of a flow whose noise is not shifted by the scheduler."""
    config = getattr(scheduler, "config", None) or {}
    own = {name: 1.0 for name in ("shift", "flow_shift") if config.get(name) is not None}
    return schedule_of(type(scheduler).from_config(config, **own) if own else scheduler)


def _flow(sigmas: Tensor, count: int, inverse: bool = False) -> Schedule:
    one = torch.ones_like(sigmas)
    if inverse:  # time runs from noise to latents
        return Schedule(((1 - sigmas) * count).float(), 1 - sigmas, sigmas, "flow", one, -one, sigmas)
    return Schedule((sigmas * count).float(), 1 - sigmas, sigmas, "flow", -one, one, sigmas)


def _edm(fresh: Any, predicts: str) -> Schedule:
    sigmas, data = fresh.sigmas[:-1].double(), float(fresh.config.sigma_data)
    if predicts not in ("epsilon", "v_prediction"):
        raise ConfigError(f"the scheduler predicts '{predicts}'; known of EDM are epsilon and v_prediction.")
    norm = (sigmas**2 + data**2).sqrt()
    skip = data**2 / norm**2
    out = sigmas * data / norm * (1 if predicts == "epsilon" else -1)
    aims = (1 - skip) / out, -skip * sigmas / out
    return Schedule(0.25 * sigmas.log(), 1 / norm, sigmas / norm, "edm", *aims, sigmas)


def dynamic_shift(scheduler: Any, tokens: int) -> float:
    """The shift that a scheduler with `use_dynamic_shifting` has for images of so many tokens; 1.0 for others."""
    config = scheduler.config
    if not config.get("use_dynamic_shifting"):
        return 1.0
    low, high = float(config.get("base_shift", 0.5)), float(config.get("max_shift", 1.15))
    few, many = int(config.get("base_image_seq_len", 256)), int(config.get("max_image_seq_len", 4096))
    mu = low + (tokens - few) * (high - low) / (many - few)
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu
