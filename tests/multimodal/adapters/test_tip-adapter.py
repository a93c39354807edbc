"""Tip-Adapter: what its paper says of the ends of alpha and beta, the cache, the search, and what every method promises."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo

pytest.importorskip("open_clip")
from few_shot_clip import NAMES, Pictures, build, images, routed, small

from multimodal.adapters.parts.cache import Grid
from zoo.data import ImageDataset
from zoo.errors import AttachError, ConfigError, DataError, MismatchError

METHODS = ["tip-adapter", "tip-adapter-f"]


def filled(method: str = "tip-adapter", **settings: Any) -> tuple[zoo.Model, Any]:
    model = small(method, passes=1, **settings)
    zoo.calibrate(model, Pictures())
    return model, model.adapters[method]


def test_without_votes_it_is_the_zero_shot_classifier() -> None:
    model = small("tip-adapter", passes=1, alpha=0.0).eval()
    x = images(model).float()
    with torch.no_grad():
        before = model(x)  # there is no cache yet
        zoo.calibrate(model, Pictures())
        assert torch.equal(model(x), before)
        model.adapters["tip-adapter"].alpha = 1.0
        assert not torch.equal(model(x), before)


def test_a_training_image_finds_its_own_label() -> None:
    """The higher beta, the more only the nearest key votes."""
    model, _ = filled(alpha=1e4, beta=1e5)
    with torch.no_grad():
        x, labels = Pictures().tensors
        assert torch.equal(model(x).argmax(1), labels)


def test_straightforward_form() -> None:
    model = build("tip-adapter-f", passes=1, beta=2.0, alpha=0.7)
    adapter: Any = model.adapters["tip-adapter-f"]
    x, labels = Pictures().tensors
    adapter.calibrate(model, [(x.double(), labels)])
    model.double()
    with torch.no_grad():
        found, f, keys = model(images(model)), model.features(images(model)), model.features(x.double())
        f, keys = f / f.norm(dim=1, keepdim=True), keys / keys.norm(dim=1, keepdim=True)
        votes = (-2.0 * (1 - f @ keys.T)).exp() @ torch.eye(3, dtype=torch.double)[labels]
        adapter.alpha = 0.0
        torch.testing.assert_close(found, model(images(model)) + 0.7 * votes, rtol=1e-5, atol=1e-5)


def test_search_takes_the_best_of_all() -> None:
    """Against the accuracy of each pair, measured by itself on a few of them."""
    model, adapter = filled(alpha_most=30.0)
    val = Pictures(24, seed=7)
    grid = Grid(adapter)
    found = adapter.search(model, val)
    assert found["accuracy"] == zoo.evaluate(model, val, progress=False, record="")["accuracy"] > 1 / 3
    assert (adapter.alpha, adapter.beta) == (found["alpha"], found["beta"])
    for alpha in grid.alphas[::7]:
        for beta in grid.betas[::60]:
            adapter.alpha, adapter.beta = alpha, beta
            assert zoo.evaluate(model, val, progress=False, record="")["accuracy"] <= found["accuracy"]
    assert len(grid.alphas) == 20 and len(grid.betas) == 200 and max(grid.betas) < 7.0 and grid.betas[0] == 0.1


def test_a_key_is_the_mean_over_augmentations() -> None:
    """`zoo.calibrate` augments each pass anew; a mean of passes that are alike is that of one."""
    noise: list[Tensor] = []

    def augment(x: Tensor) -> Tensor:
        noise.append(torch.randn_like(x))
        return x + noise[-1]

    data = ImageDataset(zoo.open_dataset(Pictures()).rows, NAMES, transform=augment)
    model = small("tip-adapter", passes=3).eval()
    zoo.calibrate(model, data, seed=1)
    drawn = torch.stack(noise[-36:]).unflatten(0, (3, 12))
    assert len({float(n.sum()) for n in drawn.flatten(0, 1)}) == 36
    cache: Any = model.adapters["tip-adapter"].module_at("cache")  # type: ignore[operator, union-attr]
    again = small("tip-adapter", passes=3).eval()
    zoo.calibrate(again, data, seed=1)
    assert torch.equal(cache.keys, again.adapters["tip-adapter"].module_at("cache").keys)  # type: ignore[operator, union-attr]
    assert cache.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize("method", METHODS)
def test_saves_and_reloads(method: str, tmp_path: Path) -> None:
    model, adapter = filled(method, alpha=0.3)
    model.eval().save_adapter(tmp_path / "out")
    x = images(model).float()
    torch.manual_seed(0)  # the same random backbone
    again = zoo.load(adapter=tmp_path / "out", pretrained=False).eval()
    assert torch.equal(again(x), model(x)) and again.adapters[method].alpha == 0.3
    torch.manual_seed(0)
    with pytest.raises(ConfigError, match="cache is of 3 classes, and the head has 2"):
        zoo.load(adapter=tmp_path / "out", pretrained=False, classes=["cat", "dog"])
    torch.manual_seed(0)
    other = zoo.load(adapter=tmp_path / "out", pretrained=False, classes=["cat", "dog", "cow"])
    with pytest.raises(ConfigError, match="cache of other classes"):
        other(x)
    zoo.calibrate(other, [(image, int(label)) for image, label in Pictures()])
    assert other(x).shape == (4, 3)
    with torch.no_grad():
        before = model(x)
        model.grow_head(["cow"])
        after = model(x)
    torch.testing.assert_close(after[:, :3], before)  # the new one has a text and no votes
    assert after.shape == (4, 4)
    adapter.plan = {"counts": [4, 4, -4], "classes": NAMES}
    with pytest.raises(ConfigError, match=r"plan of 'tip.*' is damaged"):
        model.reattach(method)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("method", METHODS)
def test_per_sample_adapters(method: str, train: bool) -> None:
    def fill(model: zoo.Model, name: str) -> None:
        x, labels = Pictures().tensors
        model.adapters[name].calibrate(model, [(x.double(), labels)])  # type: ignore[operator, union-attr]

    routed(method, train, fill, passes=1)


@pytest.mark.parametrize("beside", ["lora", "coop", "clip-adapter"])
def test_together_with(beside: str) -> None:
    model = build("tip-adapter-f", beside=beside, passes=1)
    x, labels = Pictures().tensors
    model.adapters["tip-adapter-f"].calibrate(model, [(x.double(), labels)])  # type: ignore[operator, union-attr]
    model.double()
    assert model.train().probe(images(model)) == []


def test_half_precision_and_compiled() -> None:
    model, _ = filled("tip-adapter-f")
    x = images(model).float()
    expected = model.train()(x)
    torch._dynamo.reset()
    try:
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    finally:
        torch._dynamo.reset()
    model.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters_to_train().values()} == {torch.float32}
    assert model(x.bfloat16()).isfinite().all()


class Shuffled:
    """Batches that come in another order each time."""

    def __init__(self) -> None:
        self.times = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.times += 1
        x, labels = Pictures().tensors
        yield x.roll(self.times, 0), labels.roll(self.times, 0)


def test_what_is_refused() -> None:
    with pytest.raises(AttachError, match="vit-micro has no text tower"):
        zoo.load("vit-micro", "tip-adapter", pretrained=False, num_classes=3)
    with pytest.raises(AttachError, match="class names"):
        small("tip-adapter", names=None)
    for wrong in ({"alpha": -1.0}, {"beta": -0.1}, {"passes": 0}, {"alpha_most": 0.1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            zoo.adapter("tip-adapter", **wrong)
    model = small("tip-adapter", passes=2)
    adapter: Any = model.adapters["tip-adapter"]
    with pytest.raises(ConfigError, match=r"nothing to train.*zoo.calibrate"):
        zoo.fit(model, Pictures(), progress=False)
    with pytest.raises(ConfigError, match="no cache yet"):
        adapter.search(model, Pictures())
    x, labels = Pictures().tensors
    for batches, reason in (
        ([], "no images"),
        ([(x, labels.float())], "one class each"),
        ([(x, labels + 1)], "outside the model's 3"),
        ([(x * float("nan"), labels)], "not finite"),
        (Shuffled(), "another order"),
    ):
        with pytest.raises(DataError, match=reason):
            adapter.calibrate(model, batches)
        assert adapter.plan is None
    with pytest.raises(ConfigError, match="attached to no model"):
        zoo.adapter("tip-adapter").calibrate(model, [(x, labels)])  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="No adapter in use is calibrated"):
        zoo.calibrate(small("clip-adapter"), Pictures())
    with pytest.raises((DataError, MismatchError)):
        zoo.calibrate(model, torch.utils.data.TensorDataset(x, labels + 3))
