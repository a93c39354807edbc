"""Do adapters learn on every family? Small members of the zoo adapted to real data, beside the linear probe of the same backbone.

    python benchmarks/families.py --data <folder with fsdd/, esc10/ and cifar10/> --tasks digits speakers sounds objects

| task     | backbone   | training                                     | test                     |
| -------- | ---------- | -------------------------------------------- | ------------------------ |
| digits   | ast-micro  | FSDD, 20 clips of each digit                 | FSDD's 300 test clips    |
| speakers | ast-micro  | FSDD, 50 clips of each of the 6 speakers     | the same                 |
| sounds   | ast-micro  | ESC-10, folds 1 to 3: 240 clips, 2.6 s heard | fold 4: 80 clips         |
| objects  | clip-micro | CIFAR-10, 200 images of each class           | CIFAR-10's 10,000 images |

ast-micro was trained on the digits of FSDD, so what its frozen features can say of them is near the best already; the other tasks
are new to it. Every method has the same data, epochs, schedule and learning rate of the head; the last epoch counts. Zero-shot
classification, where there is a text tower, has no training at all. Writes `results/families.json`, `.md` and `.png`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import zoo
from zoo.disk import write_file

RESULTS = Path(__file__).parent / "results"
HEAD_RATE = 1e-2
METHODS: dict[str, tuple[str, dict[str, Any], float]] = {  # method, settings, learning rate of the adapter
    "linear probe": ("linear", {}, 1e-2),
    "LoRA": ("lora", {"rank": 8, "targets": ("q", "v", "up", "down")}, 5e-3),
    "AdaptFormer": ("adapter", {"form": "adaptformer", "rank": 32}, 5e-3),
}


@dataclass(frozen=True)
class Setting:
    """A backbone, its data and how long it is trained."""

    backbone: str
    classes: int
    data: Callable[[Path, str, int], Any]  # folder, "train" or "test", seed -> data set
    epochs: int
    options: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 32


def _fsdd(column: str, number: int) -> Callable[[Path, str, int], Any]:
    def data(folder: Path, split: str, seed: int) -> Any:
        from audio.data.sounds import open_audio

        shots = number if split == "train" else None
        return open_audio(folder / "fsdd", split=split, label_column=column, shots=shots, seed=seed)

    return data


def _esc10(folder: Path, split: str, seed: int) -> Any:
    from audio.data.sounds import open_audio

    return open_audio(folder / "esc10", only={"fold": [1, 2, 3] if split == "train" else 4})


def _cifar10(folder: Path, split: str, seed: int) -> Any:
    return zoo.open_dataset(str(folder / "cifar10"), split=split, shots=200 if split == "train" else None, seed=seed)


SETTINGS = {
    "digits": Setting("ast-micro", 10, _fsdd("digit", 20), 12),
    "speakers": Setting("ast-micro", 6, _fsdd("speaker", 50), 12),
    "sounds": Setting("ast-micro", 10, _esc10, 15, {"max_length": 256}, 16),
    "objects": Setting("clip-micro", 10, _cifar10, 6),
}


def train_one(task: str, label: str, data: Path, seed: int, epochs: int | None = None) -> dict[str, Any]:
    """Fit one method with one seed."""
    setting, (method, settings, rate) = SETTINGS[task], METHODS[label]
    model = zoo.load(
        setting.backbone, zoo.adapter(method, **settings), num_classes=setting.classes, seed=seed, **setting.options
    )
    train, test = (setting.data(data, split, seed) for split in ("train", "test"))
    # for few tokens on a CPU, the fused product's backward takes longer than the plain ones
    with nullcontext() if torch.cuda.is_available() else sdpa_kernel(SDPBackend.MATH):
        report = zoo.fit(
            model,
            train,
            epochs=epochs or setting.epochs,
            batch_size=setting.batch_size,
            lr={"default": rate, "head": HEAD_RATE},
            precision="bf16",
            seed=seed,
            progress=False,
        )
        found = zoo.evaluate(model, test, batch_size=100, precision="bf16", progress=False)
    return {
        "task": task,
        "method": label,
        "seed": seed,
        "accuracy": found["accuracy"],
        "items": len(test),
        "parameters": model.num_parameters(trainable=True),
        "seconds": round(report.seconds, 1),
    }


def zero_shot(task: str, data: Path) -> dict[str, Any]:
    """Accuracy by the names of the classes alone."""
    from multimodal.tasks.zero_shot import put_zero_shot_classifier

    setting = SETTINGS[task]
    test = setting.data(data, "test", 0)
    model = zoo.load(setting.backbone)
    templates = ("a photo of a {}.", "a small photo of a {}.", "a blurry picture of the {}.", "a picture of one {}.")
    put_zero_shot_classifier(model, test.classes, templates)
    found = zoo.evaluate(model, test, batch_size=100, precision="bf16", progress=False)
    return {
        "task": task,
        "method": "zero-shot",
        "seed": 0,
        "accuracy": found["accuracy"],
        "items": len(test),
        "parameters": 0,
        "seconds": 0.0,
    }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line for each task and method: mean and standard deviation over the seeds."""
    lines = []
    order = [(t, m) for t in SETTINGS for m in ("zero-shot", *METHODS)]
    for task, label in order:
        mine = [r for r in rows if (r["task"], r["method"]) == (task, label)]
        if not mine:
            continue
        values = [r["accuracy"] for r in mine]
        lines.append(
            {
                "task": task,
                "backbone": SETTINGS[task].backbone,
                "method": label,
                "accuracy": statistics.mean(values),
                "deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
                "seeds": len(values),
                "parameters": mine[0]["parameters"],
            }
        )
    return lines


def markdown(lines: list[dict[str, Any]]) -> str:
    """A table; one task's lines go into the card of its backbone."""
    text = ["| task | backbone | method | test accuracy, % | seeds | trained parameters |", "| --- " * 6 + "|"]
    for x in lines:
        accuracy = f"{100 * x['accuracy']:.1f}" + (f" ± {100 * x['deviation']:.1f}" if x["seeds"] > 1 else "")
        place = f"| {x['task']} | {x['backbone']} | {x['method']} |"
        text.append(f"{place} {accuracy} | {x['seeds']} | {x['parameters']:,} |")
    return "\n".join(text) + "\n"


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """One panel for each task: accuracy of each method, with the deviation over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"zero-shot": "#8c959f", "linear probe": "#6e7781", "LoRA": "#8250df", "AdaptFormer": "#d1242f"}
    tasks = list(dict.fromkeys(x["task"] for x in lines))
    figure, axes = plt.subplots(1, len(tasks), figsize=(3.1 * len(tasks), 3.6), layout="constrained", squeeze=False)
    for axis, task in zip(axes[0], tasks):
        mine = [x for x in lines if x["task"] == task]
        heights = [100 * x["accuracy"] for x in mine]
        bars = axis.bar(
            [x["method"].replace("linear ", "linear\n") for x in mine],
            heights,
            yerr=[100 * x["deviation"] for x in mine],
            color=[colours[x["method"]] for x in mine],
            capsize=3,
        )
        axis.bar_label(bars, fmt="%.1f", padding=3)
        axis.set_ylim(0, 112)
        axis.set_title(f"{task} ({mine[0]['backbone']})", fontsize=10)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("test accuracy, %")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def finish(rows: list[dict[str, Any]]) -> None:
    """Write the rows, the table and the picture; tasks that were not run now keep their rows."""
    file = RESULTS / "families.json"
    run = {r["task"] for r in rows}
    old = json.loads(file.read_text()) if file.exists() else {"rows": [], "fingerprints": {}}
    rows = [r for r in old["rows"] if r["task"] not in run] + rows
    prints = {SETTINGS[t].backbone for t in {r["task"] for r in rows}}
    fingerprints = {name: zoo.load(name).fingerprint for name in sorted(prints)}
    lines = summary(rows)
    record = {
        "fingerprints": fingerprints,
        "epochs": {t: s.epochs for t, s in SETTINGS.items()},
        "rows": rows,
        "summary": lines,
    }
    write_file(file, (json.dumps(record, indent=1) + "\n").encode())
    write_file(RESULTS / "families.md", markdown(lines).encode())
    draw(lines, RESULTS / "families.png")
    print(markdown(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("ZOO_TEST_DATA", "../shared/data")))
    parser.add_argument("--tasks", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--epochs", type=int, help="instead of those of the setting, to try the script; nothing is written"
    )
    args = parser.parse_args()
    for task in args.tasks:
        rows = [zero_shot(task, args.data)] if SETTINGS[task].backbone == "clip-micro" else []
        for seed in range(args.seeds):
            for label in METHODS:
                rows.append(train_one(task, label, args.data, seed, args.epochs))
                print(json.dumps(rows[-1]), flush=True)
        if args.epochs is None:
            finish(rows)


if __name__ == "__main__":
    main()
