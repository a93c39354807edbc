"""Ladder side-tuning against a straightforward implementation with timm's own blocks, and the count of the card.

The authors' code describes T5 alone, whose families are left out here; so the reference is written out: the backbone's blocks one
by one, the gates and down-projections as in their `T5Stack.forward`, and timm's `Block` at width d / r for the side.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from method_models import bare, images, targets
from timm.models.vision_transformer import Block
from torch import Tensor, nn

import zoo

NAMES = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}


def test_count() -> None:
    """2.38M of ViT-B/16, as in V-PETL Bench."""
    model = zoo.load("vit-b16", "ladder", num_classes=0, device="meta")
    block, down = 111_840, 768 * 96 + 96
    assert model.num_parameters(trainable=True) == 2_376_492
    assert model.num_parameters(trainable=True) == 12 * (block + down + 1) + down + (96 * 768 + 768) + 192


def reference(
    model: zoo.Model, adapter: Any, settings: dict[str, Any], image: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The features, and the parameters that they were made with (under our names)."""
    vit: Any = model.backbone
    values = {k: v.detach().clone().requires_grad_() for k, v in adapter.state_dict().items()}
    with torch.no_grad():
        tokens = vit._pos_embed(vit.patch_embed(image))
    h = tokens @ values["blocks.0.start.weight"].T + values["blocks.0.start.bias"]
    width = h.shape[-1]
    for i, block in enumerate(vit.blocks):
        with torch.no_grad():
            tokens = block(tokens)
        if f"blocks.{i}.alpha" not in values:
            continue
        mu = torch.sigmoid(values[f"blocks.{i}.alpha"] / 0.1)
        h = mu * h + (1 - mu) * (tokens @ values[f"blocks.{i}.down.weight"].T + values[f"blocks.{i}.down.bias"])
        side = Block(width, 3, mlp_ratio=block.mlp.fc1.out_features / vit.embed_dim, qkv_bias=True).double()
        for norm in (side.norm1, side.norm2):
            norm.eps = block.norm1.eps
        mine = {
            f"{NAMES.get(part, part)}.{kind}": values[f"blocks.{i}.side.{part}.{kind}"]
            for part in ("norm1", "qkv", "proj", "norm2", "fc1", "fc2")
            for kind in ("weight", "bias")
        }
        h = torch.func.functional_call(side, mine, (h,))
    h = nn.functional.layer_norm(h, (width,), values["norm.norm.weight"], values["norm.norm.bias"], vit.norm.eps)
    out = h @ values["norm.up.weight"].T + values["norm.up.bias"]
    if settings.get("add"):
        out = out + vit.norm(tokens)
    return out[:, 0], values


@pytest.mark.parametrize("settings", [{}, {"layers": (1, 2)}, {"add": True, "rerun": 0}])
def test_against_a_straightforward_ladder(settings: dict[str, Any]) -> None:
    model = bare("vit", depth=4).double()
    torch.manual_seed(2)
    adapter = model.add_adapter(zoo.adapter("ladder", reduction=4, **settings))
    with torch.no_grad():
        for p in adapter.parameters():
            p += 0.1 * torch.randn_like(p)
    image = images().double()
    features = model.features(image)
    nn.functional.cross_entropy(model.head(features), targets()).backward()
    found = {k: p.grad for k, p in adapter.named_parameters()}
    with model.disable():
        expected, values = reference(model, adapter, settings, image)
    torch.testing.assert_close(features, expected, rtol=1e-9, atol=1e-9)
    gradients = torch.autograd.grad(nn.functional.cross_entropy(model.head(expected), targets()), list(values.values()))
    for (key, _), gradient in zip(values.items(), gradients, strict=True):
        torch.testing.assert_close(found[key], gradient, rtol=1e-7, atol=1e-9, msg=key)
