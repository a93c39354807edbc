"""Compacter against the authors' code (rabeehk/compacter): weights, outputs, gradients, start; counts at full size.

`compacter.json` holds numbers recorded by running their `HyperComplexAdapter` (two of them with one rule, each with its residual,
as their controller adds it), their `LowRankLinear` and their initial values, in float64 on the values of `fill` below. None of
their code is here.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo.adapters.compacter import KroneckerBottleneck
from zoo.adapters.parts.kronecker import KroneckerLinear, Rule

AUTHORS: dict[str, Any] = json.loads((Path(__file__).parent / "compacter.json").read_text())
DIM, BOTTLENECK, N = 16, 8, 4


def fill(name: str, shape: tuple[int, ...], std: float = 1.0) -> Tensor:
    """Values that belong to a name."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.from_numpy(std * random.standard_normal(shape))


def put(parameter: nn.Parameter, name: str) -> None:
    with torch.no_grad():
        parameter.copy_(fill(name, tuple(parameter.shape), 0.5))


def close(ours: Tensor, theirs: Any) -> None:
    torch.testing.assert_close(ours, torch.as_tensor(theirs, dtype=torch.float64), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rank", [1, 2])
def test_outputs_and_gradients(rank: int) -> None:
    rule = Rule(N, 1.0).double()
    put(rule.rule, "rule")
    adapters = [KroneckerBottleneck(DIM, BOTTLENECK, rule, rank, "gelu_new").double() for _ in range(2)]
    named: dict[str, nn.Parameter] = {"rule": rule.rule}
    for i, adapter in enumerate(adapters):
        for side, layer in (("down", adapter.phm_down), ("up", adapter.phm_up)):
            for key in ("left", "right", "bias"):
                named[f"{i}.{side}.{key}"] = getattr(layer, key)
                put(getattr(layer, key), f"{i}.{side}.{key}")
    theirs = AUTHORS[f"rank{rank}"]
    x = fill("x", (2, 3, DIM)).requires_grad_(True)
    close(adapters[0].phm_down.weight(), theirs["weight"])
    y = adapters[1](adapters[0](x))
    close(y, theirs["output"])
    (y * fill("loss", (2, 3, DIM))).sum().backward()
    assert set(theirs["gradients"]) == {*named, "x"}
    for name, parameter in named.items():
        assert parameter.grad is not None
        close(parameter.grad, theirs["gradients"][name])
    assert x.grad is not None
    close(x.grad, theirs["gradients"]["x"])


def test_with_one_group_it_is_their_low_rank_layer() -> None:
    rule = Rule(1, 1.0).double()
    nn.init.ones_(rule.rule)
    layer = KroneckerLinear(DIM, BOTTLENECK, rule).double()
    for key in ("left", "right", "bias"):
        put(getattr(layer, key), f"low.{key}")
    x = fill("x", (2, 3, DIM)).requires_grad_(True)
    y = layer(x)
    close(y, AUTHORS["low_rank"]["output"])
    (y * fill("loss", (2, 3, BOTTLENECK))).sum().backward()
    for key in ("left", "right", "bias"):
        theirs = np.array(AUTHORS["low_rank"]["gradients"][key])
        close(getattr(layer, key).grad.reshape(theirs.shape), theirs)


def test_start() -> None:
    """Their spread, per slice, over 20 seeds at the sizes of T5-base; biases at zero."""
    torch.manual_seed(0)
    layers = [KroneckerLinear(768, 24, Rule(4, 1e-4)).requires_grad_(False) for _ in range(20)]
    start = AUTHORS["start"]
    assert float(torch.stack([x.left for x in layers]).std()) == pytest.approx(start["left_std"], rel=0.02)
    assert float(torch.stack([x.right for x in layers]).std()) == pytest.approx(start["right_std"], rel=0.1)
    assert max(float(x.left.abs().max()) for x in layers) == pytest.approx(start["left_max"], rel=0.02)
    assert max(float(x.bias.abs().max()) for x in layers) == start["bias_max"] == 0
    assert float(Rule(4, 1e-4).rule.detach().std()) == pytest.approx(1e-4, rel=0.5)


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 57_088),
        ({"bottleneck": 48}, 58_816),
        ({"form": "compacter++"}, 28_576),
        ({"form": "compacter++", "bottleneck": 48}, 29_440),
    ],
)
def test_counts_on_vit_b(settings: dict[str, Any], count: int) -> None:
    model = zoo.load("vit-b16", zoo.adapter("compacter", **settings), pretrained=False, num_classes=0, device="meta")
    assert model.num_parameters(trainable=True, head=False) == count


@pytest.mark.parametrize(("form", "count"), [("compacter", 161_728), ("compacter++", 104_704)])
def test_counts_on_t5_base(form: str, count: int) -> None:
    """VL-T5 is T5-base and a visual embedding, whose two norms are not in their numbers."""
    method = zoo.adapter("compacter", form=form, train_norms=True)
    model = zoo.load("vl-t5", method, pretrained=False, device="meta")
    visual = sum(p.numel() for k, p in model.parameters_to_train().items() if "encoder.visual" in k)
    assert visual == 2 * 768
    assert model.num_parameters(trainable=True, head=False) - visual == count
    assert not any("cross" in k for k in model.parameters_to_train() if "phm" in k)
