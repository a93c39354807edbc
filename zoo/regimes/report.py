"""What a regime's run was and did: its phases, what was measured, a table and a picture."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from zoo.disk import write_file
from zoo.train.report import finite, save_layers

__all__ = ["RunReport"]

LINE, SECOND, EDGE = "#1f6feb", "#8a8f98", "#d0d4d9"


class Procedure(Protocol):
    """A regime as its report sees it."""

    @property
    def name(self) -> str:
        """Its registered name."""

    def config(self) -> dict[str, Any]:
        """Its settings."""

    def table(self, report: RunReport) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows of the result's table."""

    def draw(self, figure: Any, report: RunReport) -> None:
        """The result's picture."""


@dataclass
class RunReport:
    """The result of `zoo.run`.

    Attributes:
        regime: the regime, with its settings.
        phases: one dict for each phase: "name", and the numbers of its fit: "epochs", "steps", "seconds", "parameters",
            "metrics", "history", "layers" (as `zoo.train.Report`).
        values: what `run.evaluate` and `run.once` gave, by name.
        summary: what the regime says about all of it.
        seconds: over all resumed parts.
        out: where report.json, report.md and report.png are.
        model: what the regime made: the given model, or another one where the regime changed the backbone.
    """

    regime: Procedure
    phases: list[dict[str, Any]]
    values: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    out: str | None = None
    model: Any = field(default=None, repr=False, compare=False)

    def to_json(self) -> str:
        """Everything as JSON."""
        parts = {"regime": self.regime.name, "settings": self.regime.config(), "summary": self.summary}
        whole = {**parts, "phases": self.phases, "values": self.values, "seconds": self.seconds}
        return json.dumps(finite(whole), indent=2, default=str, allow_nan=False)

    def table(self) -> str:
        """The regime's table, as Markdown."""
        columns, rows = self.regime.table(self)
        lines = [columns, ["---"] * len(columns), *rows]
        return "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines)

    def picture(self) -> bytes:
        """The regime's picture, as PNG bytes."""
        from matplotlib.figure import Figure  # without pyplot: no window system, no global state

        figure = Figure(figsize=(9.2, 3.6), layout="constrained")
        self.regime.draw(figure, self)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=144)
        return buffer.getvalue()

    def save(self, folder: str | Path) -> Path:
        """Write `report.json`, `report.md`, `report.png` and `layers.png` (if a method said something); returns the folder."""
        folder = Path(folder)
        write_file(folder / "report.json", self.to_json().encode())
        write_file(folder / "report.md", f"# {self.regime.name}\n\n{self.table()}\n".encode())
        write_file(folder / "report.png", self.picture())
        found = [(phase["name"], entry) for phase in self.phases for entry in phase.get("layers", ())]
        labels = [f"{entry['epoch']}, {name}" for name, entry in found]
        save_layers(folder, [entry for _, entry in found], labels)
        self.out = str(folder)
        return folder

    # -- what a regime shows if it says nothing else ----------------------------------------------------------------

    def phase_table(self) -> tuple[list[str], list[list[Any]]]:
        """One row for each phase, with the numbers of its chosen epoch."""
        names = list(dict.fromkeys(n for phase in self.phases for n in phase["metrics"]))
        columns = ["phase", "trained", "epochs", "steps", "s", *(n.replace("_", " ") for n in names)]
        rows = [
            [p["name"], p["parameters"], len(p["history"]), p["steps"], round(p["seconds"], 1)]
            + [p["metrics"].get(n, "") for n in names]
            for p in self.phases
        ]
        return columns, rows

    def draw_phases(self, figure: Any) -> None:
        """Loss and accuracy over the epochs of all phases."""
        keys = [
            k for k in ("loss", "accuracy") if any(k in h or f"val_{k}" in h for p in self.phases for h in p["history"])
        ]
        for place, key in enumerate(keys):
            axes, factor, start = figure.add_subplot(1, len(keys), place + 1), 100.0 if key == "accuracy" else 1.0, 0
            for number, phase in enumerate(self.phases):
                epochs = [start + h["epoch"] for h in phase["history"]]
                for name, colour, label in ((key, SECOND, "training"), (f"val_{key}", LINE, "validation")):
                    points = [(e, factor * h[name]) for e, h in zip(epochs, phase["history"], strict=True) if name in h]
                    if points:
                        first = label if not number else None
                        axes.plot(*zip(*points, strict=True), color=colour, lw=1.8, marker="o", ms=3.5, label=first)
                start += len(epochs)
                if number + 1 < len(self.phases):
                    axes.axvline(start + 0.5, color=EDGE, lw=0.8)
            axes.set_xlabel("epoch", fontsize=9)
            style(axes, "accuracy, %" if key == "accuracy" else key)
            axes.legend(fontsize=8, frameon=False)

    def __str__(self) -> str:
        numbers = ", ".join(f"{k} {v:.4f}" for k, v in self.summary.items() if isinstance(v, float))
        steps = sum(p["steps"] for p in self.phases)
        return f"{self.regime.name}: {len(self.phases)} phases, {steps} steps, {self.seconds:.0f} s; {numbers}"


def style(axes: Any, title: str) -> None:
    """The look of all pictures."""
    axes.set_title(title, loc="left", fontsize=10)
    axes.tick_params(labelsize=8)
    axes.margins(y=0.12)
    axes.grid(axis="y", color="#e3e5e8", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _cell(value: Any) -> str:
    text = f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    return text.replace("|", "\\|")
