"""Puzzle: networks of three quarters and of half the time, of vit-micro's own parts.

    python benchmarks/puzzle.py /data/cifar100

The parent is `vit-micro` with its own head of CIFAR-100. Children, scores and the imitation see 2,000 images of its training
data without their labels; accuracy is that on 2,000 test images, which nothing is chosen on. One library of each seed serves
both budgets. Beside the networks stand the same choice without imitation, and the rule of thumb: the same share of neurons in
every MLP, the most important ones, at no fewer operations than the network of half the time, imitated for as long. Times are
of 16 images in one thread, by the thread's own clock. Writes results/puzzle.json and puzzle.md; what is in the file is not
run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import zoo
from zoo.data import few_shot
from zoo.model.children import baked, places, substitute
from zoo.puzzle.costs import totals
from zoo.puzzle.imitate import Imitate
from zoo.puzzle.library import Batches, orders
from zoo.tasks import Classify

RESULTS = Path(__file__).parent / "results"
FILE = RESULTS / "puzzle.json"
BUDGETS = (0.5, 0.75)
COMMON: dict[str, Any] = {"batch_size": 16, "local_steps": 40, "scored": 256, "calibration": 8, "repeats": 20}
IMITATION: dict[str, Any] = {"epochs": 2, "lr": 2e-4, "batch_size": 16}
FIT: dict[str, Any] = {"progress": False, "augment": "none"}


def shares(model: zoo.Model, parent: zoo.Model) -> dict[str, float]:
    """Time, parameters and operations as shares of the parent's, and images a second as a ratio, both measured now."""
    images = parent.example_batch(16)
    whole, own = (totals(each, images, 30) for each in (parent, model))
    found = {name: own[name] / whole[name] for name in ("runtime", "parameters", "operations")}
    return {**found, "speed": whole["runtime"] / own["runtime"]}


def accuracy(model: zoo.Model, test: Any) -> float:
    return float(zoo.evaluate(model, test, record="", progress=False)["accuracy"])


def even(parent: zoo.Model, data: Any, operations: float, seed: int) -> zoo.Model:
    """The same number of neurons in every MLP, the fewest with at least this share of the operations; imitated."""
    images = parent.example_batch(1)
    whole = totals(parent, images, 1)["operations"]
    mlps = [name for name in places(parent) if name.endswith(".mlp")]
    batches = Batches(parent, data, Classify(), 16, seed, parent.device, 0)
    order = orders(parent, mlps, batches.first(8 * 16))
    for count in range(16, 769, 16):
        small = substitute(parent, dict.fromkeys(mlps, count), order=order)
        if totals(small, images, 1)["operations"] >= operations * whole:
            break
    small.add_adapter("full")
    zoo.fit(small, data, task=Imitate(parent, Classify()), seed=seed, **IMITATION, **FIT)
    return baked(small)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cifar100", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = json.loads(FILE.read_text())["rows"] if FILE.exists() else []
    parent = zoo.load("vit-micro")
    train, test = (zoo.open_dataset(args.cifar100, split=split) for split in ("train", "test"))
    test = few_shot(test, 20)

    def row(way: str, seed: int, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        found = next((r for r in rows if (r["way"], r["seed"]) == (way, seed)), None)
        if found is None:
            found = {"way": way, "seed": seed, **make()}
            rows.append(found)
            RESULTS.mkdir(exist_ok=True)
            FILE.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))
            print(found, flush=True)
            write(rows)
        return found

    row("parent", 0, lambda: {"accuracy": accuracy(parent, test)})
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            data = few_shot(train, 20, seed)
            first = Path(folder) / f"library-{seed}"

            def network(budget: float, imitated: bool, seed: int = seed, data: Any = data, first: Path = first) -> Any:
                out = Path(folder) / f"{seed}-{budget}-{imitated}"
                more = {} if not first.exists() else {"library": str(first)}
                place = out if more else first
                epochs = IMITATION if imitated else {**IMITATION, "epochs": 0}
                report = zoo.run(
                    parent, "puzzle", data, out=place, runtime=budget, seed=seed, fit=FIT, **COMMON | epochs | more
                )
                model = zoo.load(place / "backbone", place / "head")
                added = report.summary["added_up"]["runtime"]
                chosen = report.summary["chosen"]
                return {"accuracy": accuracy(model, test), **shares(model, parent), "added_up": added, "chosen": chosen}

            for budget in BUDGETS:
                bare = row(f"{budget} of the time, not imitated", seed, lambda b=budget: network(b, False))
                row(f"{budget} of the time", seed, lambda b=budget: network(b, True))
                if budget == BUDGETS[0]:
                    share = bare["operations"]
                    row(
                        "even MLPs at as many operations",
                        seed,
                        lambda d=data, s=share, k=seed: (
                            lambda m: {"accuracy": accuracy(m, test), **shares(m, parent)}
                        )(even(parent, d, s, k)),
                    )


def write(rows: list[dict[str, Any]]) -> None:
    """The table, means over seeds with the spread of accuracy."""
    lines = ["# Puzzle on vit-micro", "", __doc__.split("\n\n", 2)[2].strip(), ""]
    lines += [
        "| network | seeds | accuracy, % | of the parent's time | added up | operations | parameters | speed |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for way in dict.fromkeys(r["way"] for r in rows):
        group = [r for r in rows if r["way"] == way]
        scores = [100 * r["accuracy"] for r in group]
        spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""

        def mean(name: str, group: list[dict[str, Any]] = group) -> str:
            return f"{statistics.mean(r[name] for r in group):.2f}" if name in group[0] else ""

        cells = [mean(name) for name in ("runtime", "added_up", "operations", "parameters", "speed")]
        lines.append(f"| {way} | {len(group)} | {statistics.mean(scores):.1f}{spread} | " + " | ".join(cells) + " |")
    lines += ["", "What was chosen with the first seed:", ""]
    for r in rows:
        if r["seed"] == rows[0]["seed"] and "chosen" in r and "not imitated" not in r["way"]:
            lines.append(
                f"- {r['way']}: " + ", ".join(f"{n.removeprefix('blocks.')} {f}" for n, f in r["chosen"].items())
            )
    (RESULTS / "puzzle.md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
