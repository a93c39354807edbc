"""What regimes of many sessions measure: accuracy matrices, forgetting, their table and picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.regimes.report import LINE, style

__all__ = ["draw_matrix", "forgetting", "matrix_table"]


def forgetting(matrix: Sequence[Sequence[float]]) -> float:
    """Mean over all sessions but the last of (best accuracy it ever had) - (accuracy at the end); 0 for one session.

    `matrix[t][s]` is the accuracy on session s after session t.
    """
    last = len(matrix) - 1
    drops = [max(row[s] for row in matrix[s:last]) - matrix[last][s] for s in range(last)]
    return sum(drops) / len(drops) if drops else 0.0


def matrix_table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """One row for each session: accuracies in % on every session so far, and over all classes seen."""
    count = len(summary["matrix"])
    columns = ["after session", *(f"on {s}" for s in range(count)), "all seen"]
    rows = [
        [str(t), *(f"{100 * a:.1f}" for a in row), *([""] * (count - len(row))), f"{100 * seen:.1f}"]
        for t, (row, seen) in enumerate(zip(summary["matrix"], summary["seen"], strict=True))
    ]
    return columns, rows


def draw_matrix(figure: Any, summary: Mapping[str, Any]) -> None:
    """The accuracy matrix as a picture, and the accuracy over all classes seen, session by session."""
    matrix, seen = summary["matrix"], summary["seen"]
    count = len(matrix)
    axes = figure.add_subplot(1, 2, 1)
    cells = [[100 * row[s] if s < len(row) else float("nan") for s in range(count)] for row in matrix]
    axes.imshow(cells, vmin=0, vmax=100, cmap="Blues", aspect="auto")
    for t, row in enumerate(cells):
        for s in range(t + 1):
            colour = "white" if row[s] > 60 else "black"
            axes.text(s, t, f"{row[s]:.0f}", ha="center", va="center", fontsize=8, color=colour)
    style(axes, f"accuracy, %; forgetting {100 * summary['forgetting']:.1f}")
    axes.grid(visible=False)
    axes.margins(0)
    axes.set_xlabel("on session", fontsize=9)
    axes.set_ylabel("after session", fontsize=9)
    axes.set_xticks(range(count))
    axes.set_yticks(range(count))
    axes = figure.add_subplot(1, 2, 2)
    axes.plot(range(count), [100 * a for a in seen], color=LINE, lw=1.8, marker="o", ms=4)
    for t, value in enumerate(seen):
        axes.annotate(
            f"{100 * value:.1f}", (t, 100 * value), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=8
        )
    axes.set_xlabel("after session", fontsize=9)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(0, 105)
    style(axes, f"accuracy over all classes seen, %; mean {100 * summary['average']:.1f}")
