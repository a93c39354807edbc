"""Features kept for a head: the numbers of a fit that runs the backbone in every step, in fewer passes; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from train_parts import CLASSES, Stop, StopAt, difference, easy_data, fit, tiny_model, weights
from two_processes import launch

import zoo
from zoo.data.dataset import ImageDataset
from zoo.data.sources import TorchRows
from zoo.errors import ConfigError, DataError
from zoo.train.processes import Processes

NUMBERS = ("loss", "accuracy", "val_loss", "val_accuracy")


def numbers(report: zoo.train.Report) -> list[float]:
    return [record[name] for record in report.history for name in NUMBERS if name in record]


def passes(model: zoo.Model) -> list[int]:
    """Counts the items that go through the backbone from now on."""
    seen: list[int] = []
    model.backbone.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    return seen


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate": 3, "sampler": "balanced", "label_smoothing": 0.1, "workers": 2},
        {"ema": 0.9, "loss": "focal", "class_weights": "balanced", "metrics": ["f1"], "drop_last": True},
        {"lr": "auto"},
        {"precision": "bf16"},
        {"loss": lambda z, t: nn.functional.multi_margin_loss(z, t)},
    ],
    ids=["plain", "parts", "ema", "auto", "bf16", "own-loss"],
)
def test_the_numbers_are_those_of_a_fit_without(options: dict[str, Any]) -> None:
    train, val = easy_data(38, noise=2), easy_data(13, seed=1, noise=2)
    plain, kept = tiny_model("linear"), tiny_model("linear")
    expected = fit(plain, train, val, **options)
    seen = passes(kept)
    report = fit(kept, train, val, cache_features=True, **options)
    assert numbers(report) == pytest.approx(numbers(expected), abs=2e-3 if "precision" in options else 1e-5)
    assert difference(weights(kept), weights(plain)) < (1e-3 if "precision" in options else 1e-5)
    # each item once; one item to learn the width; the example for what is kept for backward
    assert 38 + 13 + 1 <= sum(seen) <= 38 + 13 + 1 + 16
    data = report.data["features"]
    assert data["items"] == 51 and data["bytes"] == 51 * 24 * 4 and data["seconds"] > 0
    assert report.settings["cache_features"] is True and "features" not in expected.data
    assert kept.record.get("saved_bytes") == plain.record.get("saved_bytes")
    x = easy_data(4, seed=5).tensors[0]
    assert "features" not in vars(kept.family) and torch.allclose(kept(x), plain(x), atol=1e-3)


def test_images_get_the_evaluation_view_and_a_part_is_set_aside(image_folder: Path) -> None:
    options = {"epochs": 2, "batch_size": 4, "patience": 2, "progress": False}
    models = [zoo.load("vit-micro", "linear", num_classes=2, pretrained=False, seed=0) for _ in range(2)]
    models[1].backbone.load_state_dict(models[0].backbone.state_dict())
    models[1].head.load_state_dict(models[0].head.state_dict())
    expected = zoo.fit(models[0], str(image_folder / "train"), augment="none", **options)
    report = zoo.fit(models[1], str(image_folder / "train"), cache_features=True, **options)
    assert numbers(report) == pytest.approx(numbers(expected), abs=1e-4)
    assert report.data["train_images"] + report.data["val_images"] == report.data["features"]["items"]


def test_resumes_exactly_and_knows_its_data(tmp_path: Path) -> None:
    train, val = easy_data(38, noise=2), easy_data(13, seed=1, noise=2)
    whole, broken = tiny_model("linear"), tiny_model("linear")
    expected = fit(whole, train, val, cache_features=True, epochs=3)
    place: dict[str, Any] = {"checkpoint": tmp_path, "checkpoint_every": 1, "epochs": 3}
    with pytest.raises(Stop):
        fit(broken, train, val, cache_features=True, callbacks=[StopAt(4)], **place)
    with pytest.raises(ConfigError, match="cache_features was True"):
        fit(tiny_model("linear"), train, val, **place)
    with pytest.raises(ConfigError, match="data changed"):
        fit(tiny_model("linear"), easy_data(38, noise=2.1), val, cache_features=True, **place)
    again = tiny_model("linear")
    report = fit(again, train, val, cache_features=1 << 20, **place)
    assert numbers(report) == numbers(expected) and difference(weights(again), weights(whole)) == 0


class Broken(Dataset[Any]):
    """Items 3 and 7 cannot be read."""

    def __init__(self) -> None:
        self.data = easy_data(20, noise=2)

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        if index in (3, 7):
            raise DataError(f"item {index} is torn")
        image, label = self.data[index]
        return image, int(label)


def test_broken_items_are_left_out_as_without() -> None:
    reports, models = [], []
    for options in ({}, {"cache_features": True}):
        model = tiny_model("linear")
        data = ImageDataset(TorchRows(Broken()), list("0123"), on_error="skip")
        reports.append(fit(model, data, batch_size=4, **options))
        models.append(weights(model))
    assert difference(*models) < 1e-5
    assert sorted(reports[0].skipped) == sorted(reports[1].skipped) and len(reports[1].skipped) == 2
    with pytest.raises(DataError, match="item 3 is torn"):
        fit(tiny_model("linear"), ImageDataset(TorchRows(Broken()), list("0123")), cache_features=True)


@pytest.mark.parametrize(
    ("adapter", "options", "words"),
    [
        ("lora", {}, "'lora/.*' is trained in front of the head"),
        (["linear", "bitfit"], {}, "is trained in front of the head"),
        ("linear", {"mixup": 0.2}, "mixup and cutmix"),
        ("linear", {"augment": "crop"}, "augment='crop' makes an item another one"),
        (
            "linear",
            {"cache_features": 1000},
            "16 images with 96 bytes of features each take 1536 bytes; the bound is 1000",
        ),
        ("linear", {"cache_features": "yes"}, "cache_features is 'yes'; expected True, False, or a whole number"),
        ("linear", {"streams": {"more": easy_data(8)}}, "streams bring images"),
    ],
)
def test_what_moves_is_refused_with_the_reason(adapter: Any, options: dict[str, Any], words: str) -> None:
    model = tiny_model(adapter)
    before = weights(model)
    with pytest.raises(ConfigError, match=words):
        fit(model, easy_data(16), **{"cache_features": True, **options})
    assert difference(weights(model), before) == 0


def test_an_adapter_that_is_not_trained_is_refused() -> None:
    model = tiny_model("lora")
    model.set_active("lora", train=())
    with pytest.raises(ConfigError, match="'lora' stands in front of the head"):
        fit(model, easy_data(16), cache_features=True)


@pytest.mark.parametrize("own", [False, True], ids=["torch", "own"])
def test_data_that_are_drawn_anew_are_refused(own: bool) -> None:
    generator = torch.Generator() if own else None

    def noisy(image: Tensor) -> Tensor:
        return image + torch.randn(image.shape, generator=generator)

    data = ImageDataset(TorchRows(easy_data(16)), list("0123"), transform=noisy)
    with pytest.raises(ConfigError, match="another item each time" if own else "is read with random numbers"):
        fit(tiny_model("linear"), data, cache_features=True)
    model = tiny_model("linear")
    model.backbone.blocks[0].register_forward_hook(lambda _, __, output: output + torch.randn(()))
    with pytest.raises(ConfigError, match="draws random numbers in its forward pass"):
        fit(model, easy_data(16), cache_features=True)


def test_a_callback_sees_the_model_itself() -> None:
    images, seen = easy_data(4, seed=3).tensors[0], []

    class Look:
        def epoch_end(self, model: zoo.Model, epoch: int) -> None:
            seen.append(model.features(images))

    model = tiny_model("linear")
    fit(model, easy_data(16), cache_features=True, callbacks=[Look()])
    assert torch.equal(seen[0], model.features(images))


def test_numbers_and_folds() -> None:
    images = easy_data(24).tensors[0]
    data = torch.utils.data.TensorDataset(images, images.mean((1, 2, 3)))
    models = [tiny_model("linear", num_classes=1) for _ in range(2)]
    reports = [fit(m, data, data, task="regress", cache_features=c) for m, c in zip(models, (False, True), strict=True)]
    assert reports[1].metrics["val_rmse"] == pytest.approx(reports[0].metrics["val_rmse"], abs=1e-5)
    options: dict[str, Any] = {"epochs": 1, "batch_size": 8, "progress": False, "folds": 2, "seeds": [0]}
    found = [
        zoo.repeat(lambda seed: tiny_model("linear", seed=seed), easy_data(24, noise=2), cache_features=c, **options)
        for c in (False, True)
    ]
    assert found[1].mean["loss"] == pytest.approx(found[0].mean["loss"], abs=1e-5)


def train_one(out: Path) -> None:
    model = tiny_model("linear")
    fit(model, easy_data(38, noise=2), easy_data(13, seed=1), cache_features=True, device="cpu", batch_size=12)
    if Processes("cpu").main:
        torch.save(weights(model), out)


def test_two_processes_compute_a_part_each(tmp_path: Path) -> None:
    launch(train_one, tmp_path, tmp_path / "two.pt")
    train_one(tmp_path / "one.pt")
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    assert difference(one, two) < 1e-5 and len(one["head/bias"]) == CLASSES
