"""What pruning leaves: `vit-micro` (trained on CIFAR-100) tuned on 2,000 images of CIFAR-10, as a whole, and pruned on the way.

    python benchmarks/pruned.py --data <folder with cifar10/> --seeds 3

LoRA on the whole network; Light-PEFT (its defaults: a third of heads and neurons go, 3/4 of the modules, half of the ranks);
DSEE with 20 %, 50 % and 70 % of the entries of all projections at zero. All see the training images equally often, with one
learning rate, that of LoRA in `learning.py`; nothing is chosen, and the last epoch counts. Measured on all 10,000 test images;
operations and images/s (one core, float32, merged where that can be) as a part of the whole network's. Writes
`results/pruned.json` and `.md`.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.data import open_dataset
from zoo.errors import MergeError

EPOCHS, ESTIMATE, BATCH, RATE = 6, 1, 32, 5e-3
RESULTS = Path(__file__).parent / "results"


def lora(model: zoo.Model, train: Any, fit: dict[str, Any], seed: int) -> Any:
    model.add_adapter(zoo.adapter("lora", rank=8, alpha=16.0, targets="all-linear", dropout=0.05))
    zoo.fit(model, train, epochs=EPOCHS, batch_size=BATCH, lr=RATE, seed=seed, **fit)
    return model, {}


def light_peft(model: zoo.Model, train: Any, fit: dict[str, Any], seed: int) -> Any:
    steps = ESTIMATE * -(-len(train) // BATCH)
    report = zoo.run(
        model, "light-peft", train, fit=fit, seed=seed, steps=steps, epochs=EPOCHS - ESTIMATE, lr=RATE, batch_size=BATCH
    )
    return report.model, report.summary


def dsee(share: float) -> Callable[..., Any]:
    def run(model: zoo.Model, train: Any, fit: dict[str, Any], seed: int) -> Any:
        half = {"epochs": EPOCHS // 2, "retune_epochs": EPOCHS // 2, "lr": RATE, "batch_size": BATCH}
        report = zoo.run(model, "dsee", train, fit=fit, seed=seed, sparsity=share, others=share, **half)
        return report.model, report.summary

    return run


METHODS: dict[str, Callable[..., Any]] = {
    "LoRA, whole": lora,
    "Light-PEFT": light_peft,
    "DSEE, 20 %": dsee(0.2),
    "DSEE, 50 %": dsee(0.5),
    "DSEE, 70 %": dsee(0.7),
}


@torch.no_grad()
def speed(model: zoo.Model) -> tuple[int, float]:
    """Operations of one image, and images/s of one core, the median of 5."""
    try:
        net: Any = model.merge()
    except MergeError:
        net = copy.deepcopy(model)
    net.eval()
    images = torch.randn(64, 3, *model.image_size)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        net(images[:1])
    times = []
    for _ in range(6):
        began = time.perf_counter()
        net(images)
        times.append(time.perf_counter() - began)
    return int(counter.get_total_flops()), 64 / statistics.median(times[1:])


def one(label: str, data: str, seed: int) -> dict[str, Any]:
    """One run of a method."""
    model = zoo.load("vit-micro", num_classes=10, seed=seed)
    train, test = open_dataset(data, split="train", shots=200, seed=seed), open_dataset(data, split="test")
    model.classes = train.classes
    began = time.perf_counter()
    made, summary = METHODS[label](model, train, {"progress": False}, seed)
    seconds = time.perf_counter() - began
    accuracy = zoo.evaluate(made, test, batch_size=250, progress=False)["accuracy"]
    operations, rate = speed(made)
    backbone = sum(p.numel() for p in made.backbone.parameters())
    return {
        "method": label,
        "seed": seed,
        "accuracy": accuracy,
        "backbone": backbone,
        "nonzero": summary.get("nonzero", backbone),
        "trained": made.num_parameters(trainable=True, head=False),
        "operations": operations,
        "images_per_second": rate,
        "seconds": seconds,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Means over the seeds, as Markdown."""
    lines = [
        "| | accuracy, % | parameters of the backbone | not zero | trained | operations | images/s |",
        "| --- " * 7 + "|",
    ]
    whole = [r for r in rows if r["method"] == next(iter(METHODS))]
    for label in METHODS:
        mine = [r for r in rows if r["method"] == label]
        if not mine:
            continue
        values = [100 * r["accuracy"] for r in mine]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        mean = {
            k: statistics.mean(r[k] for r in mine)
            for k in ("backbone", "nonzero", "trained", "operations", "images_per_second")
        }
        parts = [mean[k] / statistics.mean(r[k] for r in whole) for k in ("operations", "images_per_second")]
        lines.append(
            f"| {label} | {statistics.mean(values):.2f} ± {spread:.2f} | {mean['backbone']:,.0f} | {mean['nonzero']:,.0f} | "
            f"{mean['trained']:,.0f} | {parts[0]:.2f} x | {parts[1]:.2f} x |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    file = RESULTS / "pruned.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    for seed in range(args.seeds):
        for label in METHODS:
            if any(r["method"] == label and r["seed"] == seed for r in rows):
                continue
            rows.append(one(label, f"{args.data}/cifar10", seed))
            print(rows[-1], flush=True)
            zoo.disk.write_file(file, json.dumps(rows, indent=1).encode())
            zoo.disk.write_file(file.with_suffix(".md"), table(rows).encode())
    print(table(rows))


if __name__ == "__main__":
    main()
