"""LoReFT, DiReFT, NoReFT and NodiReFT against the authors' code (stanfordnlp/pyreft), and their counts on ViT-B/16.

`loreft.json` holds outputs and gradients recorded by running their interventions on tokens, weights and bases set by `wave` below
(float64, width 12, rank 3). None of their code is here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from waves import wave

import zoo
from zoo.adapters.loreft import FORMS, Intervention, orthonormal

AUTHORS: dict[str, Any] = json.loads((Path(__file__).parent / "loreft.json").read_text())
DIM, RANK = 12, 3


def close(found: Tensor, recorded: list[float]) -> None:
    expected = torch.tensor(recorded, dtype=torch.float64).view(found.shape)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_equals_the_authors_code(form: str) -> None:
    recorded = AUTHORS[form]
    unit = Intervention(DIM, RANK, form, None, False, 0.0).double()
    with torch.no_grad():
        unit.reft_source.weight.copy_(wave((RANK, DIM), 3, 0.5))
        unit.reft_source.bias.copy_(wave((RANK,), 4, 0.3))
        unit.reft_r.copy_(wave((DIM, RANK), 5, 0.6) if unit.orthogonal else wave((RANK, DIM), 6, 0.6))
    rows = unit.basis()
    rows.retain_grad()
    unit.basis = lambda: rows  # type: ignore[method-assign]  # theirs is one tensor in both places, too
    h = wave((2, 5, DIM), 1, 1.5).requires_grad_(True)
    y = unit(h, h)
    (y * wave((2, 5, DIM), 2, 1.0)).sum().backward()
    close(y[0, :2], recorded["output"])
    assert y.norm().item() == pytest.approx(recorded["output_norm"], rel=1e-9)
    assert h.grad is not None and rows.grad is not None
    close(unit.reft_source.weight.grad, recorded["source.weight"])  # type: ignore[arg-type]
    close(unit.reft_source.bias.grad, recorded["source.bias"])  # type: ignore[arg-type]
    close(rows.grad, recorded["rows"])
    summary = torch.stack([*h.grad.flatten()[:4], h.grad.norm(), h.grad.sum()])
    close(summary, recorded["h"])


def test_reflections_against_reflections_one_by_one() -> None:
    """The triangular system against the product of matrices, and its gradient against differences."""
    x = wave((DIM, RANK), 5, 0.6)
    product = torch.eye(DIM, dtype=torch.float64)
    for j in range(RANK):
        v = torch.cat([torch.zeros(j), torch.ones(1), x[j + 1 :, j]]).double()
        product = product @ (torch.eye(DIM, dtype=torch.float64) - 2 * torch.outer(v, v) / (v @ v))
    torch.testing.assert_close(orthonormal(x), product[:, :RANK].T, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(orthonormal, x.requires_grad_(True))
    assert torch.autograd.gradgradcheck(orthonormal, x)


@pytest.mark.parametrize(("rank", "expected"), [(1, 18_444), (8, 147_552)])
def test_counts_on_vit_b16(rank: int, expected: int) -> None:
    model = zoo.load("vit-b16", zoo.adapter("loreft", rank=rank), num_classes=0, device="meta")
    assert model.num_parameters(trainable=True) == expected
