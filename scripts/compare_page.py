"""docs/comparison.md and its pictures, from the comparisons in benchmarks/results/comparison/.

    python scripts/compare_page.py                          # the page anew from what is there
    python scripts/compare_page.py vit-cifar10=<out> ...    # first take over comparisons of zoo bench compare, by these names

Of each comparison its rows (`<name>.rows.jsonl`) and its numbers (`<name>.json`) are kept.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import statistics
from pathlib import Path
from typing import Any

from zoo.bench.picture import picture
from zoo.bench.report import broken_off, left_out, means, read, tables
from zoo.bench.study import Study
from zoo.disk import write_file
from zoo.sources import embedded_adapters

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "comparison"
PICTURES = ROOT / "docs" / "images"
PAGE = ROOT / "docs" / "comparison.md"
NOTES = {
    "ast-micro-sounds": "`ast-micro` was trained on the digits of FSDD: `fsdd` is no new task for it, and only `esc10` says how "
    "methods adapt.",
    "vit-micro-ranks": "LoRA beside methods that choose, grow, cut or nest their ranks; *trained* is the count at the end. "
    "`adalora` begins with 124,632 numbers, `diffora` keeps the projections that 60 steps of search choose, which came out "
    "smaller than the budget, and `dylora` is tested at its full rank, of the four it was trained for. `svfit` and `vera` have "
    "no size that would come near and stand with their own. All but `dylora`, 2.8 below LoRA with the widest spread (3.2), are "
    "within LoRA's own deviation of it.",
}
PLAIN = {"spt": "lora:targets=all-linear", "spt:form=adapter": "adapter:form=adaptformer"}  # beside what each is shown

INTRODUCTION = """# Comparison

Methods side by side at one budget of trained parameters (without the head), on small data sets and small backbones,
three seeds each. This page is made by `scripts/compare_page.py` from the rows in `benchmarks/results/comparison/`;
each row names its settings, seed, commit and versions. The numbers tell how methods behave on these small networks
over few steps, not how they rank at full size.

What is equal for all: training items, steps, batch, head and its learning rate, schedule, and a search over equally
many learning rates on items set aside from the training data. Each method is made as large as the budget allows; `spt`
decides on the data, and of its choices the one closest to the budget is taken, which with a single seed may be up to a
fifth above (*trained* is the mean over seeds). What cannot meet the budget is named with the reason. Test items are
read once for each seed, after the last step. *kept* is the number of bytes kept for the backward pass and *step* the
time of a training step, both by full fine-tuning's of the same backbone; time was measured in turns with full
fine-tuning on a machine that did other work beside, so it is good to about a tenth. A table holds the methods whose
runs were finished when it was made; the command above it with `--methods all`
adds the others, each with its own trainings only.
"""


def section(name: str, study: Study) -> list[str]:
    """One comparison: how to repeat it, its tables, its picture, what was left out."""
    p = study.protocol
    data = list(dict.fromkeys(line["data"] for line in study.lines))
    budgets = sorted({line["budget"] for line in study.lines if line["budget"]})
    labels = list(dict.fromkeys(line["label"] for line in study.lines if line["budget"]))
    also = list(dict.fromkeys(line["label"] for line in study.lines if not line["budget"]))
    words = ["zoo", "bench", "compare", "--backbone", study.backbone, "--data", ",".join(data)]
    words += ["--methods", ",".join(labels), "--budget", ",".join(map(str, budgets))]
    words += ["--also", ",".join(also)] if also else []
    words += ["--steps", str(p.steps), "--search-steps", str(p.search_steps), "-b", str(p.batch_size)]
    words += ["--rates", str(p.rates), "--seeds", ",".join(map(str, p.seeds)), "--rounds", str(p.rounds)]
    words += ["--shots", str(p.shots)] if p.shots else []
    words += ["--test-items", str(p.test_items)] if p.test_items else []
    items = "all" if p.shots is None else f"at most {p.shots}"
    tested = "all" if p.test_items is None else f"at most {p.test_items:,}"
    rates = "each method at its own default learning rate"
    if p.rates > 1:
        rates = f"{p.rates} learning rates tried for {p.search_steps} steps each"
    text = [
        f"## {study.backbone}: {', '.join(data)}",
        "",
        f"{p.steps} steps of {p.batch_size} items, {items} training items of every class, {tested} test items; "
        f"{rates}; seeds {', '.join(map(str, p.seeds))}.",
        "",
        "```console",
        f"$ {shlex.join(words)}",
        "```",
        "",
        f"![accuracy against parameters, kept bytes and step time](images/comparison-{name}.png)",
        "",
    ]
    text += [NOTES[name], ""] if name in NOTES else []
    text += ["#" + line if line.startswith("## ") else line for line in tables(study)]
    text += heads(study) + plain(study)
    if study.left_out:
        text += ["Not compared:", ""]
        text += [*(f"- {line}" for line in left_out(study, "`")), ""]
    if study.failed:
        text += ["Broke off:", ""]
        text += [*(f"- {line}" for line in broken_off(study, "`")), ""]
    return text


def heads(study: Study) -> list[str]:
    """Whose head is of another size than the others' of the same data set."""
    text = []
    for data in dict.fromkeys(line["data"] for line in study.lines):
        sizes = {line["label"]: line["head"] for line in study.lines if line["data"] == data}
        usual = statistics.mode(sizes.values())
        other = [f"`{label}` {size:,}" for label, size in sizes.items() if size != usual]
        if other:
            text += [
                f"The head on {data} has {usual:,} parameters, which are not counted; that of {', '.join(other)}.",
                "",
            ]
    return text


def shipped() -> list[str]:
    """The trained adapters that come along, with the accuracy that their cards state."""
    text = ["## Adapters that come along", ""]
    text += [
        "`zoo.load(adapter=<name>)` loads one with its backbone, offline. Accuracy is that of the fp16 weights. How they were",
        "trained is in their cards (`model_cards/`).",
        "",
        _row(["name", "data", "training items", "test items", "test accuracy, %"]),
        _row(["---"] * 5),
    ]
    others = []
    for name, folder in sorted(embedded_adapters().items()):
        record = json.loads((folder / "metrics.json").read_text())
        data, found = record["data"], record["metrics"]["test"]
        line = [f"`{name}`", data["name"], f"{data['train']:,}", f"{data['test']:,}"]
        if "accuracy" in found:
            text.append(_row([*line, f"{100 * found['accuracy']:.1f}"]))
        else:
            others.append(_row([*line, ", ".join(f"{key} {value:.4f}" for key, value in found.items())]))
    if others:
        text += [
            "",
            _row(["name", "data", "training items", "test items", "on the test items"]),
            _row(["---"] * 5),
            *others,
        ]
    return [*text, ""]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def plain(study: Study) -> list[str]:
    """SPT beside the plain method that its modules are, on average over the data sets."""
    found = {(label, budget): mean for label, budget, _, mean in means(study)}
    data = list(dict.fromkeys(line["data"] for line in study.lines))
    text: list[str] = []
    for (label, budget), mean in found.items():
        other = found.get((PLAIN.get(label, ""), budget))
        if other is None:
            continue
        spread = _spread(study, label, budget, data)
        verdict = f"{abs(mean - other):.1f} points {'above' if mean > other else 'below'}"
        text += [
            f"`{label}` has {mean:.1f} % on average over {', '.join(data)}, `{PLAIN[label]}` {other:.1f} %: at this budget "
            f"SPT is {verdict} the plain method here; the standard deviation of SPT's mean over the seeds is {spread:.1f}.",
            "",
        ]
    return text


def _spread(study: Study, label: str, budget: int, data: list[str]) -> float:
    lines: list[dict[str, Any]] = [
        line for line in study.lines if line["label"] == label and line["budget"] == budget and line["data"] in data
    ]
    by_seed = [100 * statistics.mean(values) for values in zip(*(line["accuracy"] for line in lines), strict=True)]
    return statistics.stdev(by_seed) if len(by_seed) > 1 else 0.0


def studies() -> dict[str, Study]:
    """The comparisons that are kept, by name."""
    return {file.stem: read(file) for file in sorted(RESULTS.glob("*.json"))}


def page() -> str:
    """The text of the page."""
    text = [INTRODUCTION]
    for name, study in studies().items():
        text += section(name, study)
    return "\n".join([*text, *shipped()]).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparisons", nargs="*", help="name=<out of zoo bench compare>")
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for word in args.comparisons:
        name, _, out = word.partition("=")
        shutil.copy(Path(out) / "comparison.json", RESULTS / f"{name}.json")
        shutil.copy(Path(out) / "rows.jsonl", RESULTS / f"{name}.rows.jsonl")
    for name, study in studies().items():
        write_file(PICTURES / f"comparison-{name}.png", picture(study))
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
