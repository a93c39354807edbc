"""What ships with the packages: sizes, cards, and the numbers that the cards state."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch

import zoo
from zoo.loading import embedded_adapters

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("ZOO_TEST_DATA", ROOT.parent / "shared" / "data"))
NEEDS_DATA = pytest.mark.skipif(
    not DATA.is_dir(), reason="the data packs are not here; name their folder in ZOO_TEST_DATA"
)


def test_sizes() -> None:
    weights = ROOT / "vision" / "weights"
    assert (weights / "vit-micro.safetensors").stat().st_size < 6e6
    for folder in embedded_adapters().values():
        assert (folder / "adapter_model.safetensors").stat().st_size < 1e6


def test_vit_micro_is_what_its_card_says() -> None:
    card = (ROOT / "model_cards" / "vit-micro.md").read_text()
    model = zoo.load("vit-micro")
    assert f"`{model.fingerprint}`" in card
    assert f"{model.num_parameters():,} parameters" in card
    log = json.loads((ROOT / "model_cards" / "vit-micro.log.json").read_text())
    assert f"{100 * log['final']['test_accuracy']:.2f} %" in card


@NEEDS_DATA
def test_accuracy_on_cifar100() -> None:
    """A thousand test images, against the card's accuracy on all ten thousand: four standard errors are 6 points."""
    stated = float(re.search(r"\| ([\d.]+) % \|", (ROOT / "model_cards" / "vit-micro.md").read_text())[1]) / 100  # type: ignore[index]
    test = zoo.open_dataset(str(DATA / "cifar100"), split="test").select(range(1000))
    assert abs(zoo.evaluate(zoo.load("vit-micro"), test, batch_size=250, progress=False)["accuracy"] - stated) < 0.06


@pytest.mark.parametrize("name", sorted(embedded_adapters()))
def test_adapters_load_by_name_alone(name: str) -> None:
    model = zoo.load(adapter=name)
    assert model.active and model.num_classes > 1
    card = (embedded_adapters()[name] / "README.md").read_text()
    assert f'zoo.load(adapter="{name}")' in card
    assert "accuracy" in card and "More Information Needed" not in card
    with torch.no_grad():
        assert model(torch.zeros(1, *model.family.data_config()["input_size"])).shape == (1, model.num_classes)


@pytest.mark.parametrize("name", [n for n in sorted(embedded_adapters()) if n.endswith("-digits")])
def test_accuracy_on_digits(name: str) -> None:
    pytest.importorskip("sklearn")
    from zoo.demo import digits

    model = zoo.load("vit-micro", adapter=name)
    _, _, test = digits(model)
    measured = zoo.evaluate(model, test, progress=False)["accuracy"]
    assert measured == pytest.approx(model.record["metrics"]["test"]["accuracy"], abs=2e-3)
