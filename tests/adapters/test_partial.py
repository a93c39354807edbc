"""Partial-k: which parameters it trains, that the others stay, and what is kept for backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zoo

TINY: dict[str, Any] = {"embed_dim": 48, "depth": 4, "num_heads": 3}


@pytest.mark.parametrize(
    ("name", "k", "expected"),
    [
        ("vit-b16", 1, 7_087_872 + 1_536),
        ("vit-b16", 12, 12 * 7_087_872 + 1_536),
        ("vit-l16", 2, 2 * 12_596_224 + 2_048),
        # the last block of Swin-T: 12 d^2 + 13 d, its table of positions 169 x 24, the norm behind it
        ("swin-t", 1, 12 * 768**2 + 13 * 768 + 169 * 24 + 2 * 768),
    ],
)
def test_counts(name: str, k: int, expected: int) -> None:
    model = zoo.load(name, zoo.adapter("partial", k=k), num_classes=0, device="meta")
    assert model.num_parameters(trainable=True) == expected


def test_the_blocks_in_front_stay() -> None:
    torch.manual_seed(0)
    model = zoo.load("vit-micro", zoo.adapter("partial", k=2), pretrained=False, num_classes=5, **TINY)
    x = torch.randn(2, 3, 32, 32)
    names = {k.removeprefix("partial/backbone.") for k in model.parameters_to_train() if k.startswith("partial/")}
    whole = dict(model.backbone.named_parameters())
    assert names == {n for n in whole if n.startswith(("blocks.2.", "blocks.3.", "norm."))}
    optimizer = torch.optim.SGD(model.parameters_to_train().values(), lr=0.1)
    model.train()(x).square().sum().backward()
    optimizer.step()
    plain = dict(model.merge().named_parameters())
    moved = {n for n, p in whole.items() if not torch.equal(plain[n], p)}
    assert moved == names
    torch.testing.assert_close(model.merge()(x), model.eval()(x))
    full = zoo.load("vit-micro", "full", pretrained=False, num_classes=5, **TINY)
    assert model.train().saved_bytes(x) < 0.6 * full.train().saved_bytes(x)


def test_k_is_checked() -> None:
    with pytest.raises(zoo.ZooError, match="k is 0"):
        zoo.adapter("partial", k=0)
    with pytest.raises(zoo.ZooError, match="k is 5; vit-micro has 4 blocks"):
        zoo.load("vit-micro", zoo.adapter("partial", k=5), pretrained=False, **TINY)
