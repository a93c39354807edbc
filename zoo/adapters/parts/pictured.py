"""Numbers of every layer as colours: a row for each layer, a column for each moment at which they were looked at."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Panel", "filled", "pictured"]

TALLEST = 24.0  # inches; beyond, not every row has its name


class Panel(NamedTuple):
    """One picture: `rows` by name, with a number (None: there was none) for each of the `columns`; `what` the numbers are."""

    rows: Mapping[str, Sequence[float | None]]
    columns: Sequence[str]
    what: str
    along: str = ""  # what the columns are
    title: str = ""


def filled(mask: Tensor) -> float:
    """The part of a mask that is true."""
    return int(mask.sum()) / max(1, mask.numel())


def pictured(panels: Sequence[Panel]) -> bytes:
    """All panels side by side, as PNG bytes. Whole numbers are coloured from 0, others from the smallest to the largest."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    widths = [max(4.0, 2.6 + 0.16 * len(panel.columns)) for panel in panels]
    height = min(TALLEST, max(2.0, 0.9 + 0.13 * max(len(panel.rows) for panel in panels)))
    figure = Figure(figsize=(sum(widths), height), layout="constrained")
    grid = figure.add_gridspec(1, len(panels), width_ratios=widths)
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(grid[0, number])
        values = [[float("nan") if v is None else float(v) for v in row] for row in panel.rows.values()]
        whole = all(v is None or float(v).is_integer() for row in panel.rows.values() for v in row)
        image = axes.imshow(values, cmap="viridis", aspect="auto", interpolation="nearest", vmin=0 if whole else None)
        names, every = list(panel.rows), max(1, round(0.12 * len(panel.rows) / height))
        axes.set_yticks(range(0, len(names), every), names[::every], fontsize=6)
        shown = range(0, len(panel.columns), max(1, len(panel.columns) // 12))
        axes.set_xticks(shown, [panel.columns[n] for n in shown], fontsize=6, rotation=90)
        axes.set_xlabel(panel.along, fontsize=7)
        axes.set_title(panel.title, loc="left", fontsize=8)
        bar = figure.colorbar(image, ax=axes, pad=0.02)
        bar.set_label(panel.what, fontsize=7)
        bar.ax.tick_params(labelsize=6)
        if whole:
            locator: Any = bar.ax.yaxis.get_major_locator()
            locator.set_params(integer=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144)
    return buffer.getvalue()
