"""DSL against the authors' code (shuyao-wang/DSL): masks, weights, the ratio, what has ever been there; and the count.

`dsl.json` holds what their `Masking` does around SGD to a network of two matrices with the values that `value` makes, in float64:
magnitude, gradient, an update every third step. Their first masks are drawn entry by entry, and taken as they are. None of their
code is here.
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
from zoo.adapters.dsl import DSL
from zoo.adapters.parts.sparse import Sparse

AUTHORS: dict[str, Any] = json.loads((Path(__file__).parent / "dsl.json").read_text())
SHAPES = {"first": (7, 6), "second": (5, 7)}
STEPS, EVERY, LR = 12, 3, 0.05


def value(name: str, shape: tuple[int, ...]) -> Tensor:
    """Values that belong to a name."""
    return torch.from_numpy(np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape))


def places(mask: Tensor) -> list[int]:
    return mask.flatten().nonzero()[:, 0].tolist()  # type: ignore[no-any-return]


def test_masks_and_weights_of_a_run() -> None:
    adapter = DSL(interval=EVERY)
    weights = {name: value(name, shape) for name, shape in SHAPES.items()}
    parts, fired = {}, {}
    for name, shape in SHAPES.items():
        mask = torch.zeros(shape, dtype=torch.bool)
        mask.view(-1)[AUTHORS["first_masks"][name]] = True
        parts[name], fired[name] = Sparse(mask, int(mask.sum())).double(), mask.clone()
    for step, theirs in enumerate(AUTHORS["steps"]):
        moves = (step + 1) % EVERY == 0
        for part in parts.values():
            part.watch(moves)
        matrices = {name: part(weights[name]) for name, part in parts.items()}
        y = torch.tanh(value(f"x{step}", (4, 6)) @ matrices["first"].T) @ matrices["second"].T
        (y - value(f"y{step}", (4, 5))).square().sum().backward()
        with torch.no_grad():
            for part in parts.values():
                part.delta.sub_(LR * part.delta.grad)  # type: ignore[arg-type,operator]
                part.delta.grad = None
        ratio = adapter.ratio(step + 1, STEPS)
        assert ratio == pytest.approx(theirs["ratio"], abs=1e-12)
        assert (theirs["masks"] is not None) == moves
        if not moves:
            continue
        for name, part in parts.items():
            part.update(ratio, weights[name], part.probe.grad)  # type: ignore[union-attr,arg-type]
            part.watch(False)
            fired[name] |= part.mask
            assert places(part.mask) == theirs["masks"][name]
            expected = torch.tensor(theirs["weights"][name], dtype=torch.float64).view(SHAPES[name])
            torch.testing.assert_close(part(weights[name]).detach(), expected, rtol=1e-7, atol=1e-8)
        ever = sum(int(f.sum()) for f in fired.values()) / sum(f.numel() for f in fired.values())
        assert ever == pytest.approx(theirs["fired"])


def test_count_on_vit_b16() -> None:
    model = zoo.load("vit-b16", adapter="dsl", pretrained=False, num_classes=0, device="meta")
    assert model.num_parameters(trainable=True) == 84_934_656 // 2
    adapter = zoo.adapter("dsl", density=0.2)
    model = zoo.load("vit-b16", adapter=adapter, pretrained=False, num_classes=0, device="meta")
    assert model.num_parameters(trainable=True) == 48 * round(0.2 * 768 * 768) + 24 * round(0.2 * 768 * 3072)
