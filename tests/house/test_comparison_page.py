"""docs/comparison.md says what the rows say."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "comparison"
NAMES = [file.stem for file in sorted(RESULTS.glob("*.json"))]


def test_the_page_is_that_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python scripts/compare_page.py` after a change of the results, of the adapters that ship or of the script."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import compare_page

    assert compare_page.PAGE.read_text() == compare_page.page()
    sys.modules.pop("compare_page")


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_those_of_the_rows(name: str) -> None:
    """Accuracies in the table against the rows, found anew; rates were chosen on validation items by the search's rows."""
    study = json.loads((RESULTS / f"{name}.json").read_text())
    rows = [json.loads(line) for line in (RESULTS / f"{name}.rows.jsonl").read_text().splitlines()]
    page = (ROOT / "docs" / "comparison.md").read_text()
    assert study["lines"] and (ROOT / "docs" / "images" / f"comparison-{name}.png").stat().st_size > 10_000
    for line in study["lines"]:
        own = [r for r in rows if (r["config"]["data"], r["config"]["settings"]) == (line["data"], line["settings"])]
        own = [r for r in own if r["config"]["method"] == line["name"]]
        found = {
            r["config"]["seed"]: r["result"]
            for r in own
            if r["config"]["kind"] == "run" and r["config"]["lr"] == line["lr"]
        }
        assert [found[seed]["accuracy"] for seed in study["protocol"]["seeds"]] == line["accuracy"], line["label"]
        searched = {r["config"]["lr"]: r["result"] for r in own if r["config"]["kind"] == "search"}
        assert searched[line["lr"]]["accuracy"] == max(t["accuracy"] for t in line["tried"])
        mean = 100 * statistics.mean(line["accuracy"])
        assert any(f"| {line['label']} |" in text and f"| {mean:.1f}" in text for text in page.splitlines()), line[
            "label"
        ]
        assert all(r["revision"] and r["versions"]["torch"] for r in own)
