"""What a LoRA keeps as signs (ComPEFT): accuracy and bytes against k, on photographs and on voices, three seeds.

    python benchmarks/compeft.py --data <folder with cifar10/ and fsdd/>

| task     | backbone    | training                             | chosen on                 | test                            |
| -------- | ----------- | ------------------------------------ | ------------------------- | ------------------------------- |
| cifar10  | `vit-micro` | 30 images of each class of CIFAR-10  | 100 other training images | the first 300 test images       |
| speakers | `ast-micro` | 30 clips of each speaker of FSDD     | 100 other training clips  | the first 200 of its test clips |

A LoRA of rank 8 on q, v, up and down is trained together with a head: 129,024 numbers. It is saved with `encoding="compeft"` for
k of 5, 10, 20, 30 and 50 % and alpha of 1, 2, 4, 7 and 10; for each k the alpha with the best accuracy on the data in the fourth
column is taken, and only this one and the authors' default, 1, are measured on the test data. "whole" is the LoRA as it was
trained, "head alone" the same head without it. The seed draws data and initial values; learning rates are those of `learning.py`
and of the study of AST, chosen by none of these results. `ast-micro` heard the same six voices when it was trained on digits.

Bytes are those of places, signs and table in the file. Ratios are to the same numbers in 16 bits, as the paper's; to 32 bits
they are twice as large. The formula is the paper's, of Golomb-Rice codes, once with the share of all tensors together and once
with that of each. "file" is the weights file on the disk, with the head in 32 bits. Rows are written as they come; a run that was
stopped goes on. Writes `results/compeft.{json,md,png}`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import zoo
from audio.data.sounds import open_audio
from zoo.data import ImageDataset, few_shot, open_dataset
from zoo.disk import read, write_file
from zoo.disk.layout import WEIGHTS
from zoo.disk.sizes import sizes

SHARES, ALPHAS = (5, 10, 20, 30, 50), (1.0, 2.0, 4.0, 7.0, 10.0)
PAPER = {5: 47.6, 10: 28.1, 20: 17.4, 30: 13.5, 50: 10.7}  # of 16 bits, by entropy
SIZES = ("numbers", "bytes", "table", "golomb", "by_tensor", "entropy", "half", "file")
RESULTS = Path(__file__).parent / "results"


class TaskOf(NamedTuple):
    """What is trained on which data, `open(folder, "train" or "test")`; how many of the others are chosen on, and tested on."""

    backbone: str
    open: Callable[[Path, str], ImageDataset]
    chosen_on: int
    test: int
    rates: dict[str, float]


TASKS = {
    "cifar10": TaskOf(
        "vit-micro",
        lambda at, part: open_dataset(at / "cifar10", split=part),
        100,
        300,
        {"default": 5e-3, "head": 1e-2},
    ),
    "speakers": TaskOf(
        "ast-micro",
        lambda at, part: open_audio(at / "fsdd", split=part, label_column="speaker"),
        100,
        200,
        {"default": 5e-3, "head": 5e-3},
    ),
}


def accuracy(model: zoo.Model, data: ImageDataset) -> float:
    return float(zoo.evaluate(model, data, batch_size=100, record="", precision="bf16", progress=False)["accuracy"])


def run(name: str, at: Path, seed: int, shots: int, epochs: int) -> list[dict[str, Any]]:
    """The rows of one task and seed."""
    task = TASKS[name]
    pool, test = task.open(at, "train"), task.open(at, "test").select(np.arange(task.test))
    order = np.random.default_rng(seed).permutation(len(pool))
    val = pool.select(np.sort(order[: task.chosen_on]))
    train = few_shot(pool.select(np.sort(order[task.chosen_on :])), shots, seed=seed)
    adapter = zoo.adapter("lora", rank=8, targets=("q", "v", "up", "down"))
    model = zoo.load(task.backbone, adapter, num_classes=len(train.classes or ()), seed=seed)
    settings: dict[str, Any] = {"batch_size": 32, "augment": "none", "precision": "bf16", "progress": False}
    zoo.fit(model, train, epochs=epochs, lr=task.rates, seed=seed, **settings)
    model.eval()
    whole = model.adapter_state("lora")
    about = {"task": name, "seed": seed}
    with model.disable():
        rows: list[dict[str, Any]] = [{**about, "k": 0, "kind": "head alone", "test": accuracy(model, test)}]
    rows.append({**about, "k": 100, "kind": "whole", "test": accuracy(model, test)})
    with tempfile.TemporaryDirectory() as place:
        plain = model.save_adapter(Path(place) / "plain")
        rows[-1]["file"] = (plain / WEIGHTS).stat().st_size
        for k in SHARES:
            found: dict[float, tuple[float, zoo.AdapterState, dict[str, Any]]] = {}
            for alpha in ALPHAS:
                model.set_adapter_state("lora", whole)
                folder = model.save_adapter(Path(place) / f"{k}-{alpha}", encoding="compeft", k=k, alpha=alpha)
                state = zoo.AdapterState({**whole, **read(folder).adapter_tensors("lora")})
                model.set_adapter_state("lora", state)
                size = {**sizes(folder)["lora"], "file": (folder / WEIGHTS).stat().st_size}
                found[alpha] = (accuracy(model, val), state, size)
            best = max(ALPHAS, key=lambda a: found[a][0])
            tested: dict[float, float] = {}
            for kind, alpha in (("chosen", best), ("alpha 1", 1.0)):
                model.set_adapter_state("lora", found[alpha][1])
                if alpha not in tested:
                    tested[alpha] = accuracy(model, test)
                size = {key: found[alpha][2][key] for key in SIZES}
                val_found = {"val": found[alpha][0], "test": tested[alpha]}
                rows.append({**about, "k": k, "kind": kind, "alpha": alpha, **val_found, **size})
                print(json.dumps(rows[-1]), flush=True)
    return rows


def values(rows: list[dict[str, Any]], task: str, k: int, kind: str) -> list[float]:
    """Test accuracies of the seeds, in %."""
    return [100 * r["test"] for r in rows if (r["task"], r["k"], r["kind"]) == (task, k, kind)]


def markdown(rows: list[dict[str, Any]]) -> str:
    """For each task one row for each k: accuracy in % (mean and deviation over the seeds), and bytes."""

    def told(task: str, k: int, kind: str) -> str:
        found = values(rows, task, k, kind)
        return f"{statistics.mean(found):.1f} ± {statistics.stdev(found) if len(found) > 1 else 0:.1f}"

    lines = ["# An adapter of signs", "", (__doc__ or "").split("\n\n", 2)[2].strip(), ""]
    for task in dict.fromkeys(r["task"] for r in rows):
        lines += [
            f"## {task}, {TASKS[task].backbone}",
            "",
            "| k, % | alpha 1 | alpha chosen | chosen alphas | 16 bits / entropy (the paper's) | 16 bits / bytes | bytes, of "
            "these the table | formula | formula, tensor by tensor | file, KiB |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
            f"| head alone | {told(task, 0, 'head alone')} | | | | | | | | |",
        ]
        for k in SHARES:
            own = [r for r in rows if (r["task"], r["k"], r["kind"]) == (task, k, "chosen")]
            alphas = ", ".join(f"{r['alpha']:g}" for r in own)
            mean = {key: statistics.mean(r[key] for r in own) for key in SIZES}
            lines.append(
                f"| {k} | {told(task, k, 'alpha 1')} | {told(task, k, 'chosen')} | {alphas} | "
                f"{mean['half'] / mean['entropy']:.1f} ({PAPER[k]}) | {mean['half'] / mean['bytes']:.1f} | "
                f"{mean['bytes']:,.0f}, {mean['table']:,.0f} | {mean['golomb']:,.0f} | {mean['by_tensor']:,.0f} | "
                f"{mean['file'] / 1024:.1f} |"
            )
        file = statistics.mean(r["file"] for r in rows if (r["task"], r["kind"]) == (task, "whole"))
        lines += [f"| whole, 32 bits | {told(task, 100, 'whole')} | | | | | | | | {file / 1024:.1f} |", ""]
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against the bytes in the file, one panel for each task."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(r["task"] for r in rows))
    figure = Figure(figsize=(5.2 * len(tasks), 3.9), layout="constrained")
    for axis, task in zip(np.atleast_1d(figure.subplots(1, len(tasks))), tasks, strict=True):
        for kind, colour, shift in (("chosen", "#1f6feb", 1.0), ("alpha 1", "#bf8700", 1.03)):
            size = [
                statistics.mean(r["bytes"] for r in rows if (r["task"], r["k"]) == (task, k)) / 1024 for k in SHARES
            ]
            each = [values(rows, task, k, kind) for k in SHARES]
            bars = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in each]
            label = "alpha chosen" if kind == "chosen" else "alpha = 1"
            axis.errorbar(
                [s * shift for s in size],
                [statistics.mean(v) for v in each],
                yerr=bars,
                marker="o",
                capsize=3,
                color=colour,
                label=label,
            )
        for (k, kind), text in {(100, "whole"): "whole", (0, "head alone"): "head alone"}.items():
            level = statistics.mean(values(rows, task, k, kind))
            axis.axhline(level, color="#8c959f", zorder=0, lw=1, linestyle="-" if k else "--")
            axis.annotate(text, (size[-1], level), color="#57606a", va="bottom", ha="right", fontsize=9)
        axis.set_xscale("log")
        axis.set_xticks(size, [f"{s:.1f}\nk = {k}" for s, k in zip(size, SHARES, strict=True)], fontsize=8)
        axis.minorticks_off()
        axis.set_xlabel("KiB of places, signs and table")
        axis.set_ylabel("test accuracy, %")
        axis.set_title(f"{task}, {TASKS[task].backbone}", loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=9, loc=(0.02, 0.78))
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("ZOO_TEST_DATA", "../shared/data")))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shots", type=int, default=30, help="of each class")
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"shots": args.shots, "epochs": args.epochs, "alphas": list(ALPHAS)}
    file = RESULTS / "compeft.json"
    record: dict[str, Any] = {"settings": settings, "rows": []}
    if file.exists():
        record = json.loads(file.read_text())
    if record["settings"] != settings:
        raise SystemExit(f"{file} is of other settings, {record['settings']}; move it away.")
    for seed, task in itertools.product(range(args.seeds), TASKS):
        if not any((r["task"], r["seed"]) == (task, seed) for r in record["rows"]):
            with sdpa_kernel(SDPBackend.MATH):  # of few tokens on a CPU, the fused product's backward takes longer
                record["rows"] += run(task, args.data, seed, args.shots, args.epochs)
            write_file(file, (json.dumps(record, indent=1) + "\n").encode())
    write_file(file.with_suffix(".md"), markdown(record["rows"]).encode())
    draw(record["rows"], file.with_suffix(".png"))
    print(markdown(record["rows"]))


if __name__ == "__main__":
    main()
