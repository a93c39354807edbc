"""The report of `against_peft`: a table on the terminal, a JSON file and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measure import Row


def show(rows: Sequence[Row], title: str) -> None:
    """One line for each number, with its target and whether it is reached."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name, justify in (
        ("group", "left"),
        ("what", "left"),
        ("value", "right"),
        ("fastest", "right"),
        ("target", "right"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("reached")
    last = ""
    for row in rows:
        if last and row.group != last:
            table.add_section()
        reached = {None: "", True: "[green]yes", False: "[red]no"}[row.passed]
        target = "" if row.target is None else f"<= {row.target:g}"
        fastest = "" if row.fastest is None else number(row, row.fastest)
        table.add_row(
            "" if row.group == last else row.group, row.what, number(row, row.value), fastest, target, reached
        )
        last = row.group
    console = Console()
    console.width = max(console.width, 130)
    console.print(table)


def number(row: Row, value: float) -> str:
    """With the digits that mean something."""
    if row.unit == "":
        return f"{value:.0f}"
    return f"{value:.1f} ms" if row.unit == "ms" else f"{value:.2f} s" if row.unit == "s" else f"{value:.3f}"


def write(rows: Sequence[Row], about: dict[str, Any], folder: Path, name: str) -> None:
    """`<name>.json` and `<name>.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {**about, "rows": [row.as_dict() for row in rows]}
    (folder / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
    draw(rows, folder / f"{name}.png", about)


def draw(rows: Sequence[Row], path: Path, about: dict[str, Any]) -> None:
    """Left: step time against saved bytes, both by full fine-tuning. Right: every ratio that has a target, and the target."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 6), dpi=130, width_ratios=(1, 1.1))
    ends = " / full"
    steps = {r.what.removesuffix(ends): r.value for r in rows if r.group == "step time" and r.what.endswith(ends)}
    saved = {r.what.removesuffix(ends): r.value for r in rows if r.group == "saved bytes" and r.what.endswith(ends)}
    left.plot([1], [1], "s", color="black")
    left.annotate("full", (1, 1), (6, 5), textcoords="offset points")
    highest = max([1.0, *steps.values()]) * 1.1
    last = highest
    for name in sorted(steps.keys() & saved.keys(), key=lambda n: -steps[n]):
        colour = "#d62728" if "peft" in name else "#1f77b4" if "zoo" in name else "grey"
        left.plot([saved[name]], [steps[name]], "o", color=colour)
        last = min(steps[name] + 0.01, last - 0.035 * highest)  # labels stand below each other
        left.annotate(
            name,
            (saved[name], steps[name]),
            (saved[name] + 0.02, last),
            fontsize=8,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.5},
        )
    left.set(xlabel="saved for backward / full", ylabel="step time / full", xlim=(0, 1.3), ylim=(0, highest))
    left.set_title(f"{about['backbone']}, batch {about['batch']}: red peft, blue zoo", fontsize=10)
    left.grid(alpha=0.3)

    judged = [r for r in rows if r.target is not None and r.unit == "x"][::-1]
    for at, row in enumerate(judged):
        right.barh(at, row.value, color="#1f77b4" if row.passed else "#ff7f0e", height=0.6)
        right.plot([row.target, row.target], [at - 0.4, at + 0.4], color="black", lw=2)
        right.annotate(f"{row.value:.3f}", (0, at), (4, -3), textcoords="offset points", fontsize=7, color="white")
    right.set_yticks(range(len(judged)), [f"{r.group}: {r.what}" for r in judged], fontsize=7)
    right.set_title("ratios and their targets (black: at most); orange: not reached", fontsize=10)
    right.grid(alpha=0.3, axis="x")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
