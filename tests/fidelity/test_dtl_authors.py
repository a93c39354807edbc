"""DTL and DTL+ against numbers recorded from the authors' code, the counts of the paper, and what is kept for backward.

`dtl.json` holds logits and gradients of heekhero/DTL (commit bf6c51e, `models/vision_transformer.py`, its 14 x 14 patches set to
4 x 4) at the sizes of `waves.SMALL` with 4 blocks, in float64, r = 3, all blocks collect and 2 and 3 give back; beta 100, and 3
for "dtl+". Its pooling is that of timm's ViT with global_pool="avg". Names are ours.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from waves import SMALL, agree, fill, fill_head, learn, pictures, shift

import zoo

AUTHORS: dict[str, Any] = json.loads((Path(__file__).parent / "dtl.json").read_text())


@pytest.mark.parametrize("rerun", [0, 2])
@pytest.mark.parametrize(("method", "beta"), [("dtl", 100.0), ("dtl+", 3.0)])
def test_equals_the_authors_code(method: str, beta: float, rerun: int) -> None:
    adapter = zoo.adapter(method, rank=3, beta=beta, rerun=rerun)  # all four blocks, the second half of them
    options = {**SMALL, "depth": 4, "global_pool": "avg"}
    model = zoo.load("vit-micro", adapter, num_classes=4, pretrained=False, **options).double().eval()
    fill(dict(model.backbone.named_parameters()))
    fill_head(model.head)  # type: ignore[arg-type]
    named = dict(model.adapters[method].named_parameters())
    shift(named)
    logits = model(pictures())
    expected = torch.tensor(AUTHORS[method]["logits"], dtype=torch.float64)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    learn(logits)
    agree(named, AUTHORS[method]["gradients"])


@pytest.mark.parametrize(
    ("name", "method", "config", "expected"),
    [
        ("vit-b16", "dtl", {}, 36_864),
        ("vit-b16", "dtl+", {}, 43_776),
        ("swin-b", "dtl", {"rank": 4}, 90_112),
        ("swin-b", "dtl+", {"rank": 4}, 90_112 + 9 * (512 + 1024)),
    ],
)
def test_counts(name: str, method: str, config: dict[str, Any], expected: int) -> None:
    model = zoo.load(name, zoo.adapter(method, **config), num_classes=0, device="meta")
    assert model.num_parameters(trainable=True) == expected


def test_a_tenth_of_what_full_tuning_keeps() -> None:
    """Bytes for backward of ViT-B's shape at a third of its width, all settings as they come."""
    kept = {}
    x = torch.randn(1, 3, 64, 64)
    for method in ("full", "ladder", "dtl", "dtl+"):
        options = {"img_size": 64, "patch_size": 8, "embed_dim": 256, "depth": 12, "num_heads": 4}
        kept[method] = zoo.load("vit-micro", method, pretrained=False, num_classes=5, **options).train().saved_bytes(x)
    for method in ("ladder", "dtl", "dtl+"):
        assert kept[method] < 0.1 * kept["full"], (method, kept[method] / kept["full"])
