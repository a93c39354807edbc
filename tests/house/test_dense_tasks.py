"""What `benchmarks/dense_tasks.py` compares, on a few drawn images: shares, rows and the table, not the numbers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from dense_data import pairs

from vision.data.dense import open_dense

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import dense_tasks


def test_ways_and_table(tmp_path: Path) -> None:
    drawn = pairs(4)
    data: dict[str, Any] = {
        name: open_dense(drawn, kind, derive=derive) for name, (kind, derive) in dense_tasks.TASKS.items()
    }
    rows = [dense_tasks.attempt(way, 0, 1e-3, 1, 32, data, data) for way in dense_tasks.WAYS]
    assert [row["way"] for row in rows] == ["probe", "polyhistor-lite"]
    assert rows[0]["trained"] == 0 and rows[0]["decoders"] == rows[1]["decoders"]
    assert rows[1]["share"] == pytest.approx(rows[1]["trained"] / (3 * 1_489_812)) and rows[1]["share"] < 0.1
    assert {"segment", "edges", "distance"} <= set(rows[1])
    assert "| polyhistor-lite | 1 | 0.001 |" in dense_tasks.table(rows)
    dense_tasks.picture(rows, tmp_path / "ways.png")
    assert (tmp_path / "ways.png").read_bytes().startswith(b"\x89PNG")
