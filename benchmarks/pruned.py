"""What pruning leaves: `vit-micro` (trained on CIFAR-100) tuned on a few images of CIFAR-10, as a whole, and pruned on the way.

    python benchmarks/pruned.py --data <folder with cifar10/> --seeds 3

LoRA on the whole network; Light-PEFT (its defaults: a third of heads and neurons go, 3/4 of the modules, half of the ranks);
DSEE with 20 %, 50 % and 70 % of the entries of all projections at zero. All see the training images equally often (`--shots` of
each class, `--epochs` times; Light-PEFT's first phase is one of them, DSEE's two phases are halves), with one learning rate, that
of LoRA in `learning.py`; nothing is chosen, and the last epoch counts. Measured on the first `--test` images of the test split.

Operations of one image, and images/s of one core (float32, merged where that can be) by those of the whole network, with which
the pruned one takes turns: processor time, so that other programs disturb little. A row that is written is not run again, so a
run that was stopped goes on. Writes `results/pruned.json` and `.md`; `pruned_longer` is of 12 epochs.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
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

ESTIMATE, BATCH, RATE = 1, 32, 5e-3
RESULTS = Path(__file__).parent / "results"


def lora(model: zoo.Model, train: Any, fit: dict[str, Any], seed: int, epochs: int) -> Any:
    model.add_adapter(zoo.adapter("lora", rank=8, alpha=16.0, targets="all-linear", dropout=0.05))
    zoo.fit(model, train, epochs=epochs, batch_size=BATCH, lr=RATE, seed=seed, **fit)
    return model, {}


def light_peft(model: zoo.Model, train: Any, fit: dict[str, Any], seed: int, epochs: int) -> Any:
    steps = ESTIMATE * -(-len(train) // BATCH)
    options: dict[str, Any] = {"steps": steps, "epochs": epochs - ESTIMATE, "lr": RATE, "batch_size": BATCH}
    report = zoo.run(model, "light-peft", train, fit=fit, seed=seed, **options)
    return report.model, report.summary


def dsee(share: float) -> Callable[..., Any]:
    def run(model: zoo.Model, train: Any, fit: dict[str, Any], seed: int, epochs: int) -> Any:
        half: dict[str, Any] = {"epochs": epochs // 2, "retune_epochs": epochs // 2, "lr": RATE, "batch_size": BATCH}
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
def speed(model: zoo.Model) -> dict[str, float]:
    """Operations of one image, those of the whole network, and images/s by those of the whole network (medians of 7 turns)."""
    try:
        net: Any = model.merge()
    except MergeError:
        net = copy.deepcopy(model)
    whole = zoo.load("vit-micro", num_classes=model.num_classes)
    images = torch.randn(32, 3, *model.image_size)
    found: dict[str, float] = {}
    for name, one in (("operations", net), ("operations_whole", whole)):
        with FlopCounterMode(display=False) as counter:
            one.eval()(images[:1])
        found[name] = int(counter.get_total_flops())
    turns: list[tuple[float, float]] = []
    for _ in range(8):
        times = []
        for one in (net, whole):
            began = time.process_time()
            one(images)
            times.append(time.process_time() - began)
        turns.append((times[0], times[1]))
    own, other = (statistics.median(column) for column in zip(*turns[1:], strict=True))
    return {**found, "speed": other / own}


def one(label: str, data: str, seed: int, args: Any) -> dict[str, Any]:
    """One run of a method."""
    model = zoo.load("vit-micro", num_classes=10, seed=seed)
    train = open_dataset(data, split="train", shots=args.shots, seed=seed)
    test = open_dataset(data, split="test").select(range(args.test))
    model.classes = train.classes
    began, plain = time.process_time(), {"progress": False, "precision": "bf16", "augment": "none"}
    made, summary = METHODS[label](model, train, plain, seed, args.epochs)
    seconds = time.process_time() - began
    accuracy = zoo.evaluate(made, test, batch_size=100, precision="bf16", progress=False)["accuracy"]
    backbone = sum(p.numel() for p in made.backbone.parameters())
    return {
        "method": label,
        "seed": seed,
        "accuracy": accuracy,
        "backbone": backbone,
        "nonzero": summary.get("nonzero", backbone),
        "trained": made.num_parameters(trainable=True, head=False),
        **speed(made),
        "seconds": round(seconds, 1),  # of the processor
    }


def table(rows: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """Means over the seeds, as Markdown."""
    told = "{shots} images of each class, {epochs} epochs, {test} test images.".format(**settings)
    lines = ["# What pruning leaves", "", (__doc__ or "").split("\n\n", 2)[2].strip(), "", told, ""]
    lines += [
        "| | accuracy, % | each seed | parameters of the backbone | not zero | trained | operations | images/s |",
        "| --- " * 8 + "|",
    ]
    for label in METHODS:
        mine = [r for r in rows if r["method"] == label]
        if not mine:
            continue
        values = [100 * r["accuracy"] for r in mine]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        counted = ("backbone", "nonzero", "trained", "operations", "operations_whole", "speed")
        mean = {k: statistics.mean(r[k] for r in mine) for k in counted}
        each = ", ".join(f"{v:.1f}" for v in values)
        lines.append(
            f"| {label} | {statistics.mean(values):.1f} ± {spread:.1f} | {each} | {mean['backbone']:,.0f} | "
            f"{mean['nonzero']:,.0f} | {mean['trained']:,.0f} | {mean['operations'] / mean['operations_whole']:.2f} x | "
            f"{mean['speed']:.2f} x |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("ZOO_TEST_DATA", "../shared/data")))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--shots", type=int, default=40, help="training images of each class")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--test", type=int, default=500, help="test images, the first of the shuffled split")
    parser.add_argument("--rows", type=Path, default=RESULTS / "pruned.json", help="file of the rows")
    args = parser.parse_args()
    torch.set_num_threads(1)
    file = args.rows
    settings = {"shots": args.shots, "epochs": args.epochs, "test": args.test}
    record: dict[str, Any] = {"settings": settings, "rows": []}
    if file.exists():
        record = json.loads(file.read_text())
    if record["settings"] != settings:
        raise SystemExit(f"{file} is of other settings, {record['settings']}; name another file by --rows.")
    for seed in range(args.seeds):
        for label in args.methods:
            if any((r["method"], r["seed"]) == (label, seed) for r in record["rows"]):
                continue
            with sdpa_kernel(SDPBackend.MATH):  # of 65 tokens on a CPU, the fused product's backward takes longer
                record["rows"].append(one(label, str(args.data / "cifar10"), seed, args))
            print(record["rows"][-1], flush=True)
            zoo.disk.write_file(file, (json.dumps(record, indent=1) + "\n").encode())
            zoo.disk.write_file(file.with_suffix(".md"), table(record["rows"], settings).encode())
    print(table(record["rows"], settings))


if __name__ == "__main__":
    main()
