"""CLIP and SigLIP at full size: parameters, and LoRA on all six projections of both towers."""

from __future__ import annotations

import pytest

import zoo

pytest.importorskip("open_clip")


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("clip-vit-b32", 151_277_313),
        ("clip-vit-b16", 149_620_737),
        ("clip-vit-l14", 427_616_513),
        ("siglip-b16", 203_155_970),
        ("clip-micro", 3_927_169),
    ],
)
def test_full_size(name: str, total: int) -> None:
    model = zoo.load(name, "lora", device="meta")
    assert sum(p.numel() for p in model.backbone.parameters()) == total
    approximate = any(type(m).__name__ == "QuickGELU" for m in model.backbone.modules())
    assert approximate == name.startswith("clip-vit")  # OpenAI's weights were trained with it
    if name == "siglip-b16":
        assert model.mean == (0.5, 0.5, 0.5) and model.family.data_config()["crop_mode"] == "squash"
        assert {p.tower for p in model.points.select("*.blocks.*.attn.q")} == {"image", "text"}


def test_lora_counts_of_both_towers() -> None:
    """d = 768 and 512, 12 blocks each: 8 * (165,888 + 110,592)."""
    model = zoo.load("clip-vit-b16", zoo.adapter("lora", rank=8, targets="all-linear"), device="meta")
    assert model.num_parameters(trainable=True) == 8 * 276_480
    assert len(model.parameters_to_train()) == 24 * 6 * 2
    model = zoo.load("open_clip:ViT-B-32/laion2b_s34b_b79k", "lora", device="meta")
    assert not any(type(m).__name__ == "QuickGELU" for m in model.backbone.modules())
