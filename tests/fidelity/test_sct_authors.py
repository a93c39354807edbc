"""SCT against numbers recorded from the authors' code, and the counts of the paper.

`sct.json` holds, for the three places, the channels that zhaohengyuan1/SCT (commit 01e8f1e, `train_model_sct.py`) chooses by two
batches of three images, and logits and gradients of its blocks (`models/vision_transformer_sct.py`) with these, on a timm ViT of
`waves.SMALL`, in float64, K = 6. Names are ours.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from waves import SMALL, agree, fill, fill_head, learn, pictures, shift, wave

import zoo

AUTHORS: dict[str, Any] = json.loads((Path(__file__).parent / "sct.json").read_text())


@pytest.mark.parametrize("at", ["attn", "mlp", "qkv"])
def test_equals_the_authors_code(at: str) -> None:
    recorded = AUTHORS[f"sct_{at}"]
    adapter = zoo.adapter("sct", channels=6, at=at)
    model = zoo.load("vit-micro", adapter, num_classes=4, pretrained=False, **SMALL).double().eval()
    fill(dict(model.backbone.named_parameters()))
    fill_head(model.head)  # type: ignore[arg-type]
    sct: Any = model.adapters["sct"]
    labels = torch.tensor([[1, 3, 1], [0, 3, 3]])
    sct.calibrate(model, [(wave((3, 3, 32, 32), 5 + i, 1.5), labels[i]) for i in range(2)])
    for i, channels in enumerate(recorded["channels"]):
        found = {k: v for k, v in sct.plan["channels"].items() if k.startswith(f"blocks.{i}.")}
        expected = {"q": channels["q"], "v": channels["v"]} if at == "qkv" else {"": channels}
        assert list(found.values()) == list(expected.values())
    named = dict(sct.named_parameters())
    shift(named)
    logits = model(pictures())
    torch.testing.assert_close(logits, torch.tensor(recorded["logits"], dtype=torch.float64), rtol=1e-9, atol=1e-9)
    learn(logits)
    agree(named, recorded["gradients"])


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("vit-b16", {}, 111_744),
        ("vit-b16", {"at": "mlp"}, 111_744),
        ("vit-b16", {"at": "qkv"}, 223_488),
        ("vit-b16", {"channels": 32}, 12 * (32 * 32 + 32)),
        ("swin-t", {}, sum(n * (k * k + k) for n, k in ((2, 12), (2, 24), (6, 48), (2, 96)))),
    ],
)
def test_counts(name: str, config: dict[str, Any], expected: int) -> None:
    model = zoo.load(name, zoo.adapter("sct", **config), num_classes=0, device="meta")
    assert model.num_parameters(trainable=True) == expected
