"""What pruning costs, and what a few trained numbers bring back: `vit-micro` at 50, 70 and 90 % zeros, on CIFAR-10.

    python benchmarks/sparse.py --data <folder with cifar10/> --seeds 3
    python benchmarks/sparse.py --data <folder with cifar10/> --of updates       # LT-SFT: results/sparse_updates
    python benchmarks/sparse.py --data <folder with fsdd/> --of sounds --test 200 --epochs 2    # ast-micro: results/sparse_ast

Every projection of every block of the backbone (trained on CIFAR-100) is pruned; then a head is trained on 50 images of each
class of CIFAR-10, alone or together with what a method trains: one pass over the images, 32 steps. All rows of a seed have the
same images, order, schedule and learning rate of the head, and no augmentation; the last step counts, and nothing is chosen on
the test images. "dense" are the same without zeros. Which weights go is decided

- before training, by PERP's criteria, with 128 training images where these look at data;
- while training, by PST and DSL. DSL moves 5 % of its weights at first, and looks every fifth step: the 50 % of its paper, for
  networks that begin at random, would drop half of what was pretrained;
- halfway, by DSEE: 16 steps on the dense network, then q and v are pruned by what its change says (its default), or by
  weight and change together, the other projections by magnitude; 16 steps on that.

LT-SFT prunes nothing: what is sparse is its *update* of the dense network, so it stands in a table of its own. Its first phase
is another 32 steps, of everything.

Rates: PERP's, LoRA's and DSEE's are that which was best of three for MaskLoRA at 70 %, PST's and DSL's the best of three for
each at 70 %, on training images outside of those (`--tune <label>`; DSL's is the largest tried). LT-SFT's, as that of full
tuning, was fixed beforehand, and so were those for ast-micro: vit-micro's. ast-micro's head has the rate that was best of three
for the head alone, 0.1, and batches of 8: two passes over 50 clips of each of 6 speakers are 76 steps.

Rows are written as they come; a run that was stopped goes on. Writes `results/<name>.{json,md,png}`, and the
picture of docs/sparse.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import zoo
from zoo.data import few_shot, open_dataset
from zoo.disk import write_file

# label -> method, settings, learning rate; the sparsity is filled in
METHODS: dict[str, tuple[str, dict[str, Any], float]] = {
    "head alone, magnitude": ("linear", {"criterion": "magnitude"}, 1e-2),
    "MaskLoRA": ("perp", {"update": "mask"}, 3e-3),
    "ScaleLoRA": ("perp", {"update": "scale"}, 3e-3),
    "biases and norms": ("perp", {"update": "none"}, 3e-3),
    "head alone, Wanda": ("linear", {"criterion": "wanda"}, 1e-2),
    "MaskLoRA, Wanda": ("perp", {"update": "mask", "criterion": "wanda"}, 3e-3),
    "head alone, SparseGPT": ("linear", {"criterion": "sparsegpt"}, 1e-2),
    "MaskLoRA, SparseGPT": ("perp", {"update": "mask", "criterion": "sparsegpt"}, 3e-3),
    "PST": ("pst", {}, 1e-3),
    "DSEE": ("dsee", {"by": "update"}, 3e-3),
    "DSEE, by weight and change": ("dsee", {"by": "sum"}, 3e-3),
    "DSL": ("dsl", {"interval": 5, "update_ratio": 0.05}, 1e-3),
}
UPDATES: dict[str, tuple[str, dict[str, Any], float]] = {
    "LT-SFT": ("lt-sft", {"full_epochs": 1, "full_lr": 3e-4}, 3e-4),
}
DENSE: dict[str, tuple[str, dict[str, Any], float]] = {
    "head alone": ("linear", {}, 1e-2),
    "LoRA": ("lora", {"rank": 16, "alpha": 32.0, "targets": "all-linear"}, 3e-3),
    "full tuning": ("full", {}, 3e-4),
}
ALL = {**DENSE, **METHODS, **UPDATES}
SOUNDS = ("head alone", "LoRA", "head alone, magnitude", "MaskLoRA", "ScaleLoRA")  # what is measured on ast-micro, too
TRIED = {"head alone": (1e-2, 3e-2, 1e-1), "PST": (3e-4, 1e-3, 3e-3), "DSL": (1e-4, 3e-4, 1e-3)}
SPARSITIES = (0.5, 0.7, 0.9)
RESULTS = Path(__file__).parent / "results"
PLAIN: dict[str, Any] = {"augment": "none", "precision": "bf16", "progress": False}


@dataclass(frozen=True)
class Study:
    """One table: the name of its files, its backbone, its rows, and what is measured."""

    name: str
    backbone: str
    methods: tuple[str, ...]
    accuracy: str
    batch_size: int = 16
    head_rate: float = 1e-2


STUDIES = {
    "zeros": Study("sparse", "vit-micro", (*DENSE, *METHODS), "CIFAR-10 test accuracy, %"),
    "updates": Study("sparse_updates", "vit-micro", (*UPDATES,), "CIFAR-10 test accuracy, %"),
    "sounds": Study("sparse_ast", "ast-micro", SOUNDS, "accuracy on the speakers of FSDD, %", 8, 1e-1),
}


def adapter_of(label: str, sparsity: float) -> Any:
    """The method of a row, unattached."""
    method, settings, _ = ALL[label]
    how: dict[str, dict[str, Any]] = {
        "perp": {"sparsity": sparsity},
        "pst": {"sparsity": sparsity},
        "dsl": {"density": round(1 - sparsity, 6)},
        "lt-sft": {"proportion": round(1 - sparsity, 6)},
    }
    own = {key: value for key, value in settings.items() if key != "by"}  # how DSEE prunes halfway
    return zoo.adapter(method, **own, **how.get(method, {}))


def plainly(model: zoo.Model) -> zoo.Model:
    """For the few tokens of these on a CPU, the fused attention's backward takes 1.5 x the plain step."""
    for module in model.backbone.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]
    return model


def build(label: str, sparsity: float, train: Any, seed: int, backbone: str = "vit-micro") -> zoo.Model:
    """The model that is fitted."""
    method, settings, _ = ALL[label]
    classes = len(train.classes or ())
    if not (sparsity and method == "linear"):
        return plainly(zoo.load(backbone, adapter=adapter_of(label, sparsity), num_classes=classes, seed=seed))
    # a head on the pruned network, which stays as it is
    perp = zoo.adapter("perp", sparsity=sparsity, **settings)
    pruned = zoo.load(backbone, adapter=perp, num_classes=classes)
    if perp.needs_calibration:
        zoo.calibrate(pruned, train, augment="none", seed=seed, batch_size=32)
    model = zoo.load(backbone, adapter="linear", num_classes=classes, seed=seed)
    plain = pruned.merge().state_dict()
    model.backbone.load_state_dict({name: plain[name] for name in model.backbone.state_dict()})
    return plainly(model)


def zeros_of(model: zoo.Model) -> float:
    """The part of the numbers of all projections that is 0 in the network that is used."""
    if "dsee" in model.adapters:  # its backbone is sparse, and its change stays beside it
        weights = [p.weight for p in model.points.linears("all-linear")]
    else:
        plain = model.merge()
        weights = [plain.get_submodule(p.path).weight for p in model.points.linears("all-linear")]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def run_one(
    label: str,
    sparsity: float,
    train: Any,
    test: Any,
    seed: int,
    epochs: int,
    lr: float | None = None,
    study: Study = STUDIES["zeros"],
) -> dict[str, Any]:
    """Fit one row and test it."""
    method, settings, rate = ALL[label]
    model = build(label, sparsity, train, seed, study.backbone)
    head = lr if lr and method == "linear" else study.head_rate
    how: dict[str, Any] = {"lr": {"default": lr or rate, "head": head}, "seed": seed, **PLAIN}
    how["batch_size"] = study.batch_size
    steps = epochs * math.ceil(len(train) / study.batch_size)
    # `plainly` is for timm's networks; those of transformers ask torch
    with sdpa_kernel(SDPBackend.MATH):
        if method == "linear":
            how["cache_features"] = True
        if method == "dsee":
            seconds = zoo.fit(model, train, steps=steps // 2, **how).seconds
            dsee: Any = model.adapters["dsee"]
            model = plainly(zoo.sparsify(model, masks=dsee.masks(model, sparsity, sparsity, settings["by"])))
            seconds += zoo.fit(model, train, steps=steps - steps // 2, **how).seconds
        else:
            seconds = zoo.fit(model, train, epochs=epochs, **how).seconds
        found = zoo.evaluate(model, test, batch_size=250, record="", precision="bf16", progress=False)
    return {
        "method": label,
        "sparsity": sparsity,
        "seed": seed,
        "accuracy": found["accuracy"],
        "zeros": round(zeros_of(model), 6),  # of the merged network
        "parameters": model.num_parameters(trainable=True, head=False),
        "seconds": round(seconds, 1),
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
    what = "of the numbers left" if any(r["method"] in UPDATES for r in rows) else "zeros"
    lines = ["| trained | numbers | " + " | ".join(f"{s:.0%} {what}" if s else "dense" for s in found) + " |"]
    lines.append("| --- | --- |" + " --- |" * len(found))
    for label in ALL:
        means = [summary(rows, label, s) for s in found]
        if any(means):
            counts = sorted({r["parameters"] for r in rows if r["method"] == label})
            count = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[-1]:,} to {counts[0]:,}"
            texts = [f"{m[0]:.1f} ± {m[1]:.1f}" if m else "" for m in means]
            lines.append(f"| {label} | {count} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


COLOURS = [
    "#6e7781",
    "#1f6feb",
    "#8250df",
    "#bf8700",
    "#1a7f37",
    "#1a7f37",
    "#cf222e",
    "#cf222e",
    "#116329",
    "#bc4c00",
    "#e36209",
    "#0550ae",
]


def draw(rows: list[dict[str, Any]], study: Study, path: Path) -> None:
    """Accuracy against sparsity: what is pruned before training at the left, what decides meanwhile at the right."""
    from matplotlib.figure import Figure

    there = [label for label in ALL if label not in DENSE and any(r["method"] == label for r in rows)]
    first = [label for label in there if ALL[label][0] in ("linear", "perp")]
    groups = [first, ["head alone, magnitude", *(label for label in there if label not in first)]]
    groups = groups if len(groups[1]) > 1 else groups[:1]
    figure = Figure(figsize=(6.2 * len(groups) + 1.3, 4.6), layout="constrained")
    for axis, labels in zip(figure.subplots(1, len(groups), sharey=True, squeeze=False)[0], groups):
        for label in labels:
            points = [(100 * s, *found) for s in SPARSITIES if (found := summary(rows, label, s))]
            if points:
                x, y, bar = zip(*points)
                colour = COLOURS[list(METHODS).index(label)]
                style = "--" if ALL[label][0] == "linear" else "-"
                axis.errorbar(x, y, yerr=bar, marker="o", capsize=3, color=colour, label=label, linestyle=style)
        for label in DENSE:
            if (found := summary(rows, label, 0.0)) is not None:
                axis.axhline(found[0], color="#d0d7de", zorder=0)
                axis.annotate(f"dense, {label}", (90, found[0]), color="#57606a", va="bottom", ha="right", fontsize=9)
        axis.set_xticks([100 * s for s in SPARSITIES])
        axis.set_xlabel("zeros in every projection, %")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=9, loc="lower left")
    figure.axes[0].set_ylabel(study.accuracy)
    figure.savefig(path, dpi=120)


def opened(study: Study, data: Path, split: str) -> Any:
    """All items of a split."""
    if study.backbone == "ast-micro":
        from audio.data.sounds import open_audio

        return open_audio(data / "fsdd", split=split, label_column="speaker")
    return open_dataset(data / "cifar10", split=split)


def tune(label: str, pool: Any, shots: int, epochs: int, study: Study) -> None:
    """Accuracy at 70 % on training items that seed 100 does not train on, for a few learning rates; printed."""
    train = few_shot(pool, shots, seed=100)
    used = {train.where(i) for i in range(len(train))}
    other = pool.select([i for i in range(min(4000, len(pool))) if pool.where(i) not in used][:1000])
    for rate in TRIED.get(label, (1e-3, 3e-3, 1e-2)):
        row = run_one(label, 0.0 if label in DENSE else 0.7, train, other, 100, epochs, rate, study)
        print(label, rate, row["accuracy"], row["seconds"], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("ZOO_TEST_DATA", "../shared/data")))
    parser.add_argument("--of", choices=list(STUDIES), default="zeros", help="which table")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", help="rows, by their first column")
    parser.add_argument("--sparsities", type=float, nargs="*", default=[0.0, *SPARSITIES], help="0: dense")
    parser.add_argument("--shots", type=int, default=50, help="items of each class")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--test", type=int, default=500, help="test items, the first of the shuffled split")
    parser.add_argument("--rows", type=Path, help="file of the rows; by default that of the table")
    parser.add_argument("--tune", nargs="*", help="print accuracies of these rows for several learning rates instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    study = STUDIES[args.of]
    args.rows = args.rows or RESULTS / f"{study.name}.json"
    pool = opened(study, args.data, "train")
    if args.tune is not None:
        for label in args.tune or ["MaskLoRA"]:
            tune(label, pool, args.shots, args.epochs, study)
        return
    test = opened(study, args.data, "test")
    test = test.select(np.arange(min(args.test, len(test))))
    settings = {"shots": args.shots, "epochs": args.epochs, "test": len(test)}
    record: dict[str, Any] = {"settings": settings, "rows": []}
    if args.rows.exists():
        record = json.loads(args.rows.read_text())
    if record["settings"] != settings:
        raise SystemExit(f"{args.rows} is of other settings, {record['settings']}; name another file by --rows")
    done = {(r["method"], r["sparsity"], r["seed"]) for r in record["rows"]}
    methods = args.methods or study.methods
    wanted = [(m, s) for s in args.sparsities for m in study.methods if m in methods and (s == 0) == (m in DENSE)]
    for (label, sparsity), seed in itertools.product(wanted, range(args.seeds)):
        if (label, sparsity, seed) not in done:
            train = few_shot(pool, args.shots, seed=seed)
            row = run_one(label, sparsity, train, test, seed, args.epochs, study=study)
            record["rows"].append(row)
            print(json.dumps(row), flush=True)
            write_file(args.rows, (json.dumps(record, indent=1) + "\n").encode())
    args.rows.with_suffix(".md").write_text(markdown(record["rows"]))
    if args.of != "updates":
        draw(record["rows"], study, args.rows.with_suffix(".png"))
        if args.rows.parent == RESULTS:
            draw(record["rows"], study, RESULTS.parents[1] / "docs" / "images" / f"{args.rows.stem}.png")
    print(markdown(record["rows"]))


if __name__ == "__main__":
    main()
