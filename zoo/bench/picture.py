"""A comparison as a picture: accuracy, parameters, kept bytes and step time."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from typing import Any

from zoo import registry
from zoo.bench.study import Study
from zoo.regimes.report import style

__all__ = ["picture"]

MANY = 16  # methods, from which on names beside points hide each other
PICTURED = {
    "trained": "trained parameters, without the head",
    "saved_ratio": "kept for backward / full fine-tuning",
    "step_ratio": "step time / full fine-tuning",
}
COLOURS = {
    "additive": "#1f6feb",
    "selective": "#bf8700",
    "reparametrised": "#1a7f37",
    "hybrid": "#d1242f",
    "system": "#8250df",
}
OTHER = "#6e7781"

Line = dict[str, Any]


def picture(study: Study) -> bytes:
    """A row of pictures for each data set, as PNG: accuracy against parameters, kept bytes and step time.

    Of many methods each has a line of its own with all four, the most accurate on top.
    """
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state
    from matplotlib.lines import Line2D

    of = {name: [x for x in study.lines if x["data"] == name] for name in dict.fromkeys(x["data"] for x in study.lines)}
    many = max(map(len, of.values()), default=0) > MANY
    heights = [0.2 * len(lines) + 1.2 if many else 5.6 for lines in of.values()]
    figure = Figure(figsize=(16, sum(heights)), dpi=100, layout="constrained")
    axes = figure.subplots(
        len(of), 4 if many else 3, sharey="row", squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for row, (name, lines) in zip(axes, of.items()):
        (_listed if many else _beside)(row, name, lines)
    used = sorted({registry.adapter_class(line["name"]).taxonomy for line in study.lines})
    marks = [Line2D([], [], marker="o", ls="", color=COLOURS.get(t, OTHER), label=t) for t in used]
    figure.legend(handles=marks, loc="outside upper center", ncols=max(1, len(marks)), frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _accuracy(line: Line) -> tuple[float, float]:
    """Mean and deviation, in %."""
    values = [100 * a for a in line["accuracy"]]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _colour(line: Line) -> str:
    return COLOURS.get(registry.adapter_class(line["name"]).taxonomy, OTHER)


def _wide(axis: Any, counts: Sequence[float]) -> None:
    """Numbers of parameters by their size, where they differ by much."""
    if max(counts, default=0) > 4 * min(counts, default=1):
        axis.set_xscale("symlog", linthresh=1000)
        axis.set_xlim(-100, 2 * max(counts))


def _listed(row: Sequence[Any], name: str, lines: list[Line]) -> None:
    """A line for each method, and each number in a picture of its own."""
    lines = sorted(lines, key=lambda line: _accuracy(line)[0])
    for axis, (key, label) in zip(row, {"accuracy": f"{name}: test accuracy, %", **PICTURED}.items()):
        for place, line in enumerate(lines):
            mean, deviation = _accuracy(line)
            value = mean if key == "accuracy" else line[key]
            if value is None:
                continue
            bar = deviation if key == "accuracy" else None
            axis.errorbar(value, place, xerr=bar, fmt="o", markersize=5, color=_colour(line), elinewidth=1.0)
        style(axis, label)
        axis.set_ylim(-0.8, len(lines) - 0.2)
        axis.grid(axis="both", alpha=0.25)
        if key == "trained":
            _wide(axis, [line[key] for line in lines])
    row[0].set_yticks(range(len(lines)), [line["label"] for line in lines], fontsize=8)


def _beside(row: Sequence[Any], name: str, lines: list[Line]) -> None:
    """Accuracy upwards, and names beside the points."""
    lines = [line for line in lines if line["step_ratio"] is not None]
    for axis, (key, label) in zip(row, PICTURED.items()):
        places = []
        for line in lines:
            x, (y, bar), colour = line[key], _accuracy(line), _colour(line)
            axis.errorbar(x, y, yerr=bar, fmt="o", markersize=5, color=colour, elinewidth=0.7, alpha=0.9)
            places.append((x, y, line["label"], colour))
        style(axis, label)
        axis.margins(0.1, 0.06)
        if key == "trained":
            _wide(axis, [x for x, *_ in places])
        _annotate(axis, places)
    row[0].set_ylabel(f"{name}: test accuracy, %")


def _annotate(axis: Any, places: list[tuple[float, float, str, str]]) -> None:
    """Names beside their points, moved up or down where others stand already, with a thin line to the point."""
    axis.figure.canvas.draw()
    taken: list[tuple[float, float, float, float]] = []
    box = axis.get_window_extent()
    for x, y, name, colour in sorted(places, key=lambda p: -p[1]):
        px, py = axis.transData.transform((x, y))
        width, height = 6.0 * len(name) + 4, 11.0
        right = px + 8 + width < box.x1
        left = px + 7 if right else px - 7 - width
        shift = next(
            s
            for s in sorted((n * 6 for n in range(-60, 61)), key=abs)
            if all(left + width < a or left > c or py + s + height < b or py + s > d for a, b, c, d in taken)
        )
        taken.append((left, py + shift, left + width, py + shift + height))
        axis.annotate(
            name,
            (x, y),
            (7 if right else -7, shift),
            textcoords="offset pixels",
            ha="left" if right else "right",
            va="center",
            fontsize=7,
            color=colour,
            arrowprops={"arrowstyle": "-", "lw": 0.3, "color": colour} if abs(shift) > 6 else None,
        )
