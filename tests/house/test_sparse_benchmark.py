"""The machinery of `benchmarks/sparse.py`: what its rows are, and the table; not the numbers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import zoo
from zoo.data import ImageDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import sparse

NAMES = [file.stem for file in sorted(sparse.RESULTS.glob("sparse*.json"))]


def test_every_row_can_be_run() -> None:
    for label, (method, _, rate) in sparse.ALL.items():
        if method != "linear":
            assert sparse.adapter_of(label, 0.7).method == method
        assert rate > 0 and rate in sparse.TRIED.get(label, (rate,))
    for study in sparse.STUDIES.values():
        assert set(study.methods) <= set(sparse.ALL)


@pytest.fixture
def images(tmp_path: Path) -> ImageDataset:
    """Two classes of noise, four steps of 16 images."""
    for i in range(32):
        for name in ("a", "b"):
            (tmp_path / name).mkdir(exist_ok=True)
            noise = torch.randint(0, 255, (32, 32, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
            Image.fromarray(noise.numpy()).save(tmp_path / name / f"{i}.png")
    return zoo.open_dataset(tmp_path)


@pytest.mark.parametrize("label", ["head alone, Wanda", "MaskLoRA", "PST", "DSEE", "DSL", "LT-SFT"])
def test_a_row_at_toy_size(label: str, images: ImageDataset) -> None:
    """What is trained behind a pruned network, and that the network that is used has the zeros; an update has none."""
    row = sparse.run_one(label, 0.7, images, images, seed=0, epochs=2 if label == "DSL" else 1)
    assert 0 <= row["accuracy"] <= 1 and (row["parameters"] == 0) == label.startswith("head")
    assert row["zeros"] == pytest.approx(0.0 if label in sparse.UPDATES else 0.7, abs=1e-4)
    if label == "LT-SFT":
        whole = zoo.load("vit-micro", num_classes=0).num_parameters()
        assert row["parameters"] == int(0.3 * whole)


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_table_is_that_of_the_rows(name: str) -> None:
    rows = json.loads((sparse.RESULTS / f"{name}.json").read_text())["rows"]
    assert (sparse.RESULTS / f"{name}.md").read_text() == sparse.markdown(rows)
    assert {len([r for r in rows if (r["method"], r["sparsity"]) == key]) for key in sparse.cells(rows)} == {3}
    zeros = [(r["zeros"], 0.0 if r["method"] in sparse.UPDATES else r["sparsity"]) for r in rows]
    assert all(found == pytest.approx(wanted, abs=1e-4) for found, wanted in zeros)


def test_the_page_has_the_numbers_of_the_rows() -> None:
    """Each cell of the committed tables stands in docs/sparse.md."""
    page = (sparse.RESULTS.parents[1] / "docs" / "sparse.md").read_text()
    for name in NAMES:
        rows = json.loads((sparse.RESULTS / f"{name}.json").read_text())["rows"]
        for label, sparsity in sparse.cells(rows):
            mean, deviation = sparse.summary(rows, label, sparsity) or (0.0, 0.0)
            assert f"| {mean:.1f} ± {deviation:.1f} |" in page, (name, label, sparsity)
