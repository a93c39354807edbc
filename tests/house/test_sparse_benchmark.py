"""The machinery of `benchmarks/sparse.py`: what its rows are, and the table; not the numbers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import zoo

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import sparse


def test_every_row_can_be_run() -> None:
    for method, settings, rate in [*sparse.METHODS.values(), *sparse.DENSE.values()]:
        own = {k: v for k, v in settings.items() if method != "linear"}
        assert zoo.adapter(method, **own).method == method and rate > 0


@pytest.mark.parametrize("label", ["head alone, Wanda", "MaskLoRA"])
def test_a_row_at_toy_size(label: str, tmp_path: Path) -> None:
    """What is trained behind a pruned network, and that the merged one has the zeros."""
    for i in range(4):
        for name in ("a", "b"):
            (tmp_path / name).mkdir(exist_ok=True)
            noise = torch.randint(0, 255, (32, 32, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
            Image.fromarray(noise.numpy()).save(tmp_path / name / f"{i}.png")
    data = zoo.open_dataset(tmp_path)
    row = sparse.run_one(label, 0.7, data, data, seed=0, epochs=1)
    assert row["zeros"] == pytest.approx(0.7, abs=1e-4) and 0 <= row["accuracy"] <= 1
    assert (row["parameters"] == 0) == label.startswith("head")


@pytest.mark.parametrize("name", ["sparse", "sparse_longer"])
def test_the_committed_table_is_that_of_the_rows(name: str) -> None:
    rows = json.loads((sparse.RESULTS / f"{name}.json").read_text())["rows"]
    assert (sparse.RESULTS / f"{name}.md").read_text() == sparse.markdown(rows)
    assert {len([r for r in rows if (r["method"], r["sparsity"]) == key]) for key in sparse.cells(rows)} == {3}
    assert all(r["zeros"] == pytest.approx(r["sparsity"], abs=1e-4) for r in rows)
