"""PETALface: the equations for each image of a batch, where the quality comes from, training, and what is refused."""

from __future__ import annotations

import copy
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from train_parts import easy_data, fit, tiny_model

import zoo
from vision.adapters.parts.quality import SCORES, sharpness
from zoo.errors import AttachError, ConfigError, ContextError, MissingPackageError

VIT = ("vit-micro", {"embed_dim": 48, "depth": 2, "num_heads": 3})
SWIN = ("swin-micro", {"window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)})
both = pytest.mark.parametrize("network", [VIT, SWIN], ids=["vit", "swin"])


def petal(**config: Any) -> zoo.Adapter:
    return zoo.adapter("petalface", **{"rank": 3, "scale": 0.5, "dropout": 0.0, **config})


def load(network: tuple[str, dict[str, Any]], adapter: Any, shaken: bool = True) -> zoo.Model:
    torch.manual_seed(0)
    model = zoo.load(network[0], adapter, pretrained=False, num_classes=5, **network[1])
    if shaken:
        with torch.no_grad():
            for i, p in enumerate(model.adapters["petalface"].parameters()):
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return model.eval()


def images(count: int = 3) -> Tensor:
    """From sharp to flat, but for a little."""
    x = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for i in range(1, count):
        x[i] = torch.nn.functional.avg_pool2d(x[i], 2 * i + 1, stride=1, padding=i)
    return x


def by_loops(image: np.ndarray) -> float:
    """The share that blurring takes away, for one grey image (H, W): Crete et al. 2007, written out."""
    found = []
    for rows in (image, image.T):
        total = lost = 0.0
        for row in rows:
            wide = np.pad(row, 2, mode="edge")
            blurred = [wide[i : i + 5].mean() for i in range(len(row))]
            for i in range(1, len(row)):
                own, left = abs(row[i] - row[i - 1]), abs(blurred[i] - blurred[i - 1])
                total, lost = total + own, lost + max(0.0, own - left)
        if total:
            found.append(lost / total)
    return min(found)


def test_sharpness() -> None:
    x = images().double()
    grey = (x * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1)
    scores = sharpness(x)
    assert scores.tolist() == pytest.approx([by_loops(image.numpy()) for image in grey], rel=1e-5)
    assert 1 > scores[0] > scores[1] > scores[2] > 0
    torch.testing.assert_close(sharpness(0.3 * x + 0.2), scores)  # brightness and contrast
    small = torch.nn.functional.interpolate(x[:1], size=8, mode="area")
    assert sharpness(torch.nn.functional.interpolate(small, size=32, mode="bicubic")) < scores[0] - 0.3
    stripes = torch.zeros(1, 3, 16, 16)
    stripes[..., ::2] = 1.0
    assert sharpness(stripes).item() == pytest.approx(
        by_loops(stripes[0, 0].numpy()), rel=1e-5
    )  # by the axis that varies
    assert sharpness(torch.full((2, 3, 16, 16), 0.4)).isnan().all()


@both
def test_each_image_is_mixed_by_its_own_quality(network: tuple[str, dict[str, Any]]) -> None:
    """As a network whose weights are W + s ((1 - a) B_1 A_1 + a B_2 A_2), one for each image; in batches and alone."""
    model, x, qualities = load(network, petal(threshold=0.3, gain=1.4)), images(), [0.05, 0.4, 0.9]
    found = model(x, context={"quality": qualities})
    adapter = model.adapters["petalface"]
    for i, quality in enumerate(qualities):
        a = 0.5 + 1.4 * (quality - 0.3)
        plain = copy.deepcopy(model)
        plain.remove_adapter("petalface")
        for point in plain.points.select("q,k,v"):
            part = adapter.module_at(point.name)
            down = part.shared[0]
            low, high = part.low_b @ down.low_a, part.high_b @ down.high_a
            with torch.no_grad():
                point.module.weight[point.start : point.stop] += 0.5 * ((1 - a) * low + a * high)
        torch.testing.assert_close(found[i : i + 1], plain(x[i : i + 1]), rtol=1e-4, atol=1e-5)
        alone = model(x[i : i + 1], context={"quality": [quality]})
        torch.testing.assert_close(alone, found[i : i + 1], rtol=1e-5, atol=1e-6)


def test_quality_of_the_images_that_the_model_is_called_with() -> None:
    """Measured behind the normalisation, as if in front of it."""
    model, x = load(VIT, petal()), images()
    mean, std = (torch.tensor(m).view(1, 3, 1, 1) for m in (model.mean, model.std))
    found = model((x - mean) / std)
    torch.testing.assert_close(found, model((x - mean) / std, context={"quality": sharpness(x)}), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, model((x - mean) / std, context={"quality": sharpness(x).flip(0)}))
    assert model.wanted == {"quality": ("petalface",)}
    routed = model((x - mean) / std, adapters=["petalface", None, "petalface"])
    torch.testing.assert_close(routed[[0, 2]], found[[0, 2]], rtol=1e-5, atol=1e-5)


def test_names_and_counts() -> None:
    """A of q, k, v once; of another input its own. With the paper's projection a single change there."""
    model = load(VIT, petal(targets="q,k,v,o,up"), shaken=False)
    sizes = {k: tuple(p.shape) for k, p in model.adapters["petalface"].named_parameters()}
    assert sizes["down_blocks_1_attn.low_a"] == sizes["down_blocks_1_attn_o.high_a"] == (3, 48)
    assert {f"blocks.0.attn.{r}.low_b" for r in "qkvo"} <= sizes.keys() and "down_blocks_0_mlp.low_a" in sizes
    assert model.num_parameters(trainable=True, head=False) == 2 * 2 * 3 * ((48 + 3 * 48) + 2 * 48 + (48 + 4 * 48))
    small: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 4,
        "window_size": 2,
        "embed_dim": 16,
        "depths": (1, 2),
        "num_heads": (2, 4),
    }
    face = zoo.load("swin-face", petal(), num_classes=0, pretrained=False, **small).eval()
    assert face.num_parameters(trainable=True) == 3 * 8 * (16 + 2 * 32) + 3 * (16 * 32 + 512)
    assert face.probe(images()) == []
    bare = zoo.load("swin-face", petal(projection=""), num_classes=0, device="meta", **small)
    assert bare.num_parameters(trainable=True) == 3 * 8 * (16 + 2 * 32)


def test_images_without_a_quality() -> None:
    model, x = load(VIT, petal()), images()
    x[1] = 0.5
    with pytest.raises(ContextError, match=r"1 of 3 images have no quality \(in the batch: 1\).*unknown='middle'"):
        model(x)
    with pytest.raises(ContextError, match="1 of 3 images have no quality"):
        model(x, context={"quality": [0.2, float("nan"), 0.4]})
    with pytest.raises(ContextError, match="a quality is 37; expected numbers from 0"):
        model(x, context={"quality": [0.2, 37.0, 0.4]})
    middle = load(VIT, petal(unknown="middle", threshold=0.3))
    torch.testing.assert_close(middle(x)[1:2], middle(x[1:2], context={"quality": [0.3]}), rtol=1e-5, atol=1e-5)
    given = load(VIT, petal(quality="given"))
    with pytest.raises(ContextError, match="needs 'quality'"):
        given(x)
    assert given(x, context={"quality": 0.7}).shape == (3, 5)
    assert given.probe(x) == []  # by its example
    assert pickle.loads(pickle.dumps(given)).probe(x) == []


def test_threshold_by_calibration(tmp_path: Path) -> None:
    """The mean quality of the training images; kept with the adapter."""
    data = easy_data(count=12)
    model = tiny_model("petalface", num_classes=0)
    model.remove_adapter("petalface")
    model.add_adapter(petal(threshold=None))
    model.reset_head(4)
    with pytest.raises(ContextError, match="threshold=None, which a calibration chooses"):
        model(data.tensors[0])
    fit(model, data, epochs=1)
    adapter = model.adapters["petalface"]
    mean, std = (torch.tensor(m).view(1, 3, 1, 1) for m in (model.mean, model.std))
    expected = float(sharpness(data.tensors[0] * std + mean).mean())
    assert adapter.plan == {"threshold": pytest.approx(expected, rel=1e-5)}
    model.save_adapter(tmp_path / "out")
    torch.manual_seed(100)  # the same random backbone
    again = zoo.load(adapter=tmp_path / "out", pretrained=False)
    assert torch.equal(again.eval()(data.tensors[0]), model.eval()(data.tensors[0]))
    with pytest.raises(ContextError, match="none of the images"):
        adapter.plan, flat = None, [(torch.zeros(2, 3, 8, 8), torch.zeros(2))]
        adapter.calibrate(model, flat)


class _Metric(torch.nn.Module):
    """A metric of pyiqa's as it is called: half of the contrast of a batch's first image, times a scale."""

    def __init__(self, lower_better: bool, scale: float) -> None:
        super().__init__()
        self.lower_better, self.scale = lower_better, scale

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 3 and x.min() >= 0 and x.max() <= 1
        return self.scale * x[:1].std().reshape(1, 1)


def test_scores_of_pyiqa(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each on one scale: of a lower-is-better score from 0 to 100, 1 - score / 100; nothing beyond 0..1."""
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    with pytest.raises(MissingPackageError, match="pip install pyiqa"):
        SCORES["cnniqa"](images(), {})
    scales = {"cnniqa": (False, 1.0), "brisque": (True, 100.0), "piqe": (True, 1000.0)}
    package: Any = types.ModuleType("pyiqa")
    package.create_metric = lambda name, device: _Metric(*scales[name])
    monkeypatch.setitem(sys.modules, "pyiqa", package)
    x = images()
    kept: dict[str, Any] = {}
    contrast = torch.stack([image.std() for image in x])
    torch.testing.assert_close(SCORES["cnniqa"](x, kept), contrast)
    torch.testing.assert_close(SCORES["brisque"](x, kept), 1 - contrast)
    torch.testing.assert_close(SCORES["piqe"](x, kept), (1 - 10 * contrast).clamp(min=0))
    assert set(kept) == set(scales)
    model = load(VIT, petal(quality="brisque"))
    mean, std = (torch.tensor(m).view(1, 3, 1, 1) for m in (model.mean, model.std))
    by_hand = model((x - mean) / std, context={"quality": 1 - contrast})
    torch.testing.assert_close(model((x - mean) / std), by_hand, rtol=1e-4, atol=1e-4)
    assert (
        not [k for k in model.state_dict() if "kept" in k] and copy.deepcopy(model)((x - mean) / std).isfinite().all()
    )
    scales["cnniqa"] = (True, 1.0)
    with pytest.raises(ContextError, match="lower is better for 'cnniqa'"):
        SCORES["cnniqa"](x, {})
    package.create_metric = lambda name, device: 1 / 0
    with pytest.raises(ContextError, match="could not make 'piqe'"):
        SCORES["piqe"](x, {})


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="'sharp'"):
        petal(quality="sharp")
    with pytest.raises(ConfigError, match="threshold is 40"):
        petal(threshold=40.0)
    for wrong in ({"rank": 0}, {"gain": 0.0}, {"scale": 0.0}, {"dropout": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            petal(**wrong)
    with pytest.raises(AttachError, match=r"takes none.*quality='given'"):
        zoo.load("ast-micro", petal(), num_classes=2, device="meta")
    sounds = zoo.load("ast-micro", petal(quality="given"), num_classes=2, pretrained=False)
    batch = sounds.example_batch(2)
    assert sounds(*batch, context={"quality": [0.2, 0.8]}).shape == (2, 2)
    pair = zoo.load("clip-micro", petal(), pretrained=False)
    assert {p.split(".")[0] for p, _ in pair.adapters["petalface"].named_parameters()} & {"text"} == set()
    with pytest.raises(ConfigError, match="sees texts"):
        zoo.load("clip-micro", petal(targets="q,v"), pretrained=False)
    with pytest.raises(ContextError, match="4 x 4 pixels or more"):
        SCORES["sharpness"](torch.rand(1, 3, 3, 9), {})
