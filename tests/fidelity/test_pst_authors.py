"""PST against the authors' code (alibaba/AliceMind, S4/PST): masks, outputs, gradients, the schedule; and the count.

`pst.json` holds what their `SparseLinear` and `schedule_sparsity_ratio` give for the values that `value` makes, in float64. None
of their code is here.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import zoo
from zoo.adapters.parts.pruned import Pruned
from zoo.adapters.pst import PST

AUTHORS: dict[str, Any] = json.loads((Path(__file__).parent / "pst.json").read_text())
DIM_IN, DIM_OUT, RANK, MASK_RANK = 6, 8, 2, 3
FACTORS = (0.7, 1.3, 0.4)
SHAPES = {
    "weight_u": (DIM_OUT, RANK),
    "weight_v": (RANK, DIM_IN),
    "mask_a": (DIM_OUT, MASK_RANK),
    "mask_b": (MASK_RANK, DIM_IN),
    "mask_r": (DIM_OUT,),
    "mask_c": (DIM_IN,),
}


def value(name: str, shape: tuple[int, ...]) -> Tensor:
    """Values that belong to a name."""
    return torch.from_numpy(np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape))


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """x, W, b."""
    return value("x", (3, DIM_IN)), value("weight", (DIM_OUT, DIM_IN)), value("bias", (DIM_OUT,))


@pytest.mark.parametrize("sparsity", AUTHORS["layers"])
def test_masks_outputs_and_gradients(sparsity: str) -> None:
    theirs = AUTHORS["layers"][sparsity]
    layer = Pruned(DIM_IN, DIM_OUT, RANK, MASK_RANK, FACTORS).double()
    with torch.no_grad():
        for name, shape in SHAPES.items():
            layer.get_parameter(name).copy_(value(name, shape))
    layer.prune(float(sparsity))
    x, weight, bias = inputs()
    pruned = layer(weight)
    assert (pruned == 0).flatten().nonzero()[:, 0].tolist() == theirs["zeros"]
    assert len(theirs["zeros"]) == int(DIM_IN * DIM_OUT * float(sparsity)) == int(layer.removed)
    y = torch.nn.functional.linear(x, pruned, bias)
    torch.testing.assert_close(y, torch.tensor(theirs["y"], dtype=torch.float64), rtol=1e-5, atol=1e-6)
    y.square().sum().backward()
    for name in SHAPES:
        expected = torch.tensor(theirs["gradients"][name], dtype=torch.float64)
        torch.testing.assert_close(layer.get_parameter(name).grad, expected, rtol=1e-5, atol=1e-6)


def test_the_same_schedule() -> None:
    adapter = PST(sparsity=0.9, warmup=0.1, final=0.3)
    assert [adapter.schedule(t, 200) for t in range(0, 201, 5)] == pytest.approx(AUTHORS["schedule"], abs=1e-9)
    assert adapter.schedule(400, 1000) == pytest.approx(0.7875)


def test_count_on_vit_b16() -> None:
    model = zoo.load("vit-b16", adapter="pst", pretrained=False, num_classes=0, device="meta")
    assert model.num_parameters(trainable=True) == 2_820_096
