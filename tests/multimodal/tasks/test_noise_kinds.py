"""Noise of every kind that models of diffusers are trained with, against its schedulers; latents of its autoencoders."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

pytest.importorskip("diffusers")

import diffusers
from diffusers_calls import make
from diffusion_models import tiny_vae

import zoo
from multimodal.tasks.diffuse import Diffuse
from multimodal.tasks.latents import encode, scaled
from multimodal.tasks.noise import dynamic_shift, schedule_of, unshifted

INDEX = torch.tensor([0, 1, 400, 998, 999])


def pair() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(5, 2, 4, 4), torch.randn(5, 2, 4, 4)


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_edm(kind: str, predicts: str) -> None:
    """What the model should say makes the scheduler's own preconditioning give the latents back."""
    scheduler = getattr(diffusers, kind)(prediction_type=predicts)
    schedule = schedule_of(scheduler)
    latents, noise = pair()
    seen, target = schedule.add(latents, noise, INDEX)
    for i, at in enumerate(INDEX.tolist()):
        sigma = scheduler.sigmas[at]
        noisy = latents[i] + noise[i] * sigma
        torch.testing.assert_close(seen[i], scheduler.precondition_inputs(noisy, sigma), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            schedule.steps[at].float(), scheduler.precondition_noise(sigma), rtol=1e-4, atol=1e-5
        )
        back = scheduler.precondition_outputs(noisy, target[i].double(), sigma.double())
        torch.testing.assert_close(back.float(), latents[i], rtol=1e-3, atol=2e-3)
    torch.manual_seed(0)
    drawn = schedule.sigmas[schedule.times(20_000, "log-normal")].log()
    torch.testing.assert_close(drawn.mean().float(), torch.tensor(-1.2), rtol=0, atol=0.05)
    torch.testing.assert_close(drawn.std().float(), torch.tensor(1.2), rtol=0.05, atol=0)


@pytest.mark.parametrize("kind", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler"])
def test_flows_of_multistep_schedulers(kind: str) -> None:
    """Wan's and Sana's pipelines come with these: the same flow as FlowMatchEuler's of that shift."""
    options: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    schedule = schedule_of(getattr(diffusers, kind)(**options))
    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    latents, noise = pair()
    noisy, target = schedule.add(latents, noise, INDEX)
    torch.testing.assert_close(schedule.steps.float(), euler.timesteps, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(noisy, euler.scale_noise(latents, euler.timesteps[INDEX], noise), rtol=1e-3, atol=1e-4)
    assert torch.equal(target, noise - latents)


def test_a_flow_from_noise_to_image() -> None:
    """Mochi's scheduler: one step with the right prediction, from any noise to the end, gives the latents."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    schedule = schedule_of(scheduler)
    latents, noise = pair()
    noisy, target = schedule.add(latents, noise, INDEX)
    left = (1 - schedule.steps[INDEX] / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy + left * target, latents, rtol=1e-4, atol=1e-5)
    used = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    used.set_timesteps(1000)
    at = int((used.timesteps - schedule.steps[400]).abs().argmin())
    used._step_index = at
    stepped = used.step(target[2], used.timesteps[at], noisy[2]).prev_sample
    expected = noisy[2] + (used.sigmas[at + 1] - used.sigmas[at]) * (latents[2] - noise[2])
    torch.testing.assert_close(stepped, expected, rtol=1e-4, atol=1e-5)


def test_shifts_of_a_flow() -> None:
    """A number, or what the scheduler has for images of a size: the sigmas of its own time shift."""
    plain = schedule_of(diffusers.FlowMatchEulerDiscreteScheduler())
    three = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    torch.testing.assert_close(plain.shifted(3.0).sigmas.float(), three.sigmas, rtol=1e-5, atol=1e-6)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    mu = calculate_shift(1024)
    shift = dynamic_shift(scheduler, 1024)
    assert math.isclose(shift, math.exp(mu))
    expected = scheduler.time_shift(mu, 1.0, plain.sigmas)
    torch.testing.assert_close(plain.shifted(shift).sigmas, expected, rtol=1e-6, atol=1e-8)
    # in place of the scheduler's own shift, not on top of it
    assert torch.equal(unshifted(three).sigmas, plain.sigmas)
    model, batch = make("WanTransformer3DModel")  # trained with a shift of 3
    five = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    torch.testing.assert_close(
        Diffuse(shift=5.0)._shifted(model, batch[0]).sigmas.float(), five.sigmas, rtol=1e-5, atol=1e-6
    )
    for wrong in (0.0, -1.0, math.inf):
        with pytest.raises(zoo.errors.ConfigError, match="shift is"):
            Diffuse(shift=wrong)
    with pytest.raises(zoo.errors.ConfigError, match="and a flow"):
        schedule_of(diffusers.DDPMScheduler()).shifted(2.0)


@pytest.mark.parametrize("weighting", ["logit-normal", "mode"])
def test_time_steps_are_drawn_as_the_library_draws_them(weighting: str) -> None:
    from diffusers.training_utils import compute_density_for_timestep_sampling

    schedule = schedule_of(diffusers.FlowMatchEulerDiscreteScheduler())
    torch.manual_seed(0)
    ours = schedule.times(40_000, weighting, mean=0.5, std=0.8).float() / 1000
    scheme = weighting.replace("-", "_")
    theirs = compute_density_for_timestep_sampling(scheme, 40_000, logit_mean=0.5, logit_std=0.8, mode_scale=1.29)
    for quantile in (0.1, 0.5, 0.9):
        torch.testing.assert_close(ours.quantile(quantile), theirs.quantile(quantile), rtol=0, atol=0.015)


# -- latents ------------------------------------------------------------------------------------------------------------------


def test_latents_of_wan_and_qwen_are_scaled_by_channel() -> None:
    vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.0, 2.0, 0.5, 4.0],
    ).eval()
    clip = torch.randn(2, 3, 5, 8, 8)
    found = encode(vae, clip, draw=False, video=True)
    with torch.no_grad():
        raw = vae.encode(clip).latent_dist.mode()
    mean, std = (torch.tensor(x).view(1, 4, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
    torch.testing.assert_close(found, (raw - mean) / std)
    picture = encode(vae, clip[:, :, 0], draw=False, video=False)
    assert picture.ndim == 4
    torch.testing.assert_close(picture, encode(vae, clip[:, :, :1], draw=False, video=True)[:, :, 0])


def test_latents_of_images_frame_by_frame() -> None:
    vae = tiny_vae()
    clip = torch.randn(2, 3, 4, 16, 16)
    found = encode(vae, clip, draw=False, video=True)
    for i in range(4):
        alone = encode(vae, clip[:, :, i], draw=False, video=False)
        torch.testing.assert_close(found[:, :, i], alone, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        raw = vae.encode(clip[:, :, 0]).latent_dist.mode()
    torch.testing.assert_close(found[:, :, 0], raw * vae.config.scaling_factor, rtol=1e-4, atol=1e-5)


def test_latents_of_flux_2_are_packed_and_normed() -> None:
    class Packed(nn.Module):
        """The part of AutoencoderKLFlux2 that norms."""

        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(8, affine=False)
            self.bn.running_mean += torch.randn(8)  # type: ignore[operator]
            self.config = type("Config", (), {"batch_norm_eps": 1e-4})()

    vae, latents = Packed(), torch.randn(2, 2, 4, 6)
    packed = diffusers.Flux2Pipeline._patchify_latents(latents)
    expected = (packed - vae.bn.running_mean.view(1, -1, 1, 1)) / torch.sqrt(
        vae.bn.running_var.view(1, -1, 1, 1) + 1e-4
    )  # type: ignore[union-attr]
    torch.testing.assert_close(scaled(vae, latents), expected)


# -- a fit on each kind -------------------------------------------------------------------------------------------------------

KINDS = {
    "OvisImageTransformer2DModel": {"weighting": "logit-normal", "shift": "dynamic"},
    "WanTransformer3DModel": {"shift": 5.0},
    "MochiTransformer3DModel": {},
    "LatteTransformer3DModel": {},
    "HunyuanDiT2DModel": {},
    "ZImageTransformer2DModel": {"weighting": "mode"},
    "CogView3PlusTransformer2DModel": {},
    "HunyuanVideoTransformer3DModel": {"scheduler": diffusers.EDMEulerScheduler(), "weighting": "log-normal"},
}


@pytest.mark.parametrize("made", KINDS)
def test_fits(made: str) -> None:
    """Items are ((latents, conditions ...), anything): the loss falls, with the noise that the class is trained with."""
    model, batch = make(made)
    model.add_adapter(zoo.adapter("lora", rank=2, targets="all-linear"))
    latents, _, *conditions = batch
    items = [((latents[i % 2], *(c[i % 2] for c in conditions)), 0) for i in range(4)]
    task = Diffuse(**KINDS[made])
    before = zoo.evaluate(model, items, task=task, batch_size=4)["loss"]
    zoo.fit(model, items, task=task, epochs=12, batch_size=4, lr=1e-2, seed=0)
    assert zoo.evaluate(model, items, task=task, batch_size=4)["loss"] < before
    assert all(p.isfinite().all() for p in model.parameters_to_train().values())


def test_pixels_without_an_autoencoder_are_refused() -> None:
    model, batch = make("OvisImageTransformer2DModel")
    with pytest.raises(zoo.ZooError, match="works on latents of 4"):
        Diffuse().encode(model, torch.randn(2, 3, 8, 8))
    assert isinstance(TensorDataset(batch[0]), TensorDataset)
