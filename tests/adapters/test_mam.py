"""MAM: a block by hand, in the form in which the prefix is a gated branch; counts; what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from train_parts import easy_data, tiny_model

import zoo
from zoo.errors import ConfigError


def images() -> Tensor:
    return easy_data(6, seed=5).tensors[0]


def made(**config: Any) -> Any:
    return tiny_model(zoo.adapter("mam", **{"num_tokens": 3, "rank": 4, **config}))


def shake(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.adapters["mam"].parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model.adapters["mam"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, 599_232),
        ({"num_tokens": 30, "rank": 512, "scale": 4.0}, 10_005_504),
        ({"mlp": 800}, 304_320 + 16 * 768 + 800 * 769 + 12 * 2 * 768 * 801),
    ],
)
def test_counts(config: dict[str, Any], expected: int) -> None:
    """Those of the paper; with the hidden layer, while training."""
    model = zoo.load("vit-b16", zoo.adapter("mam", **config), num_classes=0, device="meta")
    assert model.num_parameters(trainable=True) == expected


@pytest.mark.parametrize("mlp", [None, 5])
def test_a_block_by_hand(mlp: int | None) -> None:
    """h <- (1 - a) h + a softmax(q P_k^T) P_v in the heads; beside the MLP s times a bottleneck of what the MLP reads."""
    model = made(mlp=mlp, scale=3.0)
    adapter = shake(model)
    block, caught = model.backbone.blocks[1], {}
    hook = block.register_forward_hook(lambda m, args, out: caught.update(x=args[0].detach(), y=out.detach()))
    with torch.no_grad():
        model(images())
    hook.remove()
    x = caught["x"]
    state = adapter.saved()[1]
    keys, values = (state[f"blocks.1.attn.product.{n}"] for n in ("keys", "values"))
    part = adapter.module_at("blocks.1.mlp")
    with torch.no_grad(), model.disable():
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 2, 12)).permute(2, 0, 3, 1, 4)
        p_k, p_v = (m.unflatten(-1, (2, 12)).transpose(0, 1) for m in (keys, values))
        own, theirs = (q @ k.transpose(-1, -2)) / 12**0.5, (q @ p_k.transpose(-1, -2)) / 12**0.5
        share = theirs.exp().sum(-1, keepdim=True) / (
            theirs.exp().sum(-1, keepdim=True) + own.exp().sum(-1, keepdim=True)
        )
        heads = (1 - share) * (own.softmax(-1) @ v) + share * (theirs.softmax(-1) @ p_v)
        u = x + block.attn.proj(heads.transpose(1, 2).flatten(2))
        read = block.norm2(u)
        down = torch.relu(read @ part.adapter_down.weight.T + part.adapter_down.bias)
        y = u + block.mlp(read) + 3.0 * (down @ part.adapter_up.weight.T + part.adapter_up.bias)
    torch.testing.assert_close(caught["y"], y, rtol=1e-5, atol=1e-5)


def test_the_adapters_start_as_nothing() -> None:
    """What is not the pretrained function at the start is the prefixes alone, and they reach every attention."""
    model = made()
    prefix = tiny_model(zoo.adapter("prefix", num_tokens=3))
    with torch.no_grad():
        for name, tensor in prefix.adapters["prefix"].named_parameters():
            tensor.copy_(model.adapters["mam"].get_parameter(name))
    assert torch.equal(model(images()), prefix(images()))
    spread = torch.cat([p.flatten() for n, p in made(num_tokens=400).adapters["mam"].named_parameters() if "keys" in n])
    assert float(spread.std().detach()) == pytest.approx(0.02, rel=0.05)


def test_saved_without_the_hidden_layer(tmp_path: Path) -> None:
    model = made(mlp=5)
    shake(model)
    model.save_adapter(tmp_path / "out")
    torch.manual_seed(100)
    again: Any = zoo.load(adapter=tmp_path / "out", pretrained=False).eval()
    assert again.adapters["mam"].config()["mlp"] is None
    assert again.num_parameters(trainable=True, head=False) == made().num_parameters(trainable=True, head=False)
    torch.testing.assert_close(again(images()), model(images()), rtol=1e-6, atol=1e-6)


def test_refused_settings() -> None:
    for config, message in (
        ({"num_tokens": 0}, "num_tokens is 0"),
        ({"rank": 0}, "rank is 0"),
        ({"scale": 0}, "scale is 0"),
        ({"mlp": 0}, "mlp is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            zoo.adapter("mam", **config)
