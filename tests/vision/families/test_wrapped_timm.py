"""Networks of timm that the user has built: a family that describes their class takes them, with all its kinds of point."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

import zoo

SMALL: dict[str, Any] = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", SMALL),
    "eva": ("vit_small_patch16_dinov3", SMALL),
    "beit": ("beit_base_patch16_224", SMALL),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4)},
    ),
    "convnext": ("convnext_atto", {}),
    "samvit": ("samvit_base_patch16_224", SMALL),
    "generic": ("resnet10t", {}),
}


@pytest.mark.parametrize("family", NETWORKS)
def test_wrapped_as_loaded(family: str) -> None:
    """EVA, BEiT, ConvNeXt and others stayed with the family for any network, which knows fewer kinds of point."""
    name, options = NETWORKS[family]
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=5, **options).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = network(images)
    model = zoo.wrap(network, example=images).eval()
    assert model.family.family == family and model.num_classes == 5
    with torch.no_grad():
        assert torch.equal(model(images), expected)
    model.add_adapter("lora")
    assert model.probe(images) == []
