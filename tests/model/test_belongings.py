"""Class names, metrics, data and licence belong to the adapter and the head that they were measured for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import zoo
import zoo.disk
from zoo import registry
from zoo.disk import read

TINY = {"pretrained": False, "embed_dim": 48, "depth": 2, "num_heads": 3}
BIRDS, CARS = ["wren", "tit", "crow"], ["mini", "beetle"]


class Pictures(torch.utils.data.Dataset):
    def __init__(self, classes: list[str], seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.pixels = torch.randint(0, 255, (8, 32, 32, 3), generator=rng, dtype=torch.uint8).numpy()
        self.classes = classes

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[i]), i % len(self.classes)


def images_of(classes: list[str], seed: int = 0) -> Any:
    return zoo.open_dataset(Pictures(classes, seed), classes=classes)


def two_heads() -> zoo.Model:
    torch.manual_seed(0)
    model = zoo.load("vit-micro", num_classes=0, **TINY)
    model.add_adapter("lora", "birds", num_classes=3)
    model.add_adapter("lora", "cars", num_classes=2, activate=False)
    return model


def trained() -> zoo.Model:
    model = two_heads()
    quiet = {"epochs": 1, "batch_size": 4, "progress": False, "device": "cpu"}
    zoo.fit(model, images_of(BIRDS), **quiet)
    model.record["license"], model.record["metrics"] = "cc-by-4.0", {"test": {"accuracy": 0.5}}
    model.set_active("cars")
    zoo.fit(model, images_of(CARS, 1), **quiet)
    model.record["license"], model.record["metrics"] = "mit", {"test": {"accuracy": 0.25}}
    return model


def test_two_adapters_with_heads_of_their_own(tmp_path: Path) -> None:
    """Train birds, switch, train cars, save birds: the file held the names, metrics and licence of cars."""
    model = trained()
    assert model.classes == CARS and model.record["license"] == "mit"
    for name, classes, licence, accuracy in (("birds", BIRDS, "cc-by-4.0", 0.5), ("cars", CARS, "mit", 0.25)):
        saved = read(model.save_adapter(tmp_path / name, adapters=[name]))
        assert saved.classes == classes and saved.num_classes == len(classes)
        assert saved.record["license"] == licence
        assert saved.record["metrics"] == {"test": {"accuracy": accuracy}} and saved.record["data"]["train"] == 8
        assert licence in saved.card and f"(1, {len(classes)})" in saved.card
    model.set_active("birds")
    assert model.classes == BIRDS and model.record["metrics"]["test"]["accuracy"] == 0.5
    with model.disable():
        assert model.classes is None and model.record == {}

    torch.manual_seed(0)
    both = zoo.load(adapter=[tmp_path / "birds", tmp_path / "cars"], pretrained=False)
    assert both.active == ("birds", "cars") and both.classes == CARS and both.record == {}
    for name, classes, licence in (("birds", BIRDS, "cc-by-4.0"), ("cars", CARS, "mit")):
        both.set_active(name)
        assert both.classes == classes and both.record["license"] == licence
        again = read(both.save_adapter(tmp_path / f"{name}-again"))
        assert (again.classes, again.record) == (classes, read(tmp_path / name).record)


@pytest.mark.parametrize("method", ["bitfit", "vqt", "full", "meft", "perp"])
def test_two_that_cannot_act_together_are_loaded_into_one_model(
    method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They train the same values, or both widen what a head sees: refused, VQT's as damaged, though each has its own head."""
    x = torch.randn(2, 3, 32, 32)
    expected = {}
    for name, classes in (("birds", BIRDS), ("cars", CARS)):
        torch.manual_seed(0)
        model = zoo.load("vit-micro", num_classes=0, **TINY)
        trial = registry.adapter_class(method).trial
        model.add_adapter(zoo.adapter(method, **trial), name, num_classes=len(classes))
        model.classes = classes
        with torch.no_grad():
            for p in model.adapters.parameters():
                p.add_(0.05 * torch.randn(p.shape))
        expected[name] = model(x)
        model.save_adapter(tmp_path / name)
    torch.manual_seed(0)
    both = zoo.load(adapter=[tmp_path / "birds", tmp_path / "cars"], pretrained=False)
    assert both.active == ("cars",) and "cannot be used together with 'birds'" in caplog.text
    for name, classes in (("cars", CARS), ("birds", BIRDS)):
        both.set_active(name)
        assert both.classes == classes and torch.equal(both(x), expected[name])
    torch.manual_seed(0)
    model = zoo.load("vit-micro", method, num_classes=0, **TINY)
    model.save_adapter(tmp_path / "headless")
    torch.manual_seed(0)
    model = zoo.load("vit-micro", num_classes=3, **TINY)
    model.add_adapter(zoo.adapter(method, **trial), "mine")
    if (
        method != "vqt"
    ):  # two of these act together; the others are refused where no head says that each stands for itself
        with pytest.raises(zoo.ZooError, match="'mine'"):
            zoo.disk.attach(model, read(tmp_path / "headless"))
        assert model.active == ("mine",)


def test_removal_copies_and_failures_keep_to_it() -> None:
    model = trained()
    model.remove_adapter("cars")
    assert model.classes is None and model.record == {}
    model.set_active("birds")
    assert model.classes == BIRDS
    with pytest.raises(ZeroDivisionError), model.all_or_nothing():
        model.classes = ["other", "names", "here"]
        model.record = {"metrics": {}}
        raise ZeroDivisionError
    assert model.classes == BIRDS and model.record["license"] == "cc-by-4.0"
    model.reset_head(2, CARS)
    assert model.classes == CARS and model.num_classes == 2


def test_names_that_begin_alike() -> None:
    """Three names for a head of two classes: ended in a ValueError of `zip`."""
    model = two_heads()
    model.set_active("cars")
    with pytest.raises(zoo.ZooError, match="holds 3 names, and the head has 2"):
        model.classes = [*CARS, "van"]
    model.take_names([*CARS, "van"])  # as a file may have it
    with pytest.raises(zoo.ZooError, match="names 3 classes"):
        zoo.evaluate(model, images_of(CARS), progress=False, device="cpu")
    train, val = images_of(CARS), images_of([*CARS, "van"])
    model.classes = None
    with pytest.raises(zoo.ZooError, match="has 3 classes, the model's head 2"):
        zoo.fit(model, train, val, epochs=1, progress=False, device="cpu")


def test_names_after_removals() -> None:
    """Add, add, remove the first, add: the third got the name of the second, and was refused."""
    model = zoo.load("vit-micro", num_classes=3, **TINY)
    for _ in range(2):
        model.add_adapter("lora", activate=False)
    model.remove_adapter("lora")
    model.add_adapter("lora", activate=False)
    model.remove_adapter("lora-2")
    model.add_adapter("lora", activate=False)
    model.add_adapter("lora", activate=False)
    assert list(model.adapters) == ["lora", "lora-2", "lora-3"]
