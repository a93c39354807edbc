"""Every normalisation is a point, and every bias a method's that trains all biases: counted in the library's own modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zoo

NAMES = [
    "timm:beit3_base_patch16_224",  # norms inside of attention and MLP
    "timm:vit_medium_patch16_reg1_gap_256",
    "timm:vit_wee_patch16_reg1_gap_256",
    "timm:vit_base_patch16_siglip_224",  # pooled by a latent that asks
    "timm:vit_so150m2_patch16_reg1_gap_256",
    "timm:vit_small_r26_s32_224",  # a convolutional stem
    "timm:vit_base_resnet26d_224",
    "timm:vitamin_small_224",
    "timm:vit_intern300m_patch14_448",
    "dinov2-b14",
    "swin-t",
]


def norms(module: nn.Module) -> dict[int, nn.Module]:
    """The library's normalisations that have numbers of their own."""
    return {id(m): m for m in module.modules() if "Norm" in type(m).__name__ and list(m.parameters(recurse=False))}


@pytest.mark.parametrize("name", NAMES)
def test_norm_and_ssf_reach_every_normalisation(name: str) -> None:
    """q and k norms, those inside of attention and MLP, of pooling and of stems were no points: 38,400 of 130,560."""
    model = zoo.load(name, "norm", num_classes=0, device="meta")
    wanted = norms(model.backbone)
    assert {id(p.module) for p in model.points.select(kind="norm")} == wanted.keys()
    numbers = sum(p.numel() for m in wanted.values() for p in m.parameters(recurse=False))
    assert model.num_parameters(trainable=True) == numbers
    model.remove_adapter("norm")
    model.add_adapter("ssf")
    rescaled = {p.name for p in model.points.select(kind="norm")}
    assert rescaled <= {key.removesuffix(".scale") for key, _ in model.adapters["ssf"].named_parameters()}


@pytest.mark.parametrize("name", [n for n in NAMES if "_r26" not in n and "resnet" not in n and "vitamin" not in n])
def test_bitfit_reaches_every_bias(name: str) -> None:
    model = zoo.load(name, "bitfit", num_classes=0, device="meta")
    own = [p.numel() for k, p in model.backbone.named_parameters() if k.rpartition(".")[2] == "bias"]
    assert model.num_parameters(trainable=True) == sum(own)


@pytest.mark.parametrize(("name", "count"), [("timm:beit3_base_patch16_224", 130_560), ("vit-b16", 38_400)])
def test_numbers_of_all_normalisations(name: str, count: int) -> None:
    assert zoo.load(name, "norm", num_classes=0, device="meta").num_parameters(trainable=True) == count


def test_siglip_with_its_pooling() -> None:
    model = zoo.load("timm:vit_base_patch16_siglip_224", num_classes=0, device="meta")
    assert sum(p.numel() for p in model.backbone.parameters()) == 92_884_224
    lora = model.add_adapter(zoo.adapter("lora", rank=1, targets="all-linear"))
    assert sum(p.numel() for p in lora.parameters()) == 165_888  # of the blocks: the pooling has a role of its own
    model.remove_adapter("lora")
    pooling = model.add_adapter(zoo.adapter("lora", rank=1, targets="pool"))
    assert sum(p.numel() for p in pooling.parameters()) == 3 * 2 * 768 + 2 * 768 + 2 * (768 + 3072)


SMALL: dict[str, Any] = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "pretrained": False}


@pytest.mark.parametrize("method", ["norm", "bitfit", "ssf", "lora"])
@pytest.mark.parametrize("name", ["timm:vit_base_patch16_siglip_224", "timm:beit3_base_patch16_224"])
def test_alive_and_merged(name: str, method: str) -> None:
    pooled = {"targets": ("q", "v", "pool")} if method == "lora" and "siglip" in name else {}
    adapter = zoo.adapter(method, **pooled)
    torch.manual_seed(0)
    model = zoo.load(name, adapter, num_classes=3, patch_size=8, **SMALL).train()
    images = torch.randn(3, 3, 32, 32)
    assert model.probe(images) == []
    with torch.no_grad():
        for parameter in model.parameters_to_train().values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    F.cross_entropy(model(images), torch.tensor([0, 1, 2])).backward()
    assert [k for k, p in model.parameters_to_train().items() if p.grad is None or not p.grad.any()] == []
    with torch.no_grad():
        torch.testing.assert_close(model.eval().merge()(images), model(images), rtol=1e-5, atol=1e-5)


def test_norms_of_a_convolutional_stem() -> None:
    torch.manual_seed(0)
    small = {"img_size": 64, "embed_dim": 48, "depth": 1, "num_heads": 3, "pretrained": False, "num_classes": 3}
    images = torch.randn(2, 3, 64, 64)
    for method in ("norm", "ssf"):
        model = zoo.load("timm:vit_small_r26_s32_224", **small)
        with torch.no_grad():  # timm starts the last norm of each of the stem's blocks at 0
            for parameter in model.backbone.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        model.add_adapter(method)
        model.train()
        assert model.probe(images) == []
        F.cross_entropy(model(images), torch.tensor([0, 1])).backward()
        assert [k for k, p in model.parameters_to_train().items() if p.grad is None or not p.grad.any()] == []
    with pytest.raises(zoo.ZooError, match="activation stands in the same module"):
        model.eval().merge()
