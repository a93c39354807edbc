"""VideoPainter's ID adapter: what is hidden, saved, chained from window to window, and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from diffusion_models import make, tiny_video_vae

import zoo
from multimodal.families.diffusion.inpainting import inpainting
from zoo.disk import attach, read
from zoo.errors import AttachError, DataError
from zoo.registry import family


def build(*adapters: Any) -> tuple[zoo.Model, tuple[Tensor, ...]]:
    model, batch = make("cogvideox", *adapters)
    return model.eval(), batch


def test_a_sample_without_a_mask_is_that_of_the_frozen_attention() -> None:
    model, batch = make("cogvideox")
    with torch.no_grad():
        bare = model(*batch)
        model.add_adapter(zoo.adapter("videopainter-id", rank=2))
        mask = torch.zeros(2, 4, 1, 8, 8)
        mask[1, 2, 0, 3, 3] = 1
        found = model.eval()(*batch, context={"mask": mask})
    torch.testing.assert_close(found[0], bare[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[1], bare[1], atol=1e-4)


def test_every_parameter_learns_saves_and_serves_samples(tmp_path: Path) -> None:
    model, batch = build(zoo.adapter("videopainter-id", rank=2))
    given = model.example_context(*batch)
    assert model.probe(*batch) == []
    twin, _ = make("cogvideox")
    attach(twin, read(model.save_adapter(tmp_path / "out")))
    with torch.no_grad():
        both = model(*batch, context=given)
        assert torch.equal(twin.eval()(*batch, context=given), both)
        with model.disable():
            bare = model(*batch)
        mixed = model(*batch, context=given, adapters=["videopainter-id", None])
    torch.testing.assert_close(mixed, torch.stack([both[0], bare[1]]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory", ["low", "min"])
def test_memory_settings_give_the_same_gradients(memory: str) -> None:
    model, batch = build(zoo.adapter("videopainter-id", rank=2))
    given = model.example_context(*batch)
    found = []
    for setting in ("default", memory):
        model.memory = setting
        model.zero_grad()
        model.train()(*batch, context=given).square().mean().backward()
        found.append({k: p.grad.clone() for k, p in model.parameters_to_train().items()})  # type: ignore[union-attr]
    assert all(torch.allclose(found[0][k], found[1][k], rtol=1e-4, atol=1e-6) for k in found[0])


def test_windows_hand_on_what_they_made() -> None:
    """A weight of 0 is each window by itself; another one reaches the second window alone."""
    options = {**family("cogvideox").tiny[1], "in_channels": 8, "sample_width": 4, "sample_height": 4}  # type: ignore[index]
    torch.manual_seed(0)
    adapters = [zoo.adapter("videopainter", blocks=1), zoo.adapter("videopainter-id", rank=2)]
    model = zoo.load("cogvideox-5b-i2v", adapters, pretrained=False, **options)
    pipe = inpainting(model, tiny_video_vae())
    pipe.set_progress_bar_config(disable=True)
    video, mask, text = torch.rand(13, 3, 32, 32) * 2 - 1, torch.zeros(13, 1, 32, 32), torch.randn(1, 5, 12)
    mask[1:, :, 8:24, 8:24] = 1
    made = [
        pipe(
            video,
            mask,
            (text,),
            guidance=1.0,
            steps=2,
            window=9,
            stride=4,
            resample=weight,
            replace=False,
            output_type="pt",
        ).frames[0]
        for weight in (0.0, 0.5)
    ]
    assert torch.equal(made[0][:4], made[1][:4]) and not torch.equal(made[0][9:], made[1][9:])


def test_what_is_refused() -> None:
    with pytest.raises(AttachError, match="videopainter-id"):
        zoo.load("vit-micro", "videopainter-id", num_classes=2, pretrained=False)
    model, _ = make("pixart")
    with pytest.raises(AttachError, match="as CogVideoX has it"):
        model.add_adapter("videopainter-id")
    model, batch = build(zoo.adapter("videopainter-id", rank=2))
    given = model.example_context(*batch)
    wrong = {"states": {f"blocks.{i}": torch.zeros(2, 9, 32) for i in range(2)}, "mask": given["mask"], "weight": 0.5}
    with pytest.raises(DataError, match="the window before left"):
        model(*batch, context={**given, "previous": wrong})
