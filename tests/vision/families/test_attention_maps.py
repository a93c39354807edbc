"""timm's own tool for attention maps on a backbone whose attentions have more keys."""

from __future__ import annotations

import pytest
import torch
from method_models import attach, bare, images, shake
from timm.utils import AttentionExtract


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", ["vit", "swin"])
@pytest.mark.parametrize("method", ["prefix", "vpt", "lora"])
def test_maps_are_there(method: str, family: str, fused: bool) -> None:
    """With prefix or vpt the result was empty: the attention's dropout, where timm looks, was never called."""
    model = bare(family).eval()
    attach(model, method)
    shake(model, method)
    for module in model.backbone.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    with torch.no_grad():
        expected = model.features(images())
        extract = AttentionExtract(model.backbone, method="hook")
        if method == "lora" and fused:  # as without adapters: timm's fused product forms no weights
            assert not extract(images())
            return
        maps = extract(images())
        assert len(maps) == len(model.family.blocks())
        more = {"prefix": 10, "vpt": 3, "lora": 0}[method]
        for weights in maps.values():
            assert weights.shape[-1] == weights.shape[-2] + more
            torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        torch.testing.assert_close(model.features(images()), expected, rtol=1e-4, atol=1e-5)
