"""Do embeddings of unseen classes get better? `vit-micro` on nine classes of flowers, measured on the eight others.

    python benchmarks/metric_learning.py --data <folder with flowers17/> --seeds 3

All images are scaled to 32 x 32. The first nine classes are trained on (720 images; 4 of each of 8 classes in a batch), the 640
images of the eight others are measured: recall@k by cosine, and NMI. Every method has the same images, epochs, embedding (128,
behind a LayerNorm) and rates of head and proxies; the rates of the adapters are the methods' own. The last epoch counts, so
nothing is chosen on the measured classes. "frozen" is the backbone's pooled features as they are. Writes
`results/metric_learning.{json,md,png}`; a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import zoo
from zoo.bench.report import mean_and_deviation
from zoo.data import open_dataset
from zoo.disk import write_file

SEEN = 9
METHODS: dict[str, tuple[str | None, dict[str, Any], str]] = {  # adapter, settings, task
    "frozen": (None, {}, "proxy-anchor"),
    "head alone": ("linear", {}, "proxy-anchor"),
    "VPT-deep": ("vpt", {"num_tokens": 10}, "proxy-anchor"),
    "LoRA": ("lora", {"rank": 4}, "proxy-anchor"),
    "VPT-SP's branch": ("vpt-sp", {"num_tokens": 10}, "proxy-anchor"),
    "VPT-SP": ("vpt-sp", {"num_tokens": 10}, "semantic-proxies"),
}
MEASURED = ("recall@1", "recall@2", "recall@4", "recall@8", "nmi")
RESULTS = Path(__file__).parent / "results"


def tensors(data: Path) -> tuple[TensorDataset, TensorDataset]:
    """Images of the seen and of the other classes, as the model takes them."""
    transform = zoo.load("vit-micro", device="meta").family.preprocess(False)
    images: list[Tensor] = []
    labels: list[int] = []
    for split in ("train", "test"):
        dataset = open_dataset(data / "flowers17", split=split, transform=transform)
        for image, label in (dataset[i] for i in range(len(dataset))):
            images.append(image)
            labels.append(int(label))
    x, y = torch.stack(images), torch.tensor(labels)
    seen = y < SEEN
    return TensorDataset(x[seen], y[seen]), TensorDataset(x[~seen], y[~seen] - SEEN)


def train_one(label: str, train: Any, test: Any, seed: int, epochs: int) -> dict[str, Any]:
    """Fit one method with one seed, and measure it on classes that it did not see."""
    method, settings, task = METHODS[label]
    adapter = None if method is None else zoo.adapter(method, **settings)
    model = zoo.load("vit-micro", adapter, num_classes=0, seed=seed)
    for block in model.backbone.blocks:  # type: ignore[union-attr]
        block.attn.fused_attn = False  # for 65 tokens on a CPU the fused product's backward takes 1.5 x the plain step
    row: dict[str, Any] = {"method": label, "seed": seed, "trained": 0}
    if adapter is not None:
        torch.manual_seed(seed)
        model.reset_head(128, kind="embedding")
        rates = {"default": type(adapter).default_lr, "head": 1e-3, "task/*": 1e-2}
        sampler = zoo.train.PerClass(classes=8, each=4)
        options: dict[str, Any] = {"batch_size": 32, "lr": rates, "seed": seed, "sampler": sampler, "progress": False}
        report = zoo.fit(model, train, task=task, epochs=epochs, keep="last", **options)
        row |= {"trained": model.num_parameters(trainable=True), "seconds": report.seconds}
    found = zoo.evaluate(model, test, task="proxy-anchor", metrics=["nmi"], record="", batch_size=320, progress=False)
    return row | {name: found[name] for name in MEASURED}


def markdown(rows: list[dict[str, Any]]) -> str:
    """One line for each method: mean and deviation over the seeds, in %."""
    lines = ["| method | trained, with the head | " + " | ".join(MEASURED) + " |"]
    lines.append("| --- | --- |" + " --- |" * len(MEASURED))
    for label in dict.fromkeys(r["method"] for r in rows):
        mine = [r for r in rows if r["method"] == label]
        cells = [mean_and_deviation([100 * r[name] for r in mine]) for name in MEASURED]
        lines.append(f"| {label} | {mine[0]['trained']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Recall@1 of each method, with every seed."""
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(r["method"] for r in rows))
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axis = figure.subplots()
    for place, label in enumerate(labels):
        values = [100 * r["recall@1"] for r in rows if r["method"] == label]
        axis.plot(values, [place] * len(values), "o", color="#1f6feb", alpha=0.5)
        axis.plot([statistics.mean(values)], [place], "|", color="#d1242f", markersize=18, markeredgewidth=2)
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.set_xlabel("recall@1 on eight unseen classes of flowers, %")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("ZOO_TEST_DATA", "../shared/data")))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--rows", type=Path, default=RESULTS / "metric_learning.json", help="file of the rows")
    args = parser.parse_args()
    record: dict[str, Any] = (
        json.loads(args.rows.read_text()) if args.rows.exists() else {"epochs": args.epochs, "rows": []}
    )
    if record["epochs"] != args.epochs:
        raise SystemExit(f"{args.rows} is of {record['epochs']} epochs; name another file by --rows")
    done = {(r["method"], r["seed"]) for r in record["rows"]}
    train, test = tensors(args.data)
    for seed in range(args.seeds):
        for label in args.methods:
            if (label, seed) in done or (label == "frozen" and seed):  # without random numbers there is one result
                continue
            record["rows"].append(train_one(label, train, test, seed, args.epochs))
            print(json.dumps(record["rows"][-1]), flush=True)
            write_file(args.rows, (json.dumps(record, indent=1) + "\n").encode())
    record["rows"].sort(key=lambda r: (list(METHODS).index(r["method"]), r["seed"]))
    write_file(args.rows, (json.dumps(record, indent=1) + "\n").encode())
    args.rows.with_suffix(".md").write_text(markdown(record["rows"]))
    draw(record["rows"], args.rows.with_suffix(".png"))
    print(markdown(record["rows"]))


if __name__ == "__main__":
    main()
