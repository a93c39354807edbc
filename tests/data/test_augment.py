"""Augmentations by name and by function: what is drawn, in what place, and what is refused."""

from __future__ import annotations

import pickle
import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision import transforms
from torchvision.transforms import functional as TF
from train_parts import difference, fit, tiny_model, weights

import zoo
from zoo.data import open_dataset
from zoo.data.augment import parse
from zoo.data.preprocess import image_transform
from zoo.errors import ConfigError, DataError

CONFIG = {"input_size": (3, 96, 96), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3), "interpolation": "bicubic"}


def seed(value: int = 0) -> None:
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value)


def picture(size: tuple[int, int] = (130, 110)) -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def cut(image: Image.Image) -> Image.Image:
    """The random crop and flip of the default preprocessing."""
    area = transforms.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
    image = TF.resized_crop(image, *area, [96, 96], transforms.InterpolationMode.BICUBIC)
    return TF.hflip(image) if bool(torch.rand(()) < 0.5) else image


def normal(image: Image.Image) -> torch.Tensor:
    return TF.normalize(TF.to_tensor(image), list(CONFIG["mean"]), list(CONFIG["std"]))  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("randaugment", transforms.RandAugment),
        ("trivialaugment", transforms.TrivialAugmentWide),
        ("autoaugment", transforms.AutoAugment),
        ("augmix", transforms.AugMix),
    ],
)
def test_policies_are_torchvisions(name: str, policy: Any) -> None:
    transform, theirs = image_transform(CONFIG, train=True, augment=name), None
    theirs = policy(interpolation=transforms.InterpolationMode.BILINEAR, fill=[128, 102, 76])
    changed = 0
    for value in range(5):
        seed(value)
        found = transform(picture())
        seed(value)
        plain = cut(picture())
        assert torch.equal(found, normal(theirs(plain)))
        changed += not torch.equal(found, normal(plain))
    assert changed >= 2


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m3-n4", "augmix-m5-w4-d2", "original", "v0", "3a"])
def test_policies_are_timms(policy: str) -> None:
    """What timm's `create_transform` puts between crop and normalisation, to the bit."""
    transform = image_transform(CONFIG, train=True, augment=policy)
    _, between, _ = create_transform(**CONFIG, is_training=True, auto_augment=policy, separate=True, color_jitter=None)  # type: ignore[arg-type]
    for value in range(4):
        seed(value)
        found = transform(picture())
        seed(value)
        assert torch.equal(found, normal(between(cut(picture()))))


def test_erasing() -> None:
    transform = image_transform(CONFIG, train=True, augment="none+erasing-1.0")
    plain = image_transform(CONFIG)(picture())
    seed()
    shares = []
    for _ in range(30):
        erased = (transform(picture()) != plain).any(0)
        rows, columns = erased.any(1).nonzero(), erased.any(0).nonzero()
        box = torch.zeros_like(erased)
        box[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
        assert not transform(picture())[:, box & ~erased].isnan().any()
        shares.append(float(box.float().mean()))
    assert min(shares) > 0.01 and max(shares) < 0.45
    quarter = image_transform(CONFIG, train=True, augment="none+erasing")
    hits = sum(not torch.equal(quarter(picture()), plain) for _ in range(200))
    assert 25 <= hits <= 80


def test_several_at_once_and_geometries() -> None:
    seed()
    transform = image_transform(CONFIG, train=True, augment="crop+trivialaugment+erasing-0.5")
    assert transform(picture()).shape == (3, 96, 96) and not transform.flip
    assert "crop+trivialaugment+erasing-0.5" in repr(transform)
    assert torch.equal(
        image_transform(CONFIG, augment="randaugment+erasing-1")(picture()), image_transform(CONFIG)(picture())
    )  # of training only
    again = pickle.loads(pickle.dumps(transform))
    for one in (transform, again):
        seed(3)
        one.last = one(picture())  # type: ignore[attr-defined]
    assert torch.equal(transform.last, again.last)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("randaug", "augment 'randaug' is unknown. Did you mean 'randaugment'"),
        ("crop+none", "names two geometries, crop and none"),
        ("erasing-2", "erasing has a probability above 0 and up to 1"),
        ("erasing-x", "erasing has a probability"),
        ("rand-x9", "timm cannot read the policy 'rand-x9'"),
        ("", "augment '' is unknown"),
    ],
)
def test_refusals(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        image_transform(CONFIG, train=True, augment=name)


def test_policies_of_colours_need_colours() -> None:
    for bands in (1, 4):
        with pytest.raises(ConfigError, match=f"takes images of {bands} channels"):
            image_transform({"input_size": (bands, 8, 8)}, train=True, augment="randaugment")
    found = image_transform({"input_size": (5, 8, 8)}, train=True, augment="crop+erasing-1")
    assert found(torch.zeros(5, 8, 8, dtype=torch.uint8)).shape == (5, 8, 8)


# -- functions ------------------------------------------------------------------------------------------------------------


def half(image: Any) -> Any:
    """Half as bright."""
    return image.point(lambda v: v // 2)


def test_functions_of_an_image() -> None:
    transform = image_transform(CONFIG, train=True, augment=half)
    assert torch.equal(transform(picture()), image_transform(CONFIG)(half(picture())))
    assert torch.equal(image_transform(CONFIG, augment=half)(picture()), image_transform(CONFIG)(picture()))
    arrays = image_transform(CONFIG, train=True, augment=lambda image: np.asarray(image) // 2)
    assert torch.equal(arrays(picture()), transform(picture()))
    whole = image_transform(CONFIG, train=True, augment=transforms.ToTensor())
    with pytest.raises(DataError, match=r"augment gives Tensor of shape .*transform="):
        whole(picture())


class Compose:
    """As albumentations' own: arrays by keyword, a generator of its own."""

    def __init__(self, function: Any) -> None:
        self.function, self.seeds = function, []

    def set_random_seed(self, value: int) -> None:
        self.seeds.append(value)

    def __call__(self, *, image: np.ndarray) -> dict[str, Any]:
        assert isinstance(image, np.ndarray) and image.ndim == 3
        return {"image": self.function(image)}


Compose.__module__ = "albumentations.core.composition"


def test_albumentations() -> None:
    own = Compose(lambda image: image[:, ::-1])
    transform = image_transform(CONFIG, train=True, augment=own)
    seed(1)
    assert torch.equal(transform(picture()), image_transform(CONFIG)(TF.hflip(picture())))
    seed(1)
    transform(picture())
    assert own.seeds[0] == own.seeds[1]  # drawn from torch's generator, so a run can be repeated
    pairs = [(picture((8, 8)), i % 2) for i in range(4)]
    ready = open_dataset(pairs, transform=Compose(lambda image: (image.astype(np.float32) / 255 - 0.5) / 0.5))
    expected = TF.normalize(TF.to_tensor(picture((8, 8))), [0.5] * 3, [0.5] * 3)
    torch.testing.assert_close(ready[0][0], expected)
    fit(tiny_model(num_classes=2), ready, epochs=1)


def test_the_real_albumentations() -> None:
    albumentations = pytest.importorskip("albumentations")
    own = albumentations.Compose([albumentations.HorizontalFlip(p=1.0)])
    found = image_transform(CONFIG, train=True, augment=own)(picture())
    assert torch.equal(found, image_transform(CONFIG)(TF.hflip(picture())))


def test_in_a_fit_which_is_repeated() -> None:
    """The same numbers with and without workers, and on the second call."""
    pairs = [(picture((10, 10)), i % 2) for i in range(8)]
    found = []
    for workers in (0, 0, 1):
        model = tiny_model(num_classes=2)
        fit(model, pairs, epochs=1, augment="crop+rand-m9-mstd0.5-inc1+erasing-0.5", workers=workers)
        found.append(weights(model))
    assert difference(found[0], found[1]) == difference(found[0], found[2]) == 0
    plain = tiny_model(num_classes=2)
    report = fit(plain, pairs, epochs=1, augment=half)
    assert difference(found[0], weights(plain)) > 0 and "half" in report.settings["augment"]
    with pytest.raises(ConfigError, match="augment 'crops' is unknown"):
        fit(plain, pairs, augment="crops")
    assert zoo.evaluate(plain, pairs, progress=False)["images"] == 8


@pytest.mark.parametrize(
    "policy", ["rand-m9-zz", "rand-9", "rand-tanything", "augmix-m5-n2", "original-m9", "augmix-tweights"]
)
def test_sections_that_timm_passes_over(policy: str) -> None:
    """timm takes `rand-m9-zz` for `rand-m9`, and any name of a set of operations for its own."""
    with pytest.raises(ConfigError, match=rf"timm cannot read the policy '{policy}': no section"):
        parse(policy, (3, 32, 32), (0.5,) * 3, (0.5,) * 3)
    parse("rand-mstd1-tweights-p0.5-inc1-mmax12", (3, 32, 32), (0.5,) * 3, (0.5,) * 3)
    parse("original-mstd0.5", (3, 32, 32), (0.5,) * 3, (0.5,) * 3)
