"""Convpass against numbers recorded from the authors' code, and the counts of the paper.

`convpass.json` holds logits and gradients of JieShibo/PETL-ViT (commit 026e4f1, `convpass/vtab/convpass.py`, their width 768,
14 x 14 patches and identity of 8 channels set to 48, 4 x 4 and h, `drop_path` by its name in today's timm) on a timm ViT of
`waves.SMALL`, in float64, h = 3, s = 0.5; and of their bypass of Swin alone, width 6. Names are ours.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from waves import SMALL, agree, fill, fill_head, learn, pictures, shift, wave

import zoo
from vision.adapters.convpass import Bypass
from vision.adapters.parts.patches import Patches

AUTHORS: dict[str, Any] = json.loads((Path(__file__).parent / "convpass.json").read_text())


@pytest.mark.parametrize(("case", "targets"), [("convpass", ("attn", "mlp")), ("convpass_attn", ("attn",))])
def test_equals_the_authors_code(case: str, targets: tuple[str, ...]) -> None:
    adapter = zoo.adapter("convpass", rank=3, scale=0.5, targets=targets)
    model = zoo.load("vit-micro", adapter, num_classes=4, pretrained=False, **SMALL).double().eval()
    fill(dict(model.backbone.named_parameters()))
    fill_head(model.head)  # type: ignore[arg-type]
    named = dict(model.adapters["convpass"].named_parameters())
    shift(named)
    logits = model(pictures())
    expected = torch.tensor(AUTHORS[case]["logits"], dtype=torch.float64)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    learn(logits)
    agree(named, AUTHORS[case]["gradients"])


@pytest.mark.parametrize("map", [False, True])
def test_equals_their_bypass_of_swin(map: bool) -> None:
    """Tokens as they have them, (B, H W, d), and as our Swin's attention has them, (B, H, W, d)."""
    module = Bypass(6, 3, Patches("convpass", "here", (4, 4), 0), 1.0, 0.1).double().eval()
    named = dict(module.named_parameters())
    shift(named)
    x = wave((2, 16, 6), 3, 1.0)
    y = module(x.unflatten(1, (4, 4)) if map else x).reshape(2, 16, 6)
    expected = torch.tensor(AUTHORS["swin"]["output"], dtype=torch.float64)
    torch.testing.assert_close(y[:, ::5], expected, rtol=1e-9, atol=1e-9)
    (y * wave((2, 16, 6), 4, 1.0)).sum().backward()
    agree(named, AUTHORS["swin"]["gradients"])


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("vit-b16", {}, 327_552),
        ("vit-b16", {"targets": "attn"}, 163_776),
        ("vit-b16", {"rank": 16}, 24 * (2 * 768 * 16 + 9 * 256 + 2 * 16 + 768)),
        ("swin-t", {}, 2 * sum(n * (17 * d + 9 * 64 + 16) for n, d in ((2, 96), (2, 192), (6, 384), (2, 768)))),
    ],
)
def test_counts(name: str, config: dict[str, Any], expected: int) -> None:
    model = zoo.load(name, zoo.adapter("convpass", **config), num_classes=0, device="meta")
    assert model.num_parameters(trainable=True) == expected
