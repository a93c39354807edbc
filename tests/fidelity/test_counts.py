"""Trainable parameters (without head) on full-size backbones, against the papers' tables and the authors' code."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

import zoo


@cache
def backbone(name: str) -> zoo.Model:
    return zoo.load(name, pretrained=False, device="meta", num_classes=0)


def count(name: str, method: str, **config: Any) -> int:
    model = backbone(name)
    model.add_adapter(zoo.adapter(method, **config), name="counted")
    try:
        return model.num_parameters(trainable=True, head=False)
    finally:
        model.remove_adapter("counted")


QVKO, ALL = ("q", "k", "v", "o"), "all-linear"


@pytest.mark.parametrize(
    ("name", "method", "config", "expected"),
    [
        ("vit-b16", "linear", {}, 0),
        ("vit-b16", "lora", {}, 294_912),
        ("vit-b16", "lora", {"targets": ("q", "k", "v")}, 442_368),
        ("vit-b16", "lora", {"targets": QVKO}, 589_824),
        ("vit-b16", "lora", {"targets": ALL}, 1_327_104),
        ("vit-b16", "lora", {"targets": ALL, "rank": 1}, 165_888),
        ("swin-t", "lora", {"targets": ALL, "rank": 1}, 79_488),
        ("swin-b", "lora", {"targets": ALL, "rank": 1}, 216_576),
        # DoRA adds the length of every row: 12 * 2 * 768, 12 * 9 * 768
        ("vit-b16", "lora", {"dora": True}, 313_344),
        ("vit-b16", "lora", {"targets": ALL, "dora": True}, 1_327_104 + 82_944),
        ("vit-b16", "adapter", {"form": "pfeiffer", "rank": 8}, 156_768),
        ("vit-b16", "adapter", {"form": "pfeiffer", "reduction": 8}, 1_779_840),
        ("vit-b16", "adapter", {"form": "pfeiffer", "reduction": 64}, 230_544),
        ("vit-b16", "adapter", {"form": "pfeiffer", "reduction": 96}, 156_768),
        ("vit-b16", "adapter", {"form": "pfeiffer", "reduction": 128}, 119_880),
        ("vit-b16", "adapter", {"form": "houlsby", "rank": 8}, 313_536),
        ("vit-b16", "adapter", {"form": "houlsby"}, 2_379_264),
        ("vit-b16", "adapter", {"form": "houlsby", "reduction": 64}, 461_088),
        ("vit-b16", "adapter", {"form": "adaptformer"}, 1_189_632),
        ("vit-b16", "adapter", {"form": "adaptformer", "rank": 8}, 156_768),
        ("vit-l16", "adapter", {"form": "adaptformer"}, 3_171_840),
        ("vit-b16", "adapter", {"form": "parallel"}, 304_320),
        ("vit-b16", "ssf", {}, 205_824),
        # patch embedding and its norm, 22 C for each block, the norms of three mergings, the final norm
        ("swin-t", "ssf", {}, 4 * 96 + 22 * (2 * 96 + 2 * 192 + 6 * 384 + 2 * 768) + 8 * (96 + 192 + 384) + 2 * 768),
        ("vit-b16", "ia3", {}, 55_296),
        ("vit-b16", "ia3", {"inputs": ()}, 18_432),
    ],
)
def test_counts(name: str, method: str, config: dict[str, Any], expected: int) -> None:
    assert count(name, method, **config) == expected


@pytest.mark.parametrize(
    ("name", "full", "bitfit", "norm"),
    [
        ("vit-ti16", 5_524_416, 25_728, 9_600),
        ("vit-s16", 21_665_664, 51_456, 19_200),
        ("vit-b16", 85_798_656, 102_912, 38_400),
        ("vit-l16", 303_301_632, 272_384, 100_352),
        ("vit-h14", 630_764_800, 453_120, 166_400),
        ("swin-t", 27_519_354, 52_224, 24_768),
        ("swin-s", 48_837_258, 102_912, 43_200),
        ("swin-b", 86_743_224, 137_216, 57_600),
        ("swin-l", 194_995_476, 205_824, 86_400),
    ],
)
def test_counts_of_the_backbones(name: str, full: int, bitfit: int, norm: int) -> None:
    assert backbone(name).num_parameters() == full
    assert count(name, "full") == full
    assert count(name, "bitfit") == bitfit
    assert count(name, "norm") == norm


def test_an_adapter_leaves_nothing_behind() -> None:
    model = backbone("vit-b16")
    assert model.num_parameters() == 85_798_656
    assert model.num_parameters(trainable=True) == 0
