"""CoOp against numbers of the authors' code, run on the weights of clip-micro with the same tokenizer (`coop.json`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import zoo

pytest.importorskip("open_clip")
RECORD: dict[str, Any] = json.loads((Path(__file__).parent / "coop.json").read_text())


@pytest.mark.parametrize("case", RECORD["cases"], ids=lambda c: f"{c['position']} {c['class_specific']} {c['init']}")
def test_logits_and_gradients(case: dict[str, Any]) -> None:
    settings = {k: case[k] for k in ("position", "class_specific", "init", "num_tokens")}
    model = zoo.load("clip-micro", zoo.adapter("coop", **settings), classes=RECORD["classes"])
    (context,) = model.adapters["coop"].parameters()
    if not case["init"]:
        with torch.no_grad():
            context.copy_(0.05 * torch.randn(context.shape, generator=torch.Generator().manual_seed(2)))
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    logits = model.train()(images)
    torch.testing.assert_close(logits, torch.tensor(case["logits"]), rtol=1e-5, atol=1e-5)
    F.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
    assert context.grad is not None
    found = context.grad.flatten(0, -2).sum(-1)
    torch.testing.assert_close(found, torch.tensor(case["gradient"]), rtol=1e-4, atol=1e-5)
    assert float(context.grad.norm()) == pytest.approx(case["gradient_norm"], rel=1e-5)


def test_counts() -> None:
    model = zoo.load("clip-vit-b16", "coop", num_classes=10, device="meta")
    assert model.num_parameters(trainable=True) == 16 * 512 == 8_192
    specific = zoo.load("clip-vit-b16", zoo.adapter("coop", class_specific=True), num_classes=10, device="meta")
    assert specific.num_parameters(trainable=True) == 10 * 8_192
    siglip = zoo.load("siglip-b16", "coop", num_classes=10, device="meta")
    assert siglip.num_parameters(trainable=True) == 16 * 768
