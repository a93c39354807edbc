"""CoCoOp, MaPLe and CPE-CLIP against numbers of the authors' code, and the counts of their defaults on CLIP ViT-B/16.

The records hold logits and gradients of the authors' modules on a CLIP of waves (`tests/parts/clip_waves.py`, three blocks in
each tower) in float64, with our tokenizer in the place of theirs. Changed in theirs: casts to float16 and float32 are left out;
constant widths, heads and the number of words (768, 512, 12, 8) are those of the small network, CPE-CLIP's constant scale 100
is 20; the library's causal mask, which newer releases no longer have, is given to CPE-CLIP. Keys are ours.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zoo

pytest.importorskip("open_clip")
from clip_waves import equals_the_record


def test_cocoop() -> None:
    equals_the_record("cocoop", zoo.adapter("cocoop"))


def test_maple() -> None:
    equals_the_record("maple", zoo.adapter("maple", depth=3))


def test_maple_starts_with_the_words() -> None:
    model = zoo.load("clip-micro", "maple", classes=["cat", "dog"], pretrained=False)
    point, adapter = model.points["text.blocks.0.tokens"], model.adapters["maple"]
    assert torch.equal(adapter.module_at(point).context, point.embed("a photo"))  # type: ignore[operator]
    assert model.head.template == "<*> <*> of a {}."


@pytest.mark.parametrize("vision", ["accumulate", "replace"])
def test_cpe_clip(vision: str) -> None:
    equals_the_record("cpe_clip", zoo.adapter("cpe-clip", depth=3, vision=vision), case=vision)


@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        ("cocoop", {}, 4 * 512 + 513 * 32 + 33 * 512),
        ("cocoop", {"init": "", "num_tokens": 16}, 16 * 512 + 513 * 32 + 33 * 512),
        ("maple", {}, 9 * (2 * 512 + 512 * 768 + 768)),
        ("maple", {"depth": 1}, 2 * 512 + 512 * 768 + 768),
        ("cpe-clip", {}, 12 * 2 * 512 + 512 * 768 + 768),
    ],
)
def test_counts(method: str, settings: dict[str, Any], expected: int) -> None:
    model = zoo.load("clip-vit-b16", zoo.adapter(method, **settings), num_classes=10, device="meta")
    assert model.num_parameters(trainable=True, head=False) == expected
    if not settings:
        assert expected == {"cocoop": 35_360, "maple": 3_555_072, "cpe-clip": 406_272}[method]
