"""A comparison as tables and as a picture: accuracy against parameters, kept bytes and step time."""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.bench.study import Protocol, Study
from zoo.disk import write_file
from zoo.errors import SaveError
from zoo.regimes.report import style

__all__ = [
    "COLUMNS",
    "broken_off",
    "cells",
    "groups",
    "lacking",
    "left_out",
    "lost",
    "markdown",
    "mean_and_deviation",
    "means",
    "picture",
    "read",
    "tables",
    "write",
]

PICTURED = {
    "trained": "trained parameters, without the head",
    "saved_ratio": "kept for backward / full fine-tuning",
    "step_ratio": "step time / full fine-tuning",
}
COLUMNS = ("method", "setting", "trained", "lr", "test accuracy, %", "kept / full", "step / full")
COLOURS = {
    "additive": "#1f6feb",
    "selective": "#bf8700",
    "reparametrised": "#1a7f37",
    "hybrid": "#d1242f",
    "system": "#8250df",
}


def mean_and_deviation(values: Sequence[float], digits: int = 1) -> str:
    """ "12.3 ± 0.4"; the deviation is that of a sample, and of one value there is none."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def cells(line: dict[str, Any]) -> tuple[str, ...]:
    """A line as texts, in the order of `COLUMNS`."""
    setting = ", ".join(f"{k}={v}" for k, v in line["settings"].items())
    return (
        line["label"],
        setting or line["note"],
        f"{line['trained']:,}",
        f"{line['lr']:.2g}",
        f"{mean_and_deviation([100 * a for a in line['accuracy']])}{_partly(line)}",
        *("-" if line[key] is None else f"{line[key]:.2f}" for key in ("saved_ratio", "step_ratio")),
    )


def _partly(line: dict[str, Any]) -> str:
    """Behind a mean over less than all seeds."""
    lacking = len(line.get("missing_seeds", ()))
    return f" ({len(line['accuracy'])} of {len(line['accuracy']) + lacking} seeds)" if lacking else ""


def groups(study: Study) -> dict[tuple[str, int | None], list[dict[str, Any]]]:
    """(data, budget) -> its lines, the most accurate first; those at their own size (budget None) stand in every group."""
    found: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
    for line in study.lines:
        if line["budget"] is not None:
            found.setdefault((line["data"], line["budget"]), []).append(line)
    for line in study.lines:
        if line["budget"] is None:
            places = [key for key in found if key[0] == line["data"]] or [(line["data"], None)]
            for key in places:
                found.setdefault(key, []).append(line)
    return {k: sorted(v, key=lambda x: -statistics.mean(x["accuracy"])) for k, v in found.items()}


def means(study: Study) -> list[tuple[str, int, list[float], float]]:
    """(label, budget, accuracy in % on each data set, their mean) of what has them all with all seeds, the best first."""
    names = list(dict.fromkeys(line["data"] for line in study.lines))
    table: dict[tuple[str, int], dict[str, float]] = {}
    for (data, budget), lines in groups(study).items():
        for line in (x for x in lines if not x.get("missing_seeds")):
            table.setdefault((line["label"], budget or 0), {})[data] = 100 * statistics.mean(line["accuracy"])
    whole = [(m, b, [row[n] for n in names]) for (m, b), row in table.items() if len(row) == len(names)]
    return sorted(((m, b, v, statistics.mean(v)) for m, b, v in whole), key=lambda x: (x[1], -x[3]))


def markdown(study: Study) -> str:
    """Everything as Markdown: tables, what is left out, what the numbers are."""
    p, text = study.protocol, tables(study)
    if study.left_out:
        text += ["## Not compared", ""]
        text += [*(f"- {line}" for line in left_out(study)), ""]
    if study.missing:
        text += ["## Not finished", "", *(f"- {line}" for line in lacking(study)), ""]
    if study.failed:
        text += ["## Broken off", ""]
        text += [*(f"- {line}" for line in broken_off(study)), ""]
    text += [
        f"Accuracy: mean and standard deviation over the seeds {', '.join(map(str, p.seeds))}, the weights of the last of "
        f"{p.steps} steps of {p.batch_size} items. The learning rate is the best of {p.rates} on validation items, each tried "
        f"for {p.search_steps} steps. trained: parameters without the head. kept, step: bytes kept for backward and time of a "
        f"training step, by those of full fine-tuning, measured in turns (median of {p.rounds} rounds).",
        "",
        f"Revision {', '.join(study.revisions)}.",
        "",
    ]
    return "\n".join(text)


def left_out(study: Study, mark: str = "") -> list[str]:
    """What is not compared, and why; `mark` stands around the names."""
    return [f"{mark}{label}{mark} at {budget:,}: {why}" for (budget, label), why in study.left_out.items()]


def broken_off(study: Study, mark: str = "") -> list[str]:
    """What broke off, with the last line of why."""
    return [f"{mark}{f['method']}{mark} on {f['data']}: {f['error'].strip().splitlines()[-1]}" for f in study.failed]


def lacking(study: Study) -> list[str]:
    """What is not finished, a text for each method on each data set at each budget."""
    found = []
    for one in study.missing:
        at = f" at {one['budget']:,}" if one["budget"] else ""
        seeds = f"seed{'s' if len(one['seeds']) > 1 else ''} {', '.join(map(str, one['seeds']))}"
        found.append(
            f"{one['method']} on {one['data']}{at}: {'the search of learning rates, ' if one['search'] else ''}{seeds}"
        )
    return found


def lost(before: Study, now: Study) -> list[str]:
    """What a comparison showed before and does not show now, or over fewer seeds."""

    def runs(study: Study) -> dict[tuple[str, int | None, str], int]:
        return {(line["data"], line["budget"], line["label"]): len(line["accuracy"]) for line in study.lines}

    found, after = [], runs(now)
    for (data, budget, label), count in runs(before).items():
        left = after.get((data, budget, label), 0)
        if left < count:
            at = f" at {budget:,}" if budget else ""
            found.append(f"{label} on {data}{at}" + (f" (seeds: {left} instead of {count})" if left else ""))
    return found


def tables(study: Study) -> list[str]:
    """The lines of a table for each data set and budget, and of one of the means over the data sets."""
    text: list[str] = []
    for (data, budget), lines in groups(study).items():
        at = f", {budget:,} parameters" if budget else ""
        text += [f"## {study.backbone} on {data}{at}", "", _row(COLUMNS), _row(["---"] * len(COLUMNS))]
        text += [_row(cells(line)) for line in lines] + [""]
    names = list(dict.fromkeys(line["data"] for line in study.lines))
    if len(names) > 1:
        text += [
            "## Mean over the data sets",
            "",
            _row(["method", "budget", *names, "mean"]),
            _row(["---"] * (len(names) + 3)),
        ]
        text += [_row([m, f"{b:,}", *(f"{v:.1f}" for v in vs), f"{mean:.1f}"]) for m, b, vs, mean in means(study)] + [
            ""
        ]
    return text


def _row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def picture(study: Study) -> bytes:
    """A row of pictures for each data set, as PNG: accuracy against parameters, kept bytes and step time."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state
    from matplotlib.lines import Line2D

    from zoo import registry

    names = list(dict.fromkeys(line["data"] for line in study.lines))
    figure = Figure(figsize=(16, 5.6 * len(names)), dpi=100, layout="constrained")
    axes = figure.subplots(len(names), 3, sharey="row", squeeze=False)
    for row, name in zip(axes, names):
        lines = [line for line in study.lines if line["data"] == name and line["step_ratio"] is not None]
        for axis, (key, label) in zip(row, PICTURED.items()):
            places = []
            for line in lines:
                values = [100 * a for a in line["accuracy"]]
                x, y = line[key], statistics.mean(values)
                colour = COLOURS.get(registry.adapter_class(line["name"]).taxonomy, "#6e7781")
                bar = statistics.stdev(values) if len(values) > 1 else 0.0
                axis.errorbar(x, y, yerr=bar, fmt="o", markersize=5, color=colour, elinewidth=0.7, alpha=0.9)
                places.append((x, y, line["label"], colour))
            style(axis, label)
            axis.margins(0.1, 0.06)
            if key == "trained" and max((x for x, *_ in places), default=0) > 4 * min(
                (x for x, *_ in places), default=1
            ):
                axis.set_xscale("symlog", linthresh=1000)
                axis.set_xlim(-100, 2 * max(x for x, *_ in places))
            _annotate(axis, places)
        row[0].set_ylabel(f"{name}: test accuracy, %")
    used = sorted({registry.adapter_class(line["name"]).taxonomy for line in study.lines})
    marks = [Line2D([], [], marker="o", ls="", color=COLOURS.get(t, "#6e7781"), label=t) for t in used]
    figure.legend(handles=marks, loc="outside upper center", ncols=max(1, len(marks)), frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


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


def write(study: Study, out: Path) -> None:
    """`comparison.md`, `comparison.json` and `comparison.png`, beside the rows."""
    document = {
        "backbone": study.backbone,
        "protocol": vars(study.protocol),
        "lines": study.lines,
        "left_out": [{"budget": b, "method": m, "why": w} for (b, m), w in study.left_out.items()],
        "failed": study.failed,
        "missing": study.missing,
        "revisions": study.revisions,
    }
    write_file(out / "comparison.md", markdown(study).encode())
    write_file(out / "comparison.json", (json.dumps(document, indent=1) + "\n").encode())
    if study.lines:
        write_file(out / "comparison.png", picture(study))


def read(file: Path) -> Study:
    """A comparison from its `comparison.json`.

    Raises:
        SaveError: it is none.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        protocol = Protocol(**{**found["protocol"], "seeds": tuple(found["protocol"]["seeds"])})
        left_out = {(x["budget"], x["method"]): x["why"] for x in found["left_out"]}
        return Study(
            found["backbone"],
            protocol,
            found["lines"],
            left_out,
            found["failed"],
            found.get("missing", []),  # an older one had none
            found["revisions"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SaveError(f"{file} is no comparison of zoo bench compare ({error!r}).") from error
