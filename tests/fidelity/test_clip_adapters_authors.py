"""CLIP-Adapter and Tip-Adapter against numbers of the authors' code, run on the weights of clip-micro (`clip_adapters.json`).

Theirs multiplies cosines by 100; so does the model here. Their cache keeps the images in their order, ours by class.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

import zoo
from multimodal.adapters.clip_adapter import FeatureMLP
from multimodal.adapters.tip_adapter import Cache

pytest.importorskip("open_clip")
RECORD: dict[str, Any] = json.loads((Path(__file__).parent / "clip_adapters.json").read_text())
TARGETS, LABELS = torch.tensor([0, 1, 2, 0]), torch.tensor([2, 0, 1, 1, 0, 2, 2, 1, 0])


def drawn(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


class Passes:
    """Nine images in three passes, each augmented otherwise."""

    def view(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        images = drawn(9, 3)
        images = (images, images.flip(-1), images + 0.1)[number]
        for i in range(0, 9, 4):
            yield images[i : i + 4], LABELS[i : i + 4]


def test_clip_adapter() -> None:
    model = zoo.load("clip-micro", "clip-adapter", classes=RECORD["classes"])
    mlp, expected = model.adapters["clip-adapter"].module_at("mlp"), RECORD["clip-adapter"]  # type: ignore[operator, union-attr]
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in (mlp.down.weight, mlp.up.weight):
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    logits = model.train()(drawn(4, 1))
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), rtol=1e-5, atol=1e-5)
    F.cross_entropy(logits, TARGETS).backward()
    for weight, sums, norm in zip(
        (mlp.down.weight, mlp.up.weight), (expected["down"], expected["up"]), expected["norms"]
    ):
        torch.testing.assert_close(weight.grad.sum(1), torch.tensor(sums), rtol=1e-4, atol=1e-5)
        assert float(weight.grad.norm()) == pytest.approx(norm, rel=1e-5)


def tip(method: str) -> tuple[zoo.Model, Any]:
    model = zoo.load(
        "clip-micro",
        zoo.adapter(method, passes=3, beta=5.5, alpha_most=100.0, beta_most=60.0),
        classes=RECORD["classes"],
    )
    with torch.no_grad():
        model.backbone.logit_scale.fill_(math.log(100))  # type: ignore[operator, union-attr]
    adapter: Any = model.adapters[method]
    adapter.calibrate(model, Passes())
    return model, adapter


def test_tip_adapter() -> None:
    expected = RECORD["tip-adapter"]
    model, adapter = tip("tip-adapter")
    torch.testing.assert_close(
        adapter.module_at("cache").keys.sum(1), torch.tensor(expected["keys"]), rtol=1e-5, atol=1e-5
    )
    with torch.no_grad():
        logits = model(drawn(4, 1))
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), rtol=1e-5, atol=1e-5)


def test_search() -> None:
    expected = RECORD["tip-adapter"]
    model, adapter = tip("tip-adapter")
    labels = torch.arange(60) % 3
    like = labels + 3 * (torch.arange(60) % 2)
    val = TensorDataset(0.6 * drawn(60, 4) + drawn(9, 3)[[1, 2, 0, 4, 3, 5]][like], labels)
    with model.disable():
        from multimodal.tasks.zero_shot import put_zero_shot_classifier

        put_zero_shot_classifier(model, [name.replace("_", " ") for name in RECORD["classes"]])
        zero = zoo.evaluate(model, val, progress=False, record="")["accuracy"]
    assert zero == pytest.approx(expected["zero_shot"])
    found = adapter.search(model, val)
    assert found["accuracy"] == pytest.approx(expected["accuracy"]) and found["accuracy"] > zero
    assert (found["alpha"], found["beta"]) == (pytest.approx(expected["alpha"]), pytest.approx(expected["beta"]))
    assert zoo.evaluate(model, val, progress=False, record="")["accuracy"] == pytest.approx(found["accuracy"])


def test_tip_adapter_f() -> None:
    expected = RECORD["tip-adapter"]
    model, adapter = tip("tip-adapter-f")
    logits = model.train()(drawn(4, 1))
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), rtol=1e-5, atol=1e-5)
    F.cross_entropy(logits, TARGETS).backward()
    gradient = adapter.module_at("cache").keys.grad
    torch.testing.assert_close(gradient.sum(1), torch.tensor(expected["gradient"]), rtol=1e-4, atol=1e-5)
    assert float(gradient.norm()) == pytest.approx(expected["norm"], rel=1e-5)


def test_counts() -> None:
    model = zoo.load("clip-vit-b16", "clip-adapter", num_classes=10, device="meta")
    assert model.num_parameters(trainable=True) == 131_072
    cached = zoo.adapter("tip-adapter-f")
    cached.plan = {"counts": [16] * 1000, "classes": None}
    large = zoo.load("clip-vit-b16", cached, num_classes=1000, device="meta")
    assert large.num_parameters(trainable=True) == 16_000 * 512
    # RN50, whose image tower has no points here, is 1024 wide
    assert sum(p.numel() for p in FeatureMLP(1024, 4).parameters()) == 524_288
    with torch.device("meta"):
        assert sum(p.numel() for p in Cache([16] * 1000, 1024, trained=True).parameters()) == 16_384_000
