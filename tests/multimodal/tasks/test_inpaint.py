"""Filling in masked videos: masks of latents, the loss, windows, and the pipeline around a tiny transformer and autoencoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("diffusers")

from diffusion_models import tiny_video_vae

import zoo
from multimodal.data.masks import KINDS, dilated, hidden, jitter, latent_mask
from multimodal.families.diffusion.inpainting import Windows, inpainting
from multimodal.tasks.inpaint import Inpaint
from multimodal.tasks.latents import decode, encode
from zoo.errors import ConfigError, DataError
from zoo.registry import family

TINY: dict[str, Any] = {**family("cogvideox").tiny[1], "sample_width": 4, "sample_height": 4}  # type: ignore[index]


def build(name: str = "cogvideox-5b-i2v", **options: Any) -> zoo.Model:
    torch.manual_seed(0)
    more = {"in_channels": 8} if name.endswith("i2v") else {}
    model = zoo.load(name, zoo.adapter("videopainter", blocks=1), pretrained=False, **{**TINY, **more, **options})
    with torch.no_grad():
        for linear in model.adapters["videopainter"].encoder.out:
            linear.weight.normal_(0, 0.3)
    return model


def batch(frames: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    mask = torch.zeros(1, frames, 1, 32, 32)
    mask[:, :, :, 8:20, 10:24] = 1
    return torch.rand(1, frames, 3, 32, 32) * 2 - 1, mask, torch.randn(1, 5, 12)


def test_a_latent_is_masked_if_any_of_its_pixels_is() -> None:
    """The authors' way takes frames 0, 3, 7, 11 ... of 49 and loses what is masked between."""
    mask = torch.zeros(1, 49, 1, 16, 16)
    mask[0, 2, 0, 9, 3] = 1  # in the second latent frame: frames 1 to 4
    assert latent_mask(mask, (13, 2, 2), 4).nonzero().tolist() == [[0, 1, 0, 1, 0]]
    assert not latent_mask(mask, (13, 2, 2), 4, "nearest").any()
    with pytest.raises(DataError, match="48 frames cannot belong to 13 latent frames"):
        latent_mask(mask[:, 1:], (13, 2, 2), 4)
    assert dilated(mask, 3)[0, 2, 0].nonzero().tolist() == [[y, x] for y in (8, 9, 10) for x in (2, 3, 4)]
    assert torch.equal(hidden(torch.full((1, 49, 3, 16, 16), 0.5), mask)[0, 2, :, 9, 3], torch.full((3,), -1.0))


@pytest.mark.parametrize("kind", KINDS)
def test_masks_vary_by_kind(kind: str) -> None:
    mask = torch.zeros(5, 1, 48, 64)
    mask[:, 0, 20:32, 20:36] = 1
    made = [jitter(mask, torch.Generator().manual_seed(seed), kind) for seed in range(8)]
    assert all(m.shape == mask.shape and set(m.unique().tolist()) <= {0.0, 1.0} and m.any() for m in made)
    assert torch.equal(made[3], jitter(mask, torch.Generator().manual_seed(3), kind))
    assert sum(not torch.equal(m, mask) for m in made) >= 2
    if kind in ("rectangle", "ellipse", "circle"):  # larger than the box, and the same in every frame
        assert all(m.sum() > 0.7 * mask.sum() and torch.equal(m[0], m[-1]) for m in made)
    empty = torch.zeros(2, 1, 8, 8)
    assert torch.equal(jitter(empty, torch.Generator().manual_seed(0), "circle"), empty)


def test_the_loss_is_the_authors() -> None:
    """Errors of the latents that the velocity leads to, weighed by 1 / (1 - a), and once more where the mask is."""
    model, vae = build().eval(), tiny_video_vae()
    task, inputs = Inpaint(vae=vae, region=0.7), batch()
    schedule = task.schedule(model)
    arguments, _ = task._noisy(model, (inputs[0], inputs[2]), None)
    with torch.no_grad():
        loss, found = task.loss(model, inputs, None)
    latents = encode(vae, inputs[0].transpose(1, 2), False, True).transpose(1, 2)
    index = int(arguments[1][0])
    a = schedule.signal[index] ** 2
    x0 = a.sqrt() * arguments[0].double() - (1 - a).sqrt() * found.prediction.double()
    mask = torch.zeros(1, 3, 1, 4, 4)
    mask[:, 1:, :, 1:3, 1:3] = 1  # nothing of the first frame
    error = (x0 - latents.double()) / (1 - a).sqrt()
    expected = error.square().mean() + 0.7 * (mask * error).square().mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=1e-4)
    given = task.masks(model, inputs)
    assert torch.equal(given["mask"], mask)
    without = inputs[1].clone()
    without[:, 0] = 0
    known = encode(vae, hidden(inputs[0], without).transpose(1, 2), False, True).transpose(1, 2)
    assert torch.equal(given["masked"], known)


def test_training_moves_the_encoder_alone() -> None:
    model, vae = build("cogvideox-5b"), tiny_video_vae()
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    clip, mask, text = batch()
    data = [((clip[0], mask[0], text[0]), 0)] * 2
    report = zoo.fit(model, data, task=Inpaint(vae=vae), epochs=1, batch_size=2, lr=1e-3, progress=False)
    assert report is not None
    assert all(torch.equal(v, before[k]) for k, v in model.backbone.state_dict().items())
    assert any(p.grad is not None or p.requires_grad for p in model.adapters["videopainter"].parameters())


def test_bad_data() -> None:
    model, task = build(), Inpaint(vae=tiny_video_vae())
    clip, mask, text = batch()
    with pytest.raises(DataError, match=r"masks are \(1, 8, 1, 32, 32\) for clips"):
        task.loss(model, (clip, mask[:, 1:], text), None)
    with pytest.raises(DataError, match="marks nothing"):
        task.loss(model, (clip, mask * 0, text), None)
    with pytest.raises(DataError, match="numbers from 0 to 255"):
        task.loss(model, (clip, mask * 255, text), None)
    with pytest.raises(DataError, match="holds no masks"):
        task.loss(model, (clip,), None)
    with pytest.raises(DataError, match="fewer than the 5 of the shortest"):
        task.loss(model, (clip[:, :3], mask[:, :3], text), None)
    with pytest.raises(ConfigError, match="image_drop is 1"):
        Inpaint(image_drop=1.0)


def test_windows() -> None:
    """49 frames are one window; what neighbours share fades; none is dropped."""
    assert Windows.of(49, 49, None, 4).starts == (0,)
    assert Windows.of(160, 49, 48, 4) == Windows(160, 161, 49, (0, 48, 96, 112))
    assert Windows.of(20, 49, None, 4) == Windows(20, 21, 21, (0,))
    assert Windows.of(20, 49, 24, 4).starts == (0,)  # one window, whatever stride longer videos have
    windows = Windows.of(160, 25, 16, 4)
    video = torch.rand(161, 1)
    parts = [video[s : s + 25] for s in windows.starts]
    torch.testing.assert_close(windows.joined(parts), video[:160])
    two = Windows(41, 41, 25, (0, 16)).joined([torch.zeros(25, 1), torch.ones(25, 1)])
    torch.testing.assert_close(two[16:25, 0], torch.arange(9) / 9)
    with pytest.raises(DataError, match="4 frames, fewer than the 5"):
        Windows.of(4, 49, None, 4)
    with pytest.raises(ConfigError, match="stride is 14"):
        Windows.of(160, 25, 14, 4)
    with pytest.raises(ConfigError, match="window is 24"):
        Windows.of(160, 24, None, 4)


def test_latents_and_back() -> None:
    """`decode` undoes what `encode` does to the autoencoder's latents."""
    vae = tiny_video_vae()
    clip = batch()[0].transpose(1, 2)
    with torch.no_grad():
        posterior = vae.encode(clip).latent_dist.mode()
        expected = vae.decode(posterior).sample
        torch.testing.assert_close(decode(vae, encode(vae, clip, False, True), True), expected, rtol=1e-4, atol=1e-5)


def test_the_pipeline_fills_in_a_video_of_two_windows() -> None:
    model, vae = build(), tiny_video_vae()
    clip, mask, text = batch(13)
    video, hole = clip[0], mask[0]
    hole[0] = 0
    pipe = inpainting(model, vae)
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"window": 9, "stride": 4, "steps": 2, "null": (text * 0,), "guidance": 2.0}
    found = pipe(video, hole, (text,), output_type="pt", **options).frames[0]
    assert found.shape == (13, 3, 32, 32) and found.isfinite().all() and 0 <= found.min() <= found.max() <= 1
    again = pipe(video, hole, (text,), output_type="pt", **options).frames[0]
    assert torch.equal(found, again)
    assert not torch.equal(found, pipe(video, hole, (text,), output_type="pt", seed=1, **options).frames[0])
    with model.disable():  # the transformer alone, in the same pipeline
        assert not torch.equal(found, pipe(video, hole, (text,), output_type="pt", **options).frames[0])
    pictures = [Image.fromarray(((f.permute(1, 2, 0) + 1) * 127.5).byte().numpy()) for f in video]
    marks = [Image.fromarray((m[0] * 255).byte().numpy()) for m in hole]
    frames = pipe(pictures, marks, (text,), **options).frames[0]
    assert len(frames) == 13 and frames[0].size == (32, 32)
    with pytest.raises(DataError, match="marks something of the first frame"):
        pipe(video, torch.ones_like(hole), (text,), **options)
    with pytest.raises(DataError, match="video holds numbers from 0 to 255"):  # bytes were taken for frames in [-1, 1]
        pipe(torch.arange(256).repeat(156).view(13, 3, 32, 32).byte(), hole, (text,), **options)
    with pytest.raises(DataError, match="mask holds numbers from 0 to 255"):
        pipe(video, hole * 255, (text,), **options)
    with pytest.raises(DataError, match="marks nothing"):
        pipe(video, hole * 0, (text,), **options)
    with pytest.raises(DataError, match="masks are"):
        pipe(video, hole[:, :, :16], (text,), **options)
    with pytest.raises(DataError, match="fewer than the 5"):
        pipe(video[:4], hole[:4], (text,), **options)
    refused: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (DataError, "image is .*expected one frame of the video's size", {"image": Image.new("RGB", (16, 16))}),
        (DataError, "image is .*expected one frame", {"image": video[:2]}),
        (ConfigError, "guidance is nan", {"guidance": float("nan")}),  # every pixel was nan
        (ConfigError, "guidance is '2'", {"guidance": "2"}),
        (ConfigError, "steps is 1.5", {"steps": 1.5}),
        (ConfigError, "stride is 4.5", {"stride": 4.5}),
        (ConfigError, "seed is 'x'", {"seed": "x"}),
        (ConfigError, "resample is -1", {"resample": -1}),
        (ConfigError, "output_type is 'np'", {"output_type": "np"}),
    ]
    for error, message, wrong in refused:
        with pytest.raises(error, match=message):
            pipe(video, hole, (text,), **{**options, **wrong})
    with pytest.raises(DataError, match="expected frames of 3 channels"):
        pipe(video[:, :1], hole, (text,), **options)
    tall = (torch.zeros(9, 3, 48, 32), torch.cat([torch.zeros(1, 1, 48, 32), torch.ones(8, 1, 48, 32)]))
    with pytest.raises(DataError, match=r"of 6 x 4; the positions of .* were learned for 4 x 4"):
        pipe(*tall, (text,), **options)
    with pytest.raises(ConfigError, match="conditions are missing"):
        pipe(video, hole, (text,), window=9, stride=4)
    with pytest.raises(ConfigError, match="no text encoder"):
        pipe(video, hole, prompt="a cat", window=9, stride=4)
    with pytest.raises(ConfigError, match="one latent frame in a patch"):
        inpainting(zoo.load("cogvideox-5b", pretrained=False, **{**TINY, "patch_size_t": 2, "patch_bias": False}), vae)
