"""Do the methods learn? `vit-micro` (trained on CIFAR-100) adapted to 2,000 images of CIFAR-10, tested on all 10,000.

    python benchmarks/learning.py --data <folder with cifar10/> --seeds 3

Every method has the same images, augmentation, epochs, schedule and learning rate of the head. The learning rates of the
adapters were chosen on training images outside of the 2,000 (`--tune`). The last epoch counts, so nothing is chosen on the
test images. Writes `results/learning.json`, `.md` and `.png`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

import torch

import zoo
from zoo.data import few_shot, open_dataset
from zoo.disk import write_file

METHODS: dict[str, tuple[str, dict[str, Any], float]] = {  # method, settings, learning rate of the adapter
    "linear probe": ("linear", {}, 1e-2),
    "VPT-deep": ("vpt", {"num_tokens": 50}, 2e-2),
    "LoRA": ("lora", {"rank": 8, "targets": ("q", "v", "up", "down")}, 5e-3),
    "AdaptFormer": ("adapter", {"form": "adaptformer", "rank": 32}, 5e-3),
    "SPT": ("spt", {"budget": 0.1}, 5e-3),
}
HEAD_RATE = 1e-2
RESULTS = Path(__file__).parent / "results"


def train_one(
    label: str, data: str, seed: int, epochs: int, shots: int = 200, test: Any = None, lr: float | None = None
) -> tuple[zoo.Model, dict[str, Any]]:
    """Fit one method with one seed; `shots` images of each class."""
    method, settings, rate = METHODS[label]
    model = zoo.load("vit-micro", adapter=zoo.adapter(method, **settings), num_classes=10, seed=seed)
    for block in model.backbone.blocks:  # type: ignore[union-attr]
        block.attn.fused_attn = False  # for 65 tokens on a CPU the fused product's backward takes 1.5 x the plain step
    train = open_dataset(data, split="train", shots=shots, seed=seed)
    model.classes = train.classes
    rates = {"default": lr or rate, "head": HEAD_RATE}
    report = zoo.fit(model, train, epochs=epochs, batch_size=32, lr=rates, precision="bf16", seed=seed, progress=False)
    if test is None:
        test = open_dataset(data, split="test")
    accuracy = zoo.evaluate(model, test, batch_size=250, precision="bf16", progress=False)["accuracy"]
    for block in model.backbone.blocks:  # type: ignore[union-attr]
        block.attn.fused_attn = True
    row = {
        "method": label,
        "seed": seed,
        "accuracy": accuracy,
        "parameters": model.num_parameters(trainable=True),
        "saved_bytes": model.saved_bytes(torch.zeros(32, 3, 32, 32)),
        "seconds": report.seconds,
    }
    model.record |= {
        "task": "image-classification",
        "data": {
            "name": "CIFAR-10",
            "url": "https://www.cs.toronto.edu/~kriz/cifar.html",
            "train": 10 * shots,
            "test": 10000,
        },
        "metrics": {"test": {"accuracy": round(accuracy, 4)}},
        "saved_bytes": row["saved_bytes"],
        "seconds": round(report.seconds, 1),
        "license": "apache-2.0",
    }
    return model, row


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line for each method: mean and standard deviation over the seeds."""
    lines = []
    for label in dict.fromkeys(r["method"] for r in rows):
        mine = [r for r in rows if r["method"] == label]
        values = [r["accuracy"] for r in mine]
        lines.append(
            {
                "method": label,
                "accuracy": statistics.mean(values),
                "deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
                "seeds": len(values),
                "parameters": mine[0]["parameters"],
                "saved_bytes": mine[0]["saved_bytes"],
            }
        )
    return lines


def markdown(lines: list[dict[str, Any]]) -> str:
    """The table of the cards."""
    text = ["| method | test accuracy, % | trained parameters | kept for backward, MiB |", "| --- | --- | --- | --- |"]
    for x in lines:
        accuracy = f"{100 * x['accuracy']:.1f} ± {100 * x['deviation']:.1f}"
        text.append(f"| {x['method']} | {accuracy} | {x['parameters']:,} | {x['saved_bytes'] / 2**20:.1f} |")
    return "\n".join(text) + "\n"


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Accuracy with the deviation over the seeds, against parameters and memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = ["#6e7781", "#1f6feb", "#8250df", "#d1242f", "#bf8700", "#1a7f37"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    scales = (
        (axes[0], "parameters", 1, "trained parameters"),
        (axes[1], "saved_bytes", 2**20, "MiB kept for backward (batch of 32)"),
    )
    for axis, key, unit, label in scales:
        for x, colour in zip(lines, colours):
            place, bar = (x[key] / unit, 100 * x["accuracy"]), 100 * x["deviation"]
            axis.errorbar(*place, yerr=bar, fmt="o", markersize=8, color=colour, capsize=3)
            side = -1 if x["method"] == "VPT-deep" else 1  # neighbours are alike in accuracy
            axis.annotate(
                x["method"],
                (place[0], place[1] + side * bar),
                xytext=(0, 6 * side),
                textcoords="offset points",
                color=colour,
                ha={"AdaptFormer": "right", "LoRA": "left"}.get(x["method"], "center"),
                va="bottom" if side > 0 else "top",
            )
        axis.margins(0.2, 0.15)
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_xscale("log")
    axes[0].set_ylabel("CIFAR-10 test accuracy, %")
    figure.suptitle("vit-micro (CIFAR-100) adapted to 2,000 images of CIFAR-10")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def tune(data: str, epochs: int, methods: list[str]) -> None:
    """Accuracy on training images that seed 100 does not train on, for a few learning rates."""
    whole = open_dataset(data, split="train")
    subset = few_shot(whole, 200, seed=100)
    chosen = {subset.where(i) for i in range(2000)}
    other = [i for i in range(6000) if whole.where(i) not in chosen][:2000]
    for label in methods:
        for rate in (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2):
            _, row = train_one(label, data, 100, epochs, test=whole.select(other), lr=rate)
            print(f"{label:14} {rate:7.0e} {100 * row['accuracy']:.1f} %", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("ZOO_TEST_DATA", "../shared/data")) / "cifar10"
    parser.add_argument("--data", default=str(default), help="folder with train*.parquet and test*.parquet")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--keep", type=Path, help="save the adapters of the first seed below this folder")
    parser.add_argument("--rows", type=Path, nargs="*", help="only join these files of finished rows")
    parser.add_argument(
        "--partial",
        type=Path,
        default=RESULTS / "learning.json",
        help="another file for the rows, as they come; join several with --rows",
    )
    parser.add_argument(
        "--tune", action="store_true", help="try learning rates on 2,000 other training images, and stop"
    )
    args = parser.parse_args()
    if args.tune:
        tune(args.data, args.epochs, args.methods)
        return
    if args.rows:
        finish([row for file in args.rows for row in json.loads(file.read_text())["rows"]], args.epochs)
        return
    test = open_dataset(args.data, split="test")
    rows: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        for label in args.methods:
            model, row = train_one(label, args.data, seed, args.epochs, test=test)
            rows.append(row)
            print(json.dumps(row), flush=True)
            if args.keep is not None and seed == 0:
                model.save_adapter(args.keep / f"vit-micro-{METHODS[label][0]}-cifar10")
            write_file(args.partial, (json.dumps({"epochs": args.epochs, "rows": rows}, indent=1) + "\n").encode())
    if args.partial == RESULTS / "learning.json":
        finish(rows, args.epochs)


def finish(rows: list[dict[str, Any]], epochs: int) -> None:
    """Write the table, the picture and all rows."""
    rows.sort(key=lambda r: (list(METHODS).index(r["method"]), r["seed"]))
    lines = summary(rows)
    (RESULTS / "learning.json").write_text(
        json.dumps(
            {"backbone": zoo.load("vit-micro").fingerprint, "epochs": epochs, "rows": rows, "summary": lines}, indent=1
        )
        + "\n"
    )
    write_file(RESULTS / "learning.md", markdown(lines).encode())
    draw(lines, RESULTS / "learning.png")
    print(markdown(lines))


if __name__ == "__main__":
    main()
