"""What a run of puzzle found, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["draw", "table"]

Scores = Mapping[str, Mapping[str, float]]  # sublayer -> form -> what is lost by it; the parent's own stands first
ROLES = {"attn": "attention", "mlp": "MLP"}


def table(chosen: Mapping[str, str], scores: Scores) -> tuple[list[str], list[list[Any]]]:
    """Columns, and a row for each block: what was chosen, and what it loses alone."""
    rows = []
    for block in dict.fromkeys(name.rpartition(".")[0] for name in scores):
        cells: list[Any] = []
        for role in ROLES:
            lost = scores.get(f"{block}.{role}")
            form = chosen.get(f"{block}.{role}")
            cells += ["", ""] if lost is None or form is None else [_told(form, lost), lost[form]]
        rows.append([block, *cells])
    return ["block", "attention", "lost", "MLP", "lost"], rows


def _told(form: str, lost: Mapping[str, float]) -> str:
    return f"all {form}" if form == next(iter(lost)) else form


def draw(figure: Any, chosen: Mapping[str, str], scores: Scores) -> None:
    """A column for each attention and MLP: forms from the parent's own down, coloured by what is lost, chosen ones framed."""
    from matplotlib.colors import LogNorm

    lost = [v for row in scores.values() for v in row.values() if v > 0]
    norm = LogNorm(min(lost, default=1e-6), max(lost, default=1.0) * 1.0001)
    image = None
    for place, (role, title) in enumerate(ROLES.items()):
        axes = figure.add_subplot(1, 2, place + 1)
        names = [name for name in scores if name.endswith(f".{role}")]
        size = 420 if len(names) <= 12 else 120
        height = max((len(scores[name]) for name in names), default=1)
        for column, name in enumerate(names):
            for row, (form, value) in enumerate(scores[name].items()):
                image = axes.scatter(
                    [column], [row], c=[max(value, norm.vmin or 1e-6)], norm=norm, cmap="viridis_r", marker="s", s=size,
                    edgecolors="#d1242f" if chosen[name] == form else "none", linewidths=1.8,
                )  # fmt: skip
                ink = "black" if value < 3e-2 * (norm.vmax or 1.0) else "white"
                axes.annotate(form, (column, row), fontsize=5, ha="center", va="center", color=ink)
        axes.set_xticks(range(len(names)), [n.rpartition(".")[0] for n in names], rotation=60, fontsize=6, ha="right")
        axes.set_yticks([])
        axes.set_ylim(height - 0.4, -0.6)
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.set_title(f"{title}: forms of each block; chosen ones are framed", loc="left", fontsize=9)
        axes.spines[:].set_visible(False)
    if image is not None:
        bar = figure.colorbar(image, ax=figure.axes, shrink=0.8)
        bar.set_label("lost by it alone", fontsize=8)
        bar.ax.tick_params(labelsize=7)
