"""Training diffusion models: noise, the loss, data, clips, and the feature distance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset

pytest.importorskip("diffusers")

import diffusers
from diffusion_models import XL, make, tiny_vae, tiny_video_vae

import zoo
from multimodal.data.clips import embed_texts
from multimodal.metrics.frechet import Moments, feature_distance, frechet_distance, image_features
from multimodal.tasks.diffuse import Diffuse
from multimodal.tasks.noise import schedule_of
from multimodal.tasks.sampling import generate

# -- noise --------------------------------------------------------------------------------------------------------------

SCHEDULERS = [
    diffusers.DDPMScheduler(),
    diffusers.DDIMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear"),
    diffusers.DDPMScheduler(prediction_type="sample", rescale_betas_zero_snr=True),
    diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0),
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: type(s).__name__ + s.config.prediction_type)
def test_noise_is_the_schedulers(scheduler: Any) -> None:
    schedule = schedule_of(scheduler)
    latents, noise = torch.randn(5, 2, 3, 4, 4), torch.randn(5, 2, 3, 4, 4)
    index = torch.tensor([0, 1, 500, 998, 999])
    noisy, target = schedule.add(latents, noise, index)
    steps = schedule.steps[index]
    torch.testing.assert_close(noisy, scheduler.add_noise(latents, noise, steps), rtol=1e-4, atol=1e-5)
    if schedule.predicts == "v_prediction":
        torch.testing.assert_close(target, scheduler.get_velocity(latents, noise, steps), rtol=1e-4, atol=1e-5)
    else:
        assert target is (noise if schedule.predicts == "epsilon" else latents)
    assert schedule.times(4, "uniform", even=True).tolist() == [125, 375, 625, 875]


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noise_of_a_flow(shift: float) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    used = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    used.set_timesteps(4)  # what was sampled with does not change what is trained
    schedule = schedule_of(used)
    latents, noise, index = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0, 400, 999])
    noisy, target = schedule.add(latents, noise, index)
    steps = schedule.steps[index]
    torch.testing.assert_close(noisy, scheduler.scale_noise(latents, steps, noise), rtol=1e-5, atol=1e-5)
    assert torch.equal(target, noise - latents)
    torch.manual_seed(0)
    drawn = schedule.times(20_000, "logit-normal").float() / 1000
    torch.testing.assert_close(drawn.logit(eps=1e-3).std(), torch.tensor(1.0), rtol=0.03, atol=0)


def test_other_schedulers_are_refused() -> None:
    with pytest.raises(zoo.errors.ConfigError, match="neither alphas_cumprod nor"):
        schedule_of(diffusers.VQDiffusionScheduler(num_vec_classes=4))
    with pytest.raises(zoo.errors.ConfigError, match="expected one of diffusers"):
        schedule_of(torch.optim)


# -- the loss -----------------------------------------------------------------------------------------------------------


def data(count: int = 8, classes: int = 10) -> TensorDataset:
    torch.manual_seed(5)
    return TensorDataset(torch.rand(count, 3, 8, 8) * 2 - 1, torch.arange(count) % classes)


def test_the_loss_by_hand() -> None:
    """With the library's scheduler and its call of the transformer, in evaluation."""
    model, _ = make("dit")
    pixels, labels = data().tensors
    task = Diffuse(seed=3)
    loss, outputs = task.loss(model, pixels, labels)
    scheduler = diffusers.DDPMScheduler(beta_schedule="linear")
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(3))
    steps = torch.arange(8) * 125 + 62
    noisy = scheduler.add_noise(pixels, noise, steps)
    module: Any = model.backbone
    prediction = module(noisy, timestep=steps, class_labels=labels).sample
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(prediction, noise), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outputs.target, noise)
    assert torch.equal(task.loss(model, pixels, labels)[0], loss)  # the same again


def test_a_share_of_the_labels_is_left_out() -> None:
    model, _ = make("dit", "lora")
    seen: list[Tensor] = []
    for block in model.backbone.transformer_blocks:  # type: ignore[union-attr]
        embedder: Any = block.norm1.emb.class_embedder  # type: ignore[union-attr]
        embedder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    pixels, labels = torch.zeros(400, 3, 8, 8), torch.full((400,), 4)
    model.train()
    torch.manual_seed(0)
    Diffuse(drop=0.25).loss(model, pixels, labels)
    none = seen[0] == 10
    assert 70 < int(none.sum()) < 130
    assert bool((seen[0][~none] == 4).all())
    assert all(torch.equal(s, seen[0]) for s in seen)  # the same in all blocks
    for evaluation, task in ((False, Diffuse(drop=0)), (True, Diffuse(drop=0.25))):
        seen.clear()
        model.train(not evaluation)
        task.loss(model, pixels, labels)
        assert bool((seen[0] == 4).all())


def test_full_fine_tuning_does_not_drop_twice() -> None:
    model, _ = make("dit", "full")
    pixels, labels = data().tensors
    model.train()
    task = Diffuse(drop=0)
    torch.manual_seed(0)
    first = task.loss(model, pixels, labels)[0]
    torch.manual_seed(0)
    assert torch.equal(first, task.loss(model, pixels, labels)[0])
    assert all(not m.training for m in model.backbone.modules() if type(m).__name__ == "LabelEmbedding")


def test_variance_is_not_trained() -> None:
    torch.manual_seed(0)
    options = zoo.registry.family("dit").tiny[1]  # type: ignore[index]
    model = zoo.load("dit-micro", "bitfit", pretrained=False, **options, out_channels=6)
    pixels, labels = data().tensors
    Diffuse().loss(model, pixels, labels)[0].backward()
    bias = model.parameters_to_train()["bitfit/final.bias"].grad
    assert bias is not None
    assert bool(bias.view(16, 6)[:, 3:].eq(0).all())
    assert bool(bias.view(16, 6)[:, :3].ne(0).all())


def test_fit_and_evaluate(tmp_path: Path) -> None:
    """One colour for each class is learned; the same seed gives the same numbers."""
    torch.manual_seed(0)
    colours = torch.rand(10, 3, 1, 1) * 2 - 1
    labels = torch.arange(40) % 10
    pixels = colours[labels].expand(-1, -1, 8, 8).clone()
    runs = []
    for _ in range(2):
        model, _ = make("dit")
        model.add_adapter(zoo.adapter("lora", rank=8, targets="q,k,v,o,up,down,modulation,final"))
        before = zoo.evaluate(model, TensorDataset(pixels, labels), progress=False)["loss"]
        train = TensorDataset(pixels, labels)
        report = zoo.fit(model, train, epochs=15, batch_size=20, lr=1e-2, seed=1, progress=False, out=tmp_path)
        after = zoo.evaluate(model, train, progress=False)
        runs.append(after["loss"])
    assert runs[0] == runs[1]
    assert after["loss"] < 0.8 * before
    assert "accuracy" not in after
    assert report.metrics["loss"] > 0
    assert model.record["saved_bytes"]["default"] > 0


def test_fit_on_an_image_folder(image_folder: Path) -> None:
    """Two classes of a model for ten; flipped in training, and nothing else."""
    model, _ = make("dit", "lora")
    report = zoo.fit(model, image_folder / "train", epochs=1, batch_size=8, progress=False)
    assert report.metrics["loss"] > 0
    found = zoo.evaluate(model, image_folder / "test", progress=False)
    assert found["images"] == 12
    picture = Image.open(image_folder / "train" / "red" / "0.png")
    torch.manual_seed(0)
    views = [model.preprocess(train=True)(picture) for _ in range(8)]
    plain = model.preprocess()(picture)
    assert {torch.equal(v, plain) for v in views} == {True, False}
    assert all(torch.equal(v, plain) or torch.equal(v.flip(-1), plain) for v in views)
    assert torch.equal(model.preprocess(train=True, augment="none")(picture), plain)


def test_latents_by_an_autoencoder() -> None:
    torch.manual_seed(0)
    vae = tiny_vae()
    model = zoo.load("dit-xl2", "lora", pretrained=False, **XL)
    pixels, labels = torch.rand(4, 3, 32, 32) * 2 - 1, torch.tensor([1, 2, 3, 999])
    task = Diffuse(vae=vae)
    latents, _ = task.encode(model, pixels)
    expected = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
    assert torch.equal(latents, expected)
    assert not any(p.requires_grad for p in vae.parameters())
    zoo.fit(model, TensorDataset(pixels, labels), epochs=1, batch_size=2, task=task, progress=False)
    with pytest.raises(zoo.errors.ConfigError, match=r"3 channels, and .* latents of 4. Pass the autoencoder"):
        zoo.fit(model, TensorDataset(pixels, labels), epochs=1, progress=False)


def test_several_conditions() -> None:
    """SD3 and Flux take pooled text besides: items ((latents, text, pooled), anything)."""
    for name in ("sd3", "flux", "pixart"):
        model, (latents, _, *conditions) = make(name, "lora")
        rows = [((latents[i], *(c[i] for c in conditions)), 0) for i in range(2)]

        class Rows(torch.utils.data.Dataset[Any]):
            def __init__(self, rows: list[Any]) -> None:
                self.rows = rows

            def __len__(self) -> int:
                return len(self.rows)

            def __getitem__(self, index: int) -> Any:
                return self.rows[index]

        report = zoo.fit(model, Rows(rows), epochs=1, batch_size=2, progress=False)
        assert report.metrics["loss"] > 0


def test_bad_data() -> None:
    model, _ = make("dit", "lora")
    pixels = torch.zeros(3, 3, 8, 8)
    with pytest.raises(zoo.errors.DataError, match=r"class label 10 is outside the model's 10 classes"):
        zoo.fit(model, TensorDataset(pixels, torch.tensor([0, 1, 10])), epochs=1, progress=False)
    with pytest.raises(zoo.errors.ConfigError, match="no diffusion model"):
        vit = zoo.load("vit-micro", "lora", num_classes=0)
        zoo.fit(vit, data(), epochs=1, task="diffuse", progress=False)
    for options in ({"drop": 1.0}, {"weighting": "cosine"}):
        with pytest.raises(zoo.errors.ConfigError, match="expected"):
            Diffuse(**options)  # type: ignore[arg-type]


# -- clips --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for _ in range(11)]
    (tmp_path / "a").mkdir()
    for i, frame in enumerate(frames):
        frame.save(tmp_path / "a" / f"{i:03d}.png")
    frames[0].save(tmp_path / "b.gif", save_all=True, append_images=frames[1:9])
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"clip {name}\n")
    return tmp_path


def test_a_folder_of_clips(clips: Path) -> None:
    model, _ = make("cogvideox", "lora")
    assert embed_texts(clips, lambda text: torch.full((5, 12), float(len(text)))) == 2
    dataset = model.family.open_dataset(clips)
    assert [dataset.where(i).split("/")[1] for i in range(len(dataset))] == ["a", "b.gif"]
    torch.manual_seed(0)
    vae = tiny_video_vae()
    report = zoo.fit(model, clips, epochs=1, batch_size=2, task=Diffuse(vae=vae), progress=False)
    assert report.metrics["loss"] > 0
    frames, text = dataset.with_transform(model.preprocess()).__getitem__(0)
    assert frames.shape == (9, 3, 64, 64)
    assert text.shape == (5, 12)
    first = np.asarray(Image.open(clips / "a" / "000.png"), dtype=np.float32)
    torch.testing.assert_close(frames[0], torch.from_numpy(first).permute(2, 0, 1) / 127.5 - 1, rtol=0, atol=1e-5)


def test_clips_that_do_not_fit(clips: Path) -> None:
    model, _ = make("cogvideox", "lora")
    with pytest.raises(zoo.errors.DataError, match=r"a: no text embeddings in 'a.safetensors'.*embed_texts"):
        zoo.fit(model, clips, epochs=1, progress=False)
    embed_texts(clips, lambda text: torch.zeros(5, 12))
    (clips / "a" / "010.png").unlink()
    (clips / "a" / "009.png").unlink()
    (clips / "a" / "008.png").unlink()
    with pytest.raises(zoo.errors.DataError, match="A clip has 8 frames, fewer than the 9"):
        zoo.fit(model, clips, epochs=1, progress=False)
    task, text = Diffuse(vae=tiny_video_vae()), torch.zeros(1, 5, 12)
    with pytest.raises(zoo.errors.DataError, match="3 frames, fewer than the 5 of the shortest"):
        task.loss(model, torch.zeros(1, 3, 3, 64, 64), text)
    with pytest.raises(zoo.errors.DataError, match=r"has 7 frames; .* Cut it to 5"):
        task.loss(model, torch.zeros(1, 7, 3, 64, 64), text)
    with pytest.raises(zoo.errors.DataError, match="no clips"):
        (clips / "empty").mkdir()
        model.family.open_dataset(clips / "empty")


def test_image_to_video_learns_from_the_first_frame() -> None:
    torch.manual_seed(0)
    options: Any = {**zoo.registry.family("cogvideox").tiny[1], "in_channels": 8}  # type: ignore[index]
    model = zoo.load("cogvideox-5b-i2v", "lora", pretrained=False, **options)
    vae = tiny_video_vae()
    video, text = torch.rand(2, 9, 3, 64, 64) * 2 - 1, torch.randn(2, 5, 12)
    task = Diffuse(vae=vae)
    latents, image = task.encode(model, video)
    assert image is not None
    assert latents.shape == (2, 3, 4, 8, 8)
    scaled = vae.encode(video[:, :1].transpose(1, 2)).latent_dist.mode() * vae.config.scaling_factor
    torch.testing.assert_close(image, scaled.transpose(1, 2))
    assert task.loss(model, video, text)[0] > 0
    # without an autoencoder the data are latents
    assert torch.equal(Diffuse().encode(model, latents)[1], latents[:, :1])  # type: ignore[arg-type]


# -- the distance -------------------------------------------------------------------------------------------------------


def test_the_distance_is_that_of_scipy() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    rng = torch.Generator().manual_seed(0)
    mix = torch.randn(12, 12, generator=rng, dtype=torch.float64)
    first = torch.randn(300, 12, generator=rng, dtype=torch.float64) @ mix + 1
    second = torch.randn(200, 12, generator=rng, dtype=torch.float64) * torch.linspace(0.2, 3, 12)
    found = Moments(), Moments()
    for part in first.split(77):
        found[0].update(part)
    found[1].update(second)
    torch.testing.assert_close(found[0].mean, first.mean(0))
    torch.testing.assert_close(found[0].covariance, first.T.cov())
    one, two = (np.cov(x.numpy(), rowvar=False) for x in (first, second))
    root = linalg.sqrtm(one @ two).real
    gap = first.mean(0).numpy() - second.mean(0).numpy()
    expected = gap @ gap + np.trace(one + two - 2 * root)
    assert abs(frechet_distance(*found) - expected) < 1e-8 * expected
    assert frechet_distance(found[0], found[0]) < 1e-8
    # fewer images than features: the covariances have no inverse
    few = Moments(), Moments()
    few[0].update(first[:5])
    few[1].update(second[:5])
    one, two = (np.cov(x[:5].numpy(), rowvar=False) for x in (first, second))
    root = linalg.sqrtm(one @ two + 1e-12 * np.eye(12)).real
    gap = first[:5].mean(0).numpy() - second[:5].mean(0).numpy()
    assert abs(frechet_distance(*few) - (gap @ gap + np.trace(one + two - 2 * root))) < 1e-3
    for wrong in (torch.zeros(3), torch.zeros(3, 5), torch.full((3, 12), float("nan"))):
        with pytest.raises(zoo.errors.DataError):
            few[0].update(wrong)
    with pytest.raises(zoo.errors.DataError, match="two images"):
        frechet_distance(Moments(), Moments())


def test_the_distance_of_images() -> None:
    torch.manual_seed(0)
    vit = zoo.load("vit-micro", num_classes=0, pretrained=False, embed_dim=24, depth=1, num_heads=2)
    images = torch.rand(20, 3, 32, 32)
    assert feature_distance(images, images, vit) < 1e-6
    near, far = (feature_distance(images, (images + shift).clamp(0, 1), vit) for shift in (0.05, 0.4))
    assert near < far
    # images of another size are brought to that of the model; normalised as its preprocessing does
    picture = Image.fromarray((images[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8))
    ready = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 255
    torch.testing.assert_close(image_features(vit, ready), vit.features(vit.preprocess()(picture)[None]))
    assert image_features(vit, torch.rand(1, 3, 50, 40)).shape == (1, 24)
    with pytest.raises(zoo.errors.ConfigError, match="no features of images"):
        image_features(make("dit")[0], images)
    with pytest.raises(zoo.errors.DataError, match=r"expected \(n, 3, H, W\)"):
        image_features(vit, images[:, :1])

    model, _ = make("dit")
    task = Diffuse(distance=vit, steps=2, samples=6)
    metrics = zoo.evaluate(model, data(), task=task, batch_size=4, progress=False)
    real, labels = data().tensors
    made = generate(model, labels[:6], steps=2, seed=task.seed)
    assert abs(metrics["feature distance"] - feature_distance(real[:6] / 2 + 0.5, made, vit)) < 1e-4
