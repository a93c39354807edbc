"""A model that is called with no batch of its backbone's says what a batch is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo

SMALL = {"pretrained": False, "embed_dim": 48, "depth": 1, "num_heads": 3}
IMAGES = torch.randn(2, 3, 32, 32)
CALLS: dict[str, Callable[[zoo.Model], Any]] = {
    "nothing": lambda m: m(),
    "features of nothing": lambda m: m.features(),
    "outputs of nothing": lambda m: m.outputs(),
    "nothing for an adapter": lambda m: m(adapters=["lora"]),
    "probe of nothing": lambda m: m.probe(),
    "bytes of nothing": lambda m: m.saved_bytes(),
    "an array": lambda m: m(IMAGES.numpy()),
    "a file's name": lambda m: m("a.png"),
    "a list": lambda m: m([IMAGES[0]]),
    "another name": lambda m: m(pixel_values=IMAGES),
    "labels behind": lambda m: m(IMAGES, torch.tensor([0, 1])),
    "whole numbers": lambda m: m((IMAGES * 50).byte()),
    "one channel": lambda m: m(IMAGES[:, :1]),
    "one image": lambda m: m(IMAGES[0]),
}


@pytest.fixture(scope="module")
def model() -> zoo.Model:
    return zoo.load("vit-micro", "lora", num_classes=3, **SMALL)


@pytest.mark.parametrize("what", CALLS)
def test_what_is_no_batch_is_answered_with_one(model: zoo.Model, what: str) -> None:
    with pytest.raises(zoo.ZooError, match=r"was called with .* takes what .* gives: \(float32 \(2, 3, 32, 32\)\)"):
        CALLS[what](model)
    assert model(IMAGES).shape == (2, 3) and model(x=IMAGES, adapters=["lora", None]).shape == (2, 3)


def test_an_error_of_the_network_itself_stays(model: zoo.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*inputs: Any, **kwargs: Any) -> Any:
        raise ValueError("a bug")

    monkeypatch.setattr(model.family, "features", broken)
    with pytest.raises(ValueError, match=r"^a bug$"):
        model(IMAGES)


CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "quantise": lambda model, folder: zoo.quantise(model),
    "sparsify": lambda model, folder: zoo.sparsify(model),
    "prune": lambda model, folder: zoo.prune(model, blocks=0),
    "substitute": lambda model, folder: zoo.substitute(model, {"blocks.0.attn": "none"}),
    "save_backbone": zoo.save_backbone,
    "to_peft": zoo.to_peft,
    "to_onnx": lambda model, folder: zoo.to_onnx(model, folder / "m.onnx"),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("given", [5, None, "vit-micro", torch.nn.Linear(2, 2)], ids=["5", "None", "name", "module"])
def test_what_is_no_model_is_named(what: str, given: Any, tmp_path: Path) -> None:
    with pytest.raises(zoo.ZooError, match=r"^model is .*; expected a model of zoo\.load"):
        CHANGES[what](given, tmp_path)
    assert not list(tmp_path.iterdir())


def test_heads_to_prune_are_a_dict(model: zoo.Model) -> None:
    with pytest.raises(zoo.ZooError, match=r"heads is -1; expected a dict from blocks"):
        zoo.prune(model, heads=-1)  # type: ignore[arg-type]
