"""DAS against numbers of the authors' code (`das.json`): its networks, and the update of the gates of both their models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from multimodal.adapters.parts.skipping import Bottleneck, updated

RECORD: dict[str, Any] = json.loads((Path(__file__).parent / "das.json").read_text())


@pytest.mark.parametrize("form", ["skipped", "beside"])
def test_networks(form: str) -> None:
    generator = torch.Generator().manual_seed(1)
    module = Bottleneck(12, 5, residual=form == "skipped")
    theirs = {
        "adapter_layer_norm_before": module.ln,
        "down_proj": module.down,
        "up_proj": module.up,
    }
    with torch.no_grad():
        for part in theirs.values():
            for p in (part.weight, part.bias):
                p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    x = torch.randn(2, 3, 12, generator=generator)
    y, expected = module(x), RECORD[form]
    torch.testing.assert_close(y.flatten()[:24], torch.tensor(expected["output"]), rtol=1e-5, atol=1e-5)
    assert y.sum().item() == pytest.approx(expected["sum"], rel=1e-5)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    for name, part in theirs.items():
        for kind in ("weight", "bias"):
            found = getattr(part, kind).grad.flatten()[:12]
            torch.testing.assert_close(
                found, torch.tensor(expected["gradients"][f"{name}.{kind}"]), rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("model", ["vilt", "meter"])
def test_update_of_the_gates(model: str) -> None:
    """Of METER too with a step of 1: the 0.1 that its code defines is not used."""
    gates, record = torch.zeros(12), RECORD[model]
    for turn in record["rounds"]:
        gates = updated(gates, turn["picks"], turn["rewards"], 1.0)
    torch.testing.assert_close(gates, torch.tensor(record["gates"]), rtol=1e-5, atol=1e-6)
    assert gates.abs().max() > 0.01


def test_counts() -> None:
    def size(width: int) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in Bottleneck(768, width, residual=True).parameters())

    assert [size(w) for w in (96, 192, 288)] == [149_856, 297_408, 444_960]
    # METER's 12 fusion blocks, of three sublayers each, and ViLT's 12 of two, by how many are skipped
    assert [k * 444_960 + (12 - k) * 3 * 149_856 for k in (0, 12)] == [5_394_816, 5_339_520]
    # VL-T5: a decoder block is of three sublayers, an encoder block of two
    model = zoo.load("vl-t5", zoo.adapter("das", skip=(0, 1, 11, 12)), device="meta", pretrained=False)
    assert model.num_parameters(trainable=True) == 2 * 297_408 + 10 * 299_712 + 2 * 444_960 + 10 * 449_568
    clip = zoo.load("clip-vit-b16", zoo.adapter("das", skip=(3,)), num_classes=10, device="meta")
    assert clip.num_parameters(trainable=True, head=False) == 297_408 + 11 * 299_712 == 3_594_240
