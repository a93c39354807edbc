"""A model that is called with no batch of its backbone's says what a batch is."""

from __future__ import annotations

from collections.abc import Callable
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
