"""The scripts that measure how far the zoo reaches: what they say of a few networks, and that their results are whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


@pytest.mark.parametrize(
    ("name", "dead", "refused"), [("timm resnet10t", 0, 0), ("timm swinv2_tiny", 4, 2), ("transformers SigLIP", 2, 1)]
)
def test_lora_equals_that_of_peft(name: str, dead: int, refused: int) -> None:
    """Outputs and gradients, fewer bytes, and what is dead there is refused here."""
    pytest.importorskip("peft", reason="peft is not installed (pip install peft)")
    from benchmarks import against_peft_reach

    row = against_peft_reach.compare(name)
    assert max(row.outputs, row.gradients) < against_peft_reach.TARGET and row.saved < 1
    assert (row.dead, row.refused) == (dead, refused)


def test_results_are_those_of_ten_networks_and_four_libraries() -> None:
    from benchmarks import against_peft_reach, reach

    rows = json.loads((against_peft_reach.RESULTS / "against_peft_reach.json").read_text())
    assert [r["network"] for r in rows] == list(against_peft_reach.NETWORKS) and len(rows) == 10
    results = json.loads((reach.RESULTS / "reach.json").read_text())["libraries"]
    assert set(results) == set(reach.LIBRARIES)
    timm = reach.summary(results["timm"])
    assert timm["lora"] == timm["total"] > 1500
    assert timm["described"] / timm["total"] >= 0.37
