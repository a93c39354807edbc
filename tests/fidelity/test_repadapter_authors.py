"""RepAdapter against numbers recorded from the authors' code, and the counts of the paper.

`repadapter.json` holds logits and gradients of luogen1996/RepAdapter (commit 360992f, `repadapter.py`, their width 768 set to
48) on a timm ViT of `waves.SMALL`, in float64, h = 4, s = 0.5, and the weights of the last
block after their own merge. Names are ours.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from waves import SMALL, agree, fill, fill_head, learn, pictures, shift, summary

import zoo

AUTHORS: dict[str, Any] = json.loads((Path(__file__).parent / "repadapter.json").read_text())


@pytest.mark.parametrize(("case", "targets"), [("repblock", ("attn", "mlp")), ("repattn", ("attn",))])
def test_equals_the_authors_code(case: str, targets: tuple[str, ...]) -> None:
    adapter = zoo.adapter("repadapter", rank=4, scale=0.5, targets=targets)
    model = zoo.load("vit-micro", adapter, num_classes=4, pretrained=False, **SMALL).double().eval()
    fill(dict(model.backbone.named_parameters()))
    fill_head(model.head)  # type: ignore[arg-type]
    named = dict(model.adapters["repadapter"].named_parameters())
    shift(named)
    logits = model(pictures())
    expected = torch.tensor(AUTHORS[case]["logits"], dtype=torch.float64)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    learn(logits)
    agree(named, AUTHORS[case]["gradients"])

    merged = model.merge()
    for key, numbers in AUTHORS[case]["merged"].items():
        found = torch.tensor(summary(merged.get_parameter(key).detach()))
        torch.testing.assert_close(found, torch.tensor(numbers), rtol=1e-6, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")
    torch.testing.assert_close(merged(pictures()), logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("vit-b16", {}, 239_808),
        ("vit-b16", {"bias": False}, 221_184),
        ("vit-b16", {"targets": "attn"}, 119_904),
        ("vit-b16", {"groups": 1}, 24 * (2 * 768 * 8 + 8 + 768)),
        ("swin-t", {}, 2 * sum(n * (13 * d + 8) for n, d in ((2, 96), (2, 192), (6, 384), (2, 768)))),
    ],
)
def test_counts(name: str, config: dict[str, Any], expected: int) -> None:
    model = zoo.load(name, zoo.adapter("repadapter", **config), num_classes=0, device="meta")
    assert model.num_parameters(trainable=True) == expected
