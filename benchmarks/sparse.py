"""What pruning costs, and what a few trained numbers bring back: `vit-micro` at 50, 70 and 90 % zeros, on CIFAR-10.

    python benchmarks/sparse.py --data <folder with cifar10/> --seeds 3

Every projection of every block of the backbone (trained on CIFAR-100) is pruned; then a head is trained on 50 images of each
class of CIFAR-10, alone or together with what a method trains: one pass over the images, 32 steps. All rows of a seed have the
same images, order, schedule and learning rate of the head, and no augmentation; the last step counts, and nothing is chosen on
the test images. All methods have the rate that was best of three for MaskLoRA at 70 %, on training images outside of those
(`--tune`). "dense" are the same without zeros.

Rows are written as they come; a run that was stopped goes on. Writes `results/sparse.{json,md,png}`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

import zoo
from zoo.data import ImageDataset, few_shot, open_dataset
from zoo.disk import write_file

# label -> method, settings, learning rate; the sparsity is filled in
METHODS: dict[str, tuple[str, dict[str, Any], float]] = {
    "head alone, magnitude": ("linear", {"criterion": "magnitude"}, 1e-2),
    "MaskLoRA": ("perp", {"update": "mask"}, 3e-3),
    "ScaleLoRA": ("perp", {"update": "scale"}, 3e-3),
    "biases and norms": ("perp", {"update": "none"}, 3e-3),
    "head alone, Wanda": ("linear", {"criterion": "wanda"}, 1e-2),
    "head alone, SparseGPT": ("linear", {"criterion": "sparsegpt"}, 1e-2),
    "MaskLoRA, SparseGPT": ("perp", {"update": "mask", "criterion": "sparsegpt"}, 3e-3),
}
DENSE: dict[str, tuple[str, dict[str, Any], float]] = {
    "head alone": ("linear", {}, 1e-2),
    "LoRA": ("lora", {"rank": 16, "alpha": 32.0, "targets": "all-linear"}, 3e-3),
}
SPARSITIES = (0.5, 0.7, 0.9)
HEAD_RATE = 1e-2
RESULTS = Path(__file__).parent / "results"
PLAIN: dict[str, Any] = {"batch_size": 16, "augment": "none", "precision": "bf16", "progress": False}


def build(label: str, sparsity: float, train: ImageDataset, seed: int) -> zoo.Model:
    """The model that is fitted."""
    method, settings, _ = (METHODS if sparsity else DENSE)[label]
    if method == "perp":
        settings = {**settings, "sparsity": sparsity}
    classes = len(train.classes or ())
    if sparsity and method == "linear":  # a head on the pruned network, which stays as it is
        perp = zoo.adapter("perp", sparsity=sparsity, **settings)
        pruned = zoo.load("vit-micro", adapter=perp, num_classes=classes)
        if perp.needs_calibration:
            zoo.calibrate(pruned, train, augment="none", seed=seed, batch_size=32)
        model = zoo.load("vit-micro", adapter="linear", num_classes=classes, seed=seed)
        plain = pruned.merge().state_dict()
        model.backbone.load_state_dict({name: plain[name] for name in model.backbone.state_dict()})
    else:
        model = zoo.load("vit-micro", adapter=zoo.adapter(method, **settings), num_classes=classes, seed=seed)
    for block in model.backbone.blocks:  # type: ignore[union-attr]
        block.attn.fused_attn = False  # for 65 tokens on a CPU the fused product's backward takes 1.5 x the plain step
    return model


def run_one(
    label: str,
    sparsity: float,
    train: ImageDataset,
    test: ImageDataset,
    seed: int,
    epochs: int,
    lr: float | None = None,
) -> dict[str, Any]:
    """Fit one row and test it."""
    method, _, rate = (METHODS if sparsity else DENSE)[label]
    model = build(label, sparsity, train, seed)
    alone = method == "linear"
    rates = {"default": lr or rate, "head": HEAD_RATE}
    report = zoo.fit(
        model, train, epochs=epochs, lr=rates, seed=seed, **({"cache_features": True} if alone else {}), **PLAIN
    )
    accuracy = zoo.evaluate(model, test, batch_size=250, record="", precision="bf16", progress=False)["accuracy"]
    plain = model.merge()
    weights = [plain.get_submodule(p.path).weight for p in model.points.linears("all-linear")]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    return {
        "method": label,
        "sparsity": sparsity,
        "seed": seed,
        "accuracy": accuracy,
        "zeros": round(zeros, 6),  # of the merged network
        "parameters": model.num_parameters(trainable=True, head=False),
        "seconds": round(report.seconds, 1),
    }


def cells(rows: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """Which method was run at which sparsity."""
    return list(dict.fromkeys((r["method"], r["sparsity"]) for r in rows))


def summary(rows: list[dict[str, Any]], label: str, sparsity: float) -> tuple[float, float] | None:
    """Mean and deviation of the accuracy over the seeds, in %."""
    values = [100 * r["accuracy"] for r in rows if (r["method"], r["sparsity"]) == (label, sparsity)]
    if not values:
        return None
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def markdown(rows: list[dict[str, Any]]) -> str:
    """One row for each method, one column for each sparsity."""
    found = sorted({sparsity for _, sparsity in cells(rows)})
    lines = ["| trained | numbers | " + " | ".join(f"{s:.0%} zeros" if s else "dense" for s in found) + " |"]
    lines.append("| --- | --- |" + " --- |" * len(found))
    for label in [*DENSE, *METHODS]:
        means = [summary(rows, label, s) for s in found]
        if any(means):
            count = next(r["parameters"] for r in rows if r["method"] == label)
            texts = [f"{m[0]:.1f} ± {m[1]:.1f}" if m else "" for m in means]
            lines.append(f"| {label} | {count:,} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against sparsity."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axis = figure.subplots()
    colours = ["#6e7781", "#1f6feb", "#8250df", "#bf8700", "#8c959f", "#57606a", "#1a7f37"]
    for (label, (method, _, _)), colour in zip(METHODS.items(), colours):
        points = [(100 * s, *found) for s in SPARSITIES if (found := summary(rows, label, s))]
        if points:
            x, y, bar = zip(*points)
            style = "--" if method == "linear" else "-"
            axis.errorbar(x, y, yerr=bar, marker="o", capsize=3, color=colour, label=label, linestyle=style)
    for label in DENSE:
        if (found := summary(rows, label, 0.0)) is not None:
            axis.axhline(found[0], color="#d0d7de", zorder=0)
            axis.annotate(f"dense, {label}", (90, found[0]), color="#57606a", va="bottom", ha="right", fontsize=9)
    axis.set_xticks([100 * s for s in SPARSITIES])
    axis.set_xlabel("zeros in every projection, %")
    axis.set_ylabel("CIFAR-10 test accuracy, %")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


def tune(pool: ImageDataset, shots: int, epochs: int) -> None:
    """Accuracy at 70 % on training images that seed 100 does not train on, for a few learning rates; printed."""
    train = few_shot(pool, shots, seed=100)
    used = {train.where(i) for i in range(len(train))}
    other = pool.select([i for i in range(4000) if pool.where(i) not in used][:1000])
    for rate in (1e-3, 3e-3, 1e-2):
        row = run_one("MaskLoRA", 0.7, train, other, 100, epochs, rate)
        print(rate, row["accuracy"], row["seconds"], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("ZOO_TEST_DATA", "../shared/data")))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=[*DENSE, *METHODS], help="rows, by their first column")
    parser.add_argument("--sparsities", type=float, nargs="*", default=[0.0, *SPARSITIES], help="0: dense")
    parser.add_argument("--shots", type=int, default=50, help="images of each class")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--test", type=int, default=500, help="test images, the first of the shuffled split")
    parser.add_argument("--rows", type=Path, default=RESULTS / "sparse.json", help="file of the rows")
    parser.add_argument("--tune", action="store_true", help="print accuracies for several learning rates instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pool = open_dataset(args.data / "cifar10", split="train")
    if args.tune:
        tune(pool, args.shots, args.epochs)
        return
    test = open_dataset(args.data / "cifar10", split="test")
    test = test.select(np.arange(min(args.test, len(test))))
    settings = {"shots": args.shots, "epochs": args.epochs, "test": len(test)}
    record: dict[str, Any] = {"settings": settings, "rows": []}
    if args.rows.exists():
        record = json.loads(args.rows.read_text())
    if record["settings"] != settings:
        raise SystemExit(f"{args.rows} is of other settings, {record['settings']}; name another file by --rows")
    done = {(r["method"], r["sparsity"], r["seed"]) for r in record["rows"]}
    wanted = [(label, s) for s in args.sparsities for label in (METHODS if s else DENSE) if label in args.methods]
    for (label, sparsity), seed in itertools.product(wanted, range(args.seeds)):
        if (label, sparsity, seed) not in done:
            row = run_one(label, sparsity, few_shot(pool, args.shots, seed=seed), test, seed, args.epochs)
            record["rows"].append(row)
            print(json.dumps(row), flush=True)
            write_file(args.rows, (json.dumps(record, indent=1) + "\n").encode())
    args.rows.with_suffix(".md").write_text(markdown(record["rows"]))
    draw(record["rows"], args.rows.with_suffix(".png"))
    print(markdown(record["rows"]))


if __name__ == "__main__":
    main()
