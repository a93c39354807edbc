"""MEFT against the authors' code (BaohaoLiao/mefts): outputs and gradients of a run of blocks in each of the three forms.

`meft.json` holds numbers recorded by running their `RevBertLayer.forward`, `RevBackProp` (its backward pass) and `Adapter` in
float64, with the functions F and G of each form made of timm's pre-norm blocks in the place of BERT's layers, on the values of
`fill` below. None of their code is here.
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

FILE = Path(__file__).parent / "meft.json"
SIZES = {"embed_dim": 16, "depth": 3, "num_heads": 2, "img_size": 8, "patch_size": 4}


def fill(name: str, shape: tuple[int, ...], std: float = 1.0) -> Tensor:
    """Values that belong to a name."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.from_numpy(std * random.standard_normal(shape))


@pytest.mark.parametrize("keep", ["input", "segments", "output"])
@pytest.mark.parametrize("form", [1, 2, 3])
def test_outputs_and_gradients(form: int, keep: str) -> None:
    theirs: dict[str, Any] = json.loads(FILE.read_text())[str(form)]
    adapter = zoo.adapter("meft", form=form, keep=keep)
    model = zoo.load("vit-micro", adapter, num_classes=0, pretrained=False, **SIZES).double().train()  # type: ignore[arg-type]
    with torch.no_grad():
        for name, p in model.backbone.blocks.named_parameters():  # type: ignore[union-attr]
            p.copy_(fill(name, tuple(p.shape), 0.2) + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
        for name, p in model.adapters["meft"].named_parameters():
            p.copy_(fill(name, tuple(p.shape), 0.3))
    x = fill("x", (2, 5, 16)).requires_grad_()
    y: Tensor = model.backbone.blocks(x)  # type: ignore[operator]
    (y * fill("loss", (2, 5, 16))).sum().backward()
    found = {k: p.grad for k, p in model.adapters["meft"].named_parameters()}
    assert set(theirs["gradients"]) == {*found, "x"}
    for name, gradient in {**found, "x": x.grad}.items():
        assert gradient is not None
        expected = torch.tensor(theirs["gradients"][name], dtype=torch.float64)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y, torch.tensor(theirs["output"], dtype=torch.float64), rtol=1e-8, atol=1e-8)
