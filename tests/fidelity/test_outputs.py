"""Features and gradients against the authors' code, on the same parameters and images.

`authors.json` was recorded by running dongzelian/SSF (its ViT and Swin) and ShoufaChen/AdaptFormer (its ViT) at tiny
sizes, with all parameters and images set by `value` below: every n-th feature, and of each new parameter the norm and the
first two entries of its gradient; and one projection of NVlabs/DoRA, whole. None of their code is here.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from zoo.adapters.lora import DoRAWeight

AUTHORS: dict[str, Any] = json.loads((Path(__file__).parent / "authors.json").read_text())
VIT = {"embed_dim": 48, "depth": 2, "num_heads": 3}
SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}


def value(name: str, shape: tuple[int, ...]) -> Tensor:
    """Random values that belong to a name: around 1 for scales and weights of norms, else around 0."""
    drawn = 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    return 1 + drawn if name.endswith((".scale", "norm.weight", "norm1.weight", "norm2.weight")) else drawn


def bottleneck(case: str) -> zoo.Adapter:
    _, form, norm, scale = case.split("-")
    learned = scale == "learnable_scalar"
    options = {"form": "adaptformer" if form == "parallel" else "pfeiffer", "rank": 4, "dropout": 0.1, "norm": norm}
    return zoo.adapter("adapter", **options, scale=1.0 if learned else float(scale), learn_scale=learned)


@pytest.mark.parametrize("case", [case for case in AUTHORS if case != "dora"])
def test_against_the_authors_code(case: str) -> None:
    adapter = zoo.adapter("ssf") if case.startswith("ssf") else bottleneck(case)
    swin = case == "ssf-swin"
    name, options = ("timm:swin_tiny_patch4_window7_224", SWIN) if swin else ("vit-micro", VIT)
    model = zoo.load(name, adapter, pretrained=False, num_classes=0, **options).eval()
    new = dict(model.adapters[adapter.method].named_parameters())
    # The authors' Swin compares a list to a string and so never scales the norm of its patch merging: kept at the start.
    idle = {key: new.pop(key) for key in list(new) if "merge" in key}
    with torch.no_grad():
        for key, parameter in [*model.backbone.named_parameters(), *new.items()]:
            parameter.copy_(value(key, tuple(parameter.shape)))
        for key, parameter in idle.items():
            parameter.fill_(1.0 if key.endswith("scale") else 0.0)
    size = 64 if swin else 32
    features = model(10 * value("images", (2, 3, size, size)))
    (features * value("weights", tuple(features.shape))).sum().backward()

    expected = torch.tensor(AUTHORS[case]["features"])
    found = features.detach().flatten()[:: features.numel() // 24]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert set(new) == set(AUTHORS[case]["gradients"])
    for key, numbers in AUTHORS[case]["gradients"].items():
        gradient = new[key].grad
        assert gradient is not None
        found = torch.stack([gradient.norm(), *gradient.flatten()[:2]])
        torch.testing.assert_close(found, torch.tensor(numbers), rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


def test_dora_against_the_authors_code() -> None:
    """r = 3, alpha = 6, without dropout, the norm a constant for the gradient (their `dora_simple`)."""
    module = DoRAWeight(value("dora.weight", (8, 12)), rank=3, scale=2.0)
    torch.testing.assert_close(module.magnitude, value("dora.weight", (8, 12)).square().sum(dim=1).sqrt())
    with torch.no_grad():
        module.lora_a.copy_(value("dora.lora_a", (3, 12)))
        module.lora_b.copy_(value("dora.lora_b", (8, 3)))
        module.magnitude.copy_(1 + value("dora.magnitude", (8,)))
    x = (10 * value("dora.x", (5, 12))).requires_grad_()
    y = torch.nn.functional.linear(x, module(value("dora.weight", (8, 12))), value("dora.bias", (8,)))
    (y * value("dora.weights", (5, 8))).sum().backward()
    found = {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}
    assert set(found) == set(AUTHORS["dora"])
    for name, numbers in AUTHORS["dora"].items():
        tensor = found[name]
        assert tensor is not None
        torch.testing.assert_close(tensor.flatten(), torch.tensor(numbers), rtol=1e-5, atol=1e-5)
