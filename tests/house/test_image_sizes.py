"""The size of images has one meaning under two words: `img_size` (timm) and `image_size` (transformers, open_clip)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import zoo
from zoo.errors import ConfigError

TINY: dict[str, Any] = {"pretrained": False, "num_classes": 2}
VIT: dict[str, Any] = {**TINY, "embed_dim": 24, "depth": 1, "num_heads": 2}
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("vit-micro", VIT, "img_size"),
    ("clip-micro", {"pretrained": False, "num_classes": 0}, "image_size"),
    ("hf-vit-b16", {**TINY, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}, "image_size"),
    ("timm:resnet10t", {**TINY}, "img_size"),
]


@pytest.mark.parametrize("word", ["img_size", "image_size"])
@pytest.mark.parametrize(("name", "options", "own"), CASES[:3], ids=[case[0] for case in CASES[:3]])
def test_either_word_is_understood(name: str, options: dict[str, Any], own: str, word: str) -> None:
    model = zoo.load(name, device="meta", **{**options, word: 64})
    assert model.image_size == (64, 64)
    kept = {k: v for k, v in model.backbone_kwargs.items() if k in ("img_size", "image_size")}
    assert kept == {own: 64}  # one word in what is saved, whichever was given


def test_both_words_are_refused() -> None:
    with pytest.raises(ConfigError, match="two words for one thing"):
        zoo.load("vit-micro", device="meta", img_size=64, image_size=32, **VIT)


@pytest.mark.parametrize("name", ["vit-micro", "swin-micro", "clip-micro"])
@pytest.mark.parametrize("size", [0, -4, 64.0, "64", True, (64, 0), (64,), (64, 64, 64), [64, None]])
def test_sizes_that_are_none(name: str, size: Any) -> None:
    with pytest.raises(ConfigError, match=r"img_size is .*; expected a whole number of pixels, 1 or more, or two"):
        zoo.load(name, device="meta", **{**TINY, "img_size": size})


@pytest.mark.parametrize("word", ["img_size", "image_size"])
def test_a_network_without_images_says_so(word: str) -> None:
    with pytest.raises(ConfigError, match=rf"family 'ast' has no size of images to choose \({word}=\). Sizes that it"):
        zoo.load("ast-micro", device="meta", **{**TINY, word: 64})


def test_a_library_without_it_says_so() -> None:
    name, options, own = CASES[3]
    with pytest.raises(ConfigError, match=own):
        zoo.load(name, device="meta", image_size=64, **options)


@pytest.mark.parametrize("word", ["img_size", "image_size"])
def test_a_saved_adapter_is_loaded_at_another_size(tmp_path: Path, word: str) -> None:
    """The word of the user stands instead of the saved one, whichever of the two it is."""
    zoo.load("vit-micro", "lora", img_size=16, num_classes=2).save_adapter(tmp_path / "at-16")
    again = zoo.load(adapter=tmp_path / "at-16", **{word: 48})
    assert again.image_size == (48, 48)
    assert zoo.load(adapter=tmp_path / "at-16").image_size == (16, 16)
