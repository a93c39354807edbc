"""Do the methods learn? The committed table, and (slow) one seed of it trained anew."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

import zoo

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("ZOO_TEST_DATA", ROOT.parent / "shared" / "data")) / "cifar10"
RESULTS = ROOT / "benchmarks" / "results" / "learning.json"
ADAPTED = ("VPT-deep", "LoRA", "AdaptFormer", "SPT")


def test_the_table_is_of_these_weights_and_every_method_beats_the_probe() -> None:
    record = json.loads(RESULTS.read_text())
    assert record["backbone"] == zoo.load("vit-micro").fingerprint
    lines = {line["method"]: line for line in record["summary"]}
    assert set(lines) == {"linear probe", *ADAPTED}
    for label, line in lines.items():
        rows = [r["accuracy"] for r in record["rows"] if r["method"] == label]
        assert len(rows) == line["seeds"] == 3
        assert line["accuracy"] == pytest.approx(sum(rows) / 3)
    assert all(lines[label]["accuracy"] > lines["linear probe"]["accuracy"] for label in ADAPTED)
    card = (ROOT / "model_cards" / "vit-micro.md").read_text()
    assert (ROOT / "benchmarks" / "results" / "learning.md").read_text() in card


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not os.environ.get("ZOO_SLOW"), reason="trains five models for some ten minutes; set ZOO_SLOW=1")
@pytest.mark.skipif(
    not DATA.is_dir(), reason="the CIFAR-10 pack is not here; name its folder's parent in ZOO_TEST_DATA"
)
def test_every_method_beats_the_probe() -> None:
    """2,000 training images of CIFAR-10, its 10,000 test images, a seed that the table does not have."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.learning import train_one

    epochs = json.loads(RESULTS.read_text())["epochs"]
    accuracy = {label: train_one(label, str(DATA), 7, epochs)[1]["accuracy"] for label in ("linear probe", *ADAPTED)}
    assert all(accuracy[label] > accuracy["linear probe"] for label in ADAPTED), accuracy
