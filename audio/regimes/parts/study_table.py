"""The table and the picture of a study: methods by budgets, data sets by shots."""

from __future__ import annotations

import statistics
from typing import Any

from zoo.regimes.report import style

__all__ = ["draw_study", "order", "study_table"]

COLOURS = ("#6e7781", "#d1242f", "#1f6feb", "#1a7f37", "#bf8700", "#8250df", "#24292f", "#e377c2", "#17becf", "#9a6700")
Rows = list[dict[str, Any]]


def order(rows: Rows) -> list[str]:
    """The methods by their mean accuracy over everything that was measured, best first."""
    methods = dict.fromkeys(r["method"] for r in rows)
    means = {m: statistics.mean(r["accuracy"] for r in rows if r["method"] == m) for m in methods}
    return sorted(means, key=lambda m: -means[m])


def study_table(summary: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: trained parameters (without the head), their share of the backbone, accuracies in percent."""
    rows: Rows = summary["rows"]
    places = list(dict.fromkeys((r["data"], r["shots"]) for r in rows))
    budgets = len({r["budget"] for r in rows}) > 1
    columns = ["method", *(["budget"] if budgets else []), "trained", "%"]
    columns += [f"{data}, {_shots(shots)}" for data, shots in places]
    columns += ["mean"] if len(places) > 1 else []
    lines: list[list[Any]] = []
    for method, budget in dict.fromkeys((r["method"], r["budget"]) for r in rows):
        mine = [r for r in rows if (r["method"], r["budget"]) == (method, budget)]
        line: list[Any] = [method, *([budget or "paper"] if budgets else []), mine[0]["trained"]]
        line.append(f"{100 * mine[0]['trained'] / summary['backbone']:.2f}")
        by_place = {(r["data"], r["shots"]): r for r in mine}
        line += [_cell(by_place.get(place)) for place in places]
        if len(places) > 1:
            line.append(f"{100 * statistics.mean(r['accuracy'] for r in mine):.1f}")
        lines.append(line)
    return columns, lines


def _shots(shots: int) -> str:
    return f"{shots} shot{'s' if shots > 1 else ''}" if shots else "all"


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    spread = "" if row["deviation"] is None else f" ± {100 * row['deviation']:.1f}"
    return f"{100 * row['accuracy']:.1f}{spread}"


def draw_study(figure: Any, summary: dict[str, Any]) -> None:
    """Left: accuracy against trained parameters with the most shots; right: by shots where there are several, else by data."""
    rows: Rows = summary["rows"]
    methods = list(dict.fromkeys(r["method"] for r in rows))
    colour = {m: COLOURS[i % len(COLOURS)] for i, m in enumerate(methods)}
    marker = {m: "os^DvP"[i % 6] for i, m in enumerate(methods)}
    shots = sorted({r["shots"] for r in rows}, key=lambda n: n or 1 << 30)
    figure.set_size_inches(10.5, 4.6)
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    for method in methods:
        points = []
        for budget in dict.fromkeys(r["budget"] for r in rows if r["method"] == method):
            mine = [r for r in rows if (r["method"], r["budget"], r["shots"]) == (method, budget, shots[-1])]
            points.append((mine[0]["trained"], 100 * statistics.mean(r["accuracy"] for r in mine)))
        left.plot(
            *zip(*sorted(points), strict=True), color=colour[method], marker=marker[method], ms=6, lw=1.2, label=method
        )
    left.set_xscale("log")
    left.set_xlabel("trained parameters without the head", fontsize=9)
    style(left, f"mean accuracy, %, {_shots(shots[-1])}")
    places = shots if len(shots) > 1 else list(dict.fromkeys(r["data"] for r in rows))
    key = "shots" if len(shots) > 1 else "data"
    for method in methods:
        first = next(r["budget"] for r in rows if r["method"] == method)
        heights = []
        for place in places:
            mine = [r for r in rows if (r["method"], r["budget"], r[key]) == (method, first, place)]
            heights.append(100 * statistics.mean(r["accuracy"] for r in mine))
        line = 1.2 if key == "shots" else 0  # data sets have no order
        right.plot(range(len(places)), heights, color=colour[method], marker=marker[method], ms=6, lw=line)
    right.set_xticks(range(len(places)), [str(p) if p else "all" for p in places])
    right.set_xlabel("sounds of each class" if key == "shots" else "", fontsize=9)
    style(right, "mean accuracy, %, by shots" if key == "shots" else "accuracy, %, by data set")
    figure.legend(loc="outside right center", fontsize=7.5, frameon=False)
