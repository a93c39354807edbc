"""Preprocessing: equal to timm's in evaluation, random and repeatable in training, any kind of image in."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

import zoo
from zoo.data.preprocess import image_transform

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smooth random colours: noise would hide a shift by half a pixel."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def config(**changes):
    base = {"input_size": (3, 48, 48), "mean": MEAN, "std": STD, "interpolation": "bicubic", "crop_pct": 0.9}
    return {**base, **changes}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"crop_pct": 1.0},
        {"crop_pct": 0.875, "interpolation": "bilinear"},
        {"crop_mode": "squash"},
        {"crop_mode": "border"},
        {"input_size": (3, 40, 64)},
        {"input_size": (3, 64, 40), "crop_mode": "border", "crop_pct": 1.0},
    ],
)
@pytest.mark.parametrize("size", [(100, 70), (33, 90), (48, 48), (20, 17)])
def test_evaluation_is_timms(changes, size):
    settings = config(**changes)
    image = picture(*size)
    expected = create_transform(**settings, is_training=False)(image)
    result = image_transform(settings, train=False)(image)
    assert result.shape == settings["input_size"]
    assert torch.equal(result, expected)


def test_a_models_own():
    model = zoo.load("vit-micro", num_classes=0, pretrained=False, depth=1)
    image = picture(60, 45)
    expected = create_transform(**model.family.data_config(), is_training=False)(image)
    assert torch.equal(model.preprocess(train=False)(image), expected)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_every_mode_becomes_rgb(mode):
    image = picture(50, 50).convert(mode)
    result = image_transform(config())(image)
    assert torch.equal(result, image_transform(config())(image.convert("RGB")))


def test_sixteen_bits_keep_their_greys():
    ramp = np.linspace(0, 65535, 48 * 48).reshape(48, 48).astype(np.uint16)
    settings = config(crop_pct=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)
    result = image_transform(settings)(Image.fromarray(ramp))
    assert result.shape == (3, 48, 48)
    np.testing.assert_allclose(result[0].numpy(), ramp / 65535, atol=1 / 128)


def test_tiny_training_moves_the_reflected_image_and_flips():
    settings = config(input_size=(3, 32, 32), crop_pct=1.0)
    image = picture(32, 32)
    plain = image_transform(settings, train=False)(image).numpy()
    padded = np.pad(plain, ((0, 0), (4, 4), (4, 4)), mode="reflect")
    shifts = {}
    for y in range(9):
        for x in range(9):
            cut = padded[:, y : y + 32, x : x + 32]
            shifts[cut.tobytes()] = (y, x, False)
            shifts[np.ascontiguousarray(cut[:, :, ::-1]).tobytes()] = (y, x, True)
    torch.manual_seed(0)
    transform = image_transform(settings, train=True)
    seen = {shifts[transform(image).numpy().tobytes()] for _ in range(300)}
    assert len(seen) > 100
    assert {y for y, _, _ in seen} == {x for _, x, _ in seen} == set(range(9))
    assert {flipped for _, _, flipped in seen} == {True, False}
    unflipped = image_transform(settings, train=True, augment="crop")
    assert not any(shifts[unflipped(image).numpy().tobytes()][2] for _ in range(30))


def test_large_training_is_a_random_resized_crop():
    settings = config(input_size=(3, 96, 96), mean=(0.0,) * 3, std=(1.0,) * 3)
    height, width = 200, 150
    position = np.stack(np.meshgrid(np.linspace(0, 255, height), np.linspace(0, 255, width), indexing="ij"), -1)
    image = Image.fromarray(np.concatenate([position, position[..., :1]], -1).astype(np.uint8))
    transform = image_transform(settings, train=True)
    torch.manual_seed(0)
    shares, flips = [], set()
    for _ in range(60):
        out = transform(image)
        assert out.shape == (3, 96, 96)
        rows, columns = out[0], out[1]  # channel values are the coordinates that the pixels came from
        tall = float(rows.max() - rows.min())
        wide = float(columns.max() - columns.min())
        shares.append(tall * wide)
        flips.add(bool(columns[:, 0].mean() > columns[:, -1].mean()))
    assert min(shares) < 0.25 and max(shares) > 0.7 and min(shares) > 0.04
    assert flips == {True, False}


def test_seed_repeats_and_workers_can_have_it():
    image = picture(300, 200)
    transform = pickle.loads(pickle.dumps(image_transform(config(input_size=(3, 80, 80)), train=True)))
    torch.manual_seed(3)
    first, second = transform(image), transform(image)
    torch.manual_seed(3)
    assert torch.equal(transform(image), first)
    assert not torch.equal(first, second)


def test_no_augmentation_is_the_evaluation_view():
    image = picture(90, 70)
    view = image_transform(config(), train=True, augment="none")(image)
    assert torch.equal(view, image_transform(config(), train=False)(image))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": (3, 48)}, "input_size"),
        ({"interpolation": "cubic"}, "Did you mean 'bicubic'"),
        ({"crop_mode": "centre"}, "Did you mean 'center'"),
        ({"mean": (0.5, 0.5)}, "mean has 2 values"),
        ({"std": (0.0, 1.0, 1.0)}, "std"),
        ({"crop_pct": 1.5}, "crop_pct"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(zoo.ZooError, match=message):
        image_transform(config(**changes))


def test_bad_input():
    with pytest.raises(zoo.ZooError, match="expected a PIL image, got ndarray"):
        image_transform(config())(np.zeros((48, 48, 3)))
    with pytest.raises(zoo.ZooError, match="augment 'flip' is unknown"):
        image_transform(config(), train=True, augment="flip")
    with pytest.raises(zoo.ZooError, match="no image preprocessing"):
        image_transform({})
