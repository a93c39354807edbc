"""What regimes of many sessions measure: accuracy matrices, forgetting, their table and picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from zoo.data.dataset import ImageDataset
from zoo.errors import DataError
from zoo.regimes.report import LINE, style

if TYPE_CHECKING:
    from zoo.regimes.work import Run

__all__ = ["accuracies", "check_sessions", "draw_matrix", "forgetting", "matrix_table"]


def check_sessions(regime: str, run: Run) -> None:
    """Raise DataError unless data and test are lists of sessions of the same classes, new ones in each session."""
    sessions, tests = run.data, run.test
    for what, given in (("data", sessions), ("test", tests)):
        if (
            not isinstance(given, list)
            or not given
            or not all(isinstance(s, ImageDataset) and s.classes for s in given)
        ):
            raise DataError(
                f"{regime}: {what}= is a list of data sets with known classes, one for each session: zoo.data.by_class(data, 5) "
                "cuts one into five."
            )
    if [s.classes for s in sessions] != [s.classes for s in tests]:
        raise DataError(
            f"{regime}: the test sessions must have the classes of the training sessions, in the same order."
        )
    seen: set[str] = set()
    for number, session in enumerate(sessions):
        if double := seen.intersection(session.classes):
            raise DataError(
                f"{regime}: session {number} has the class '{min(double)}', which an earlier one had; the head cannot grow by it."
            )
        seen |= set(session.classes)


def accuracies(run: Run, kind: str = "") -> tuple[list[list[float]], list[float]]:
    """The matrix of what was measured as "session s after t" + kind, and the accuracy over all classes seen after each session.

    Where nothing of this kind was measured, what was measured without one stands.
    """
    values, count = run.values, len(run.data)
    sizes = [len(t) for t in run.test]
    names = [[f"session {past} after {now}" for past in range(now + 1)] for now in range(count)]
    matrix = [[(values.get(name + kind) or values[name])["accuracy"] for name in row] for row in names]
    seen = [sum(a * n for a, n in zip(row, sizes, strict=False)) / sum(sizes[: len(row)]) for row in matrix]
    return matrix, seen


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
