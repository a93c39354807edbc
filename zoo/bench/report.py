"""A comparison as tables; its picture is `zoo.bench.picture`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.bench.picture import picture
from zoo.bench.study import Protocol, Study
from zoo.disk import write_file
from zoo.errors import SaveError

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
    "read",
    "tables",
    "write",
]

COLUMNS = ("method", "setting", "trained", "lr", "test accuracy, %", "kept / full", "step / full")


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
