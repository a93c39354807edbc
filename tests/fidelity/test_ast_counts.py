"""AST at full size on the `meta` device against published counts, and its positions against the authors' code."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo

pytest.importorskip("transformers")

# Recorded from the authors' own `ASTModel(audioset_pretrain=True, ...)` on the table that is described there
RECORDED = json.loads((Path(__file__).parent / "ast.json").read_text())


@cache
def backbone(**options: Any) -> zoo.Model:
    return zoo.load("ast", device="meta", num_classes=0, **options)


def test_counts_of_the_backbone() -> None:
    assert backbone().num_parameters() == 86_187_264
    assert zoo.load("ast", device="meta").num_parameters() == 86_187_264 + 406_799  # layer norm and 527 classes
    speech = zoo.load("ast-speech-commands", device="meta")
    assert speech.num_classes == 35
    # 12 x 12 patches instead of 12 x 101
    assert speech.num_parameters(head=False) == 86_187_264 - 12 * (101 - 12) * 768
    assert backbone(max_length=400).backbone.get_parameter(
        "audio_spectrogram_transformer.embeddings.position_embeddings"
    ).shape == (1, 2 + 468, 768)


@pytest.mark.parametrize(
    ("method", "config", "expected"),
    [
        # umbertocappellazzo/PETL_AST: reduction rates 64, 96, 128
        ("adapter", {"form": "pfeiffer", "reduction": 64}, 230_544),
        ("adapter", {"form": "pfeiffer", "reduction": 96}, 156_768),
        ("adapter", {"form": "pfeiffer", "reduction": 128}, 119_880),
        ("adapter", {"form": "houlsby", "reduction": 64}, 461_088),
        ("lora", {"rank": 12}, 442_368),
        ("prefix", {"num_tokens": 12}, 221_184),
        ("vpt", {"num_tokens": 25}, 230_400),
        ("bitfit", {}, 102_912),
        ("norm", {}, 38_400),
        ("ssf", {}, 205_824),
        ("ia3", {}, 55_296),
    ],
)
def test_counts_of_methods(method: str, config: dict[str, Any], expected: int) -> None:
    model = backbone()
    model.add_adapter(zoo.adapter(method, **config), name="counted")
    try:
        assert model.num_parameters(trainable=True, head=False) == expected
    finally:
        model.remove_adapter("counted")


def test_positions_are_fitted_as_by_the_authors() -> None:
    from audio.families.parts.positions import resize_positions

    table = torch.randn(1, 1214, 768, generator=torch.Generator().manual_seed(7))
    for case in RECORDED["cases"]:
        bands, frames, strides = case["bands"], case["frames"], case["strides"]
        grid = ((bands - 16) // strides[0] + 1, (frames - 16) // strides[1] + 1)
        found = resize_positions(table, (12, 101), grid)
        assert found.shape == (1, case["tokens"], 768)
        flat = found.reshape(-1)
        values = flat[1537 :: len(flat) // 7][:7]
        torch.testing.assert_close(values, torch.tensor(case["values"]), rtol=0, atol=2e-6)
        assert float(found.double().square().mean()) == pytest.approx(case["mean_square"], abs=2e-8)
