"""Do pre-trained prompts help where examples are few (PVP)? `vit-micro`, one, two and four images of each class.

    python benchmarks/few_shot.py --data <folder with cifar10/, cifar100/> --seeds 3

Stage 1 trains a method once, on `--pre` images of each class of CIFAR-100, the backbone frozen, and its head is thrown away.
Stage 2 trains it, and a new head, on k images of each class of CIFAR-10, whose classes are others, from

- random: the method's own initial values,
- pre-trained: the values of stage 1,
- scale: random values with mean and deviation of each of these tensors,
- shuffled: the values of a stage 1 whose labels were shuffled.

The seed draws the images, the head and the random values. All starts have the same images, steps and learning rate, the last step
counts, and nothing is chosen: the test images are looked at once for each row. Rows are written as they come; a run that was
stopped goes on, and so do runs with further methods, shots or seeds. Writes `results/few_shot.{json,md,png}`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import zoo
from zoo.data import ImageDataset, few_shot, open_dataset, shuffled_labels
from zoo.disk import write_file

METHODS: dict[str, dict[str, Any]] = {
    "vpt": {"num_tokens": 10},
    "lora": {"rank": 4},
}
STARTS = ("random", "pre-trained", "scale", "shuffled")
SHOTS = (1, 2, 4)
RESULTS = Path(__file__).parent / "results"
RATES = {"default": 5e-3, "head": 1e-2}  # of both stages and every start
PLAIN: dict[str, Any] = {"augment": "none", "precision": "bf16", "progress": False}


def load(method: str, classes: int, seed: int, **start: Any) -> zoo.Model:
    model = zoo.load(
        "vit-micro", adapter=zoo.adapter(method, **(METHODS[method] | start)), num_classes=classes, seed=seed
    )
    for block in model.backbone.blocks:  # type: ignore[union-attr]
        block.attn.fused_attn = False  # for 65 tokens on a CPU the fused product's backward takes 1.5 x the plain step
    return model


def first_stage(method: str, source: ImageDataset, seed: int, steps: int, out: Path, shuffled: bool) -> Path:
    """Train on the large set and save; what is there already stays."""
    if not (out / "adapter_config.json").exists():
        model = load(method, len(source.classes or ()), seed)
        data = shuffled_labels(source, seed) if shuffled else source
        zoo.fit(model, data, steps=steps, batch_size=32, lr=RATES, seed=seed, **PLAIN)
        model.save_adapter(out)
    return out


def second_stage(
    method: str, start: str, train: ImageDataset, test: ImageDataset, seed: int, steps: int, folders: Path
) -> float:
    """Accuracy on `test` after training on the few images of `train`."""
    given: dict[str, Any] = {}
    if start != "random":
        given = {"init": folders / ("shuffled" if start == "shuffled" else "pre")}
        given |= {"init_like": "scale"} if start == "scale" else {}
    model = load(method, len(train.classes or ()), seed, **given)
    zoo.fit(model, train, steps=steps, batch_size=min(len(train), 32), lr=RATES, seed=seed, **PLAIN)
    return float(zoo.evaluate(model, test, batch_size=250, record="", precision="bf16", progress=False)["accuracy"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("ZOO_TEST_DATA", "../shared/data")))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--shots", type=int, nargs="*", default=list(SHOTS))
    parser.add_argument("--pre", type=int, default=50, help="images of each class of CIFAR-100 in stage 1")
    parser.add_argument("--pre-steps", type=int, default=120)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--test", type=int, default=500, help="test images, the first of the shuffled split")
    parser.add_argument("--rows", type=Path, default=RESULTS / "few_shot.json", help="file of the rows")
    args = parser.parse_args()
    pool = open_dataset(args.data / "cifar10", split="train")
    test = open_dataset(args.data / "cifar10", split="test")
    test = test.select(np.arange(min(args.test, len(test))))
    settings = {"pre": args.pre, "pre_steps": args.pre_steps, "steps": args.steps, "test": len(test)}
    record: dict[str, Any] = (
        json.loads(args.rows.read_text()) if args.rows.exists() else {"settings": settings, "rows": []}
    )
    if record["settings"] != settings:
        raise SystemExit(f"{args.rows} is of other settings, {record['settings']}; name another file by --rows")
    done = {(r["method"], r["start"], r["shots"], r["seed"]) for r in record["rows"]}
    place = Path(tempfile.gettempdir()) / "zoo-few-shot" / f"{args.pre}-{args.pre_steps}"
    for method in args.methods:
        folders = place / method
        if not all((folders / name / "adapter_config.json").exists() for name in ("pre", "shuffled")):
            source = few_shot(open_dataset(args.data / "cifar100", split="train"), args.pre, seed=0)
            for name in ("pre", "shuffled"):
                first_stage(method, source, 0, args.pre_steps, folders / name, name == "shuffled")
        for k, seed, start in itertools.product(args.shots, range(args.seeds), STARTS):
            if (method, start, k, seed) in done:
                continue
            accuracy = second_stage(method, start, few_shot(pool, k, seed=seed), test, seed, args.steps, folders)
            record["rows"].append({"method": method, "start": start, "shots": k, "seed": seed, "accuracy": accuracy})
            print(json.dumps(record["rows"][-1]), flush=True)
            write_file(args.rows, (json.dumps(record, indent=1) + "\n").encode())
    record["rows"].sort(key=lambda r: (r["method"] != "vpt", r["shots"], STARTS.index(r["start"]), r["seed"]))
    write_file(args.rows, (json.dumps(record, indent=1) + "\n").encode())
    args.rows.with_suffix(".md").write_text(markdown(record["rows"]))
    draw(record["rows"], args.rows.with_suffix(".png"))
    print(markdown(record["rows"]))


def summary(rows: list[dict[str, Any]], method: str, start: str, shots: int) -> tuple[float, float]:
    """Mean and deviation of the accuracy over the seeds, in %; NaN without rows."""
    values = [100 * r["accuracy"] for r in rows if (r["method"], r["start"], r["shots"]) == (method, start, shots)]
    if not values:
        return math.nan, math.nan
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def markdown(rows: list[dict[str, Any]]) -> str:
    """One row for each method and start, one column for each number of images."""
    shots = sorted({r["shots"] for r in rows})
    lines = ["| method | start | " + " | ".join(f"{k} a class" for k in shots) + " |"]
    lines.append("| --- | --- |" + " --- |" * len(shots))
    for method in dict.fromkeys(r["method"] for r in rows):
        for start in STARTS:
            found = [summary(rows, method, start, k) for k in shots]
            cells = [f"{mean:.1f} ± {deviation:.1f}" if mean == mean else "" for mean, deviation in found]
            lines.append(f"| {method} | {start} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against the number of images, one panel for each method."""
    from matplotlib.figure import Figure

    methods, shots = list(dict.fromkeys(r["method"] for r in rows)), sorted({r["shots"] for r in rows})
    colours = dict(zip(STARTS, ("#6e7781", "#1a7f37", "#bf8700", "#d1242f")))
    figure = Figure(figsize=(5 * len(methods), 4), layout="constrained")
    axes = figure.subplots(1, len(methods), sharey=True, squeeze=False)
    for axis, method in zip(axes[0], methods):
        for start in STARTS:
            found = [summary(rows, method, start, k) for k in shots]
            axis.errorbar(
                shots,
                [m for m, _ in found],
                yerr=[s for _, s in found],
                marker="o",
                capsize=3,
                color=colours[start],
                label=start,
            )
        axis.set_xscale("log", base=2)
        axis.set_xticks(shots, [str(k) for k in shots])
        axis.set_xlabel("images of each class")
        axis.set_title(method)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("CIFAR-10 test accuracy, %")
    axes[0][0].legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
