"""Methods for CLIP on few images of each class, against its zero-shot classifier and a linear probe: `clip-micro`.

    python benchmarks/clip_few_shot.py --data <folder with cifar10/, flowers17/> --seeds 3

Shots: k images of each class are trained on, min(k, 4) others of each class are the validation data: they choose the epoch, and
alpha and beta of Tip-Adapter. The seed draws both, and initial values. Base to new: the first half of the classes is trained on
(16 images of each), and the classes of either half are told apart among themselves; "new" are names that training never saw, and
H is the harmonic mean of the two accuracies. Test images are looked at once for each row.

All methods have the same images, without augmentation, and about the same number of steps, at rates that are fixed beforehand.
The embeddings of images are computed once where a method puts nothing into the image tower, which gives the same numbers. Rows
are written as they come; a run that was stopped goes on, so do runs with further methods. Writes `results/clip_few_shot.*`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import zoo
from multimodal.tasks.zero_shot import put_zero_shot_classifier
from zoo.data import ImageDataset, by_class, few_shot, open_dataset
from zoo.disk import write_file

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "zero-shot": ("", {}),
    "linear probe": ("linear", {}),
    "tip-adapter": ("tip-adapter", {"passes": 1}),
    "tip-adapter-f": ("tip-adapter-f", {"passes": 1}),
    "clip-adapter": ("clip-adapter", {}),
    "coop": ("coop", {}),
    "coop, a photo of a": ("coop", {"init": "a photo of a"}),
    "cocoop": ("cocoop", {}),
    "maple": ("maple", {}),
    "cones": ("cones", {}),
}
IN_IMAGES = ("maple",)  # what puts something into the image tower, too
SETS = ("cifar10", "flowers17")
SHOTS = (1, 2, 4, 8, 16)
NO_NEW = ("linear", "tip-adapter", "tip-adapter-f", "cones")  # what they learn belongs to the classes that they saw
RESULTS = Path(__file__).parent / "results"
RATES = {"linear": 1e-2, "coop": 2e-3, "clip-adapter": 1e-3, "tip-adapter-f": 1e-3}
BATCH = 32


def parts(pool: ImageDataset, shots: int, seed: int) -> tuple[ImageDataset, ImageDataset]:
    """`shots` images of each class, and min(shots, 4) others for validation."""
    both = few_shot(pool, shots + min(shots, 4), seed=seed)
    labels, random = both.labels, np.random.default_rng(seed)
    assert labels is not None
    train = [random.permutation(np.flatnonzero(labels == c))[:shots] for c in range(len(both.classes or ()))]
    chosen = np.zeros(len(both), dtype=bool)
    chosen[np.concatenate(train)] = True
    return both.select(np.flatnonzero(chosen)), both.select(np.flatnonzero(~chosen))


class Embeddings:
    """Embeddings of images by the frozen tower, each computed once."""

    def __init__(self) -> None:
        self.model = zoo.load("clip-micro", num_classes=0).eval()
        self.known: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, data: ImageDataset) -> TensorDataset:
        keys = [data.where(i) for i in range(len(data))]
        missing = [i for i, key in enumerate(keys) if key not in self.known]
        shown = data.with_transform(self.model.preprocess())
        for start in range(0, len(missing), 100):
            part = missing[start : start + 100]
            found = self.model.features(torch.stack([shown[i][0] for i in part]))
            self.known |= dict(zip([keys[i] for i in part], found))
        assert data.labels is not None
        given = TensorDataset(torch.stack([self.known[key] for key in keys]), torch.tensor(data.labels))
        given.classes = list(data.classes or ())  # type: ignore[attr-defined]
        return given


def load(name: str, names: list[str], seed: int = 0, saved: Any = None) -> zoo.Model:
    """A method on clip-micro with these classes; its image tower takes embeddings, if nothing is put into it."""
    method, settings = METHODS[name]
    if method:
        adapter = saved or zoo.adapter(method, **settings)
        counted: dict[str, Any] = {} if saved else {"num_classes": len(names), "seed": seed}
        model = zoo.load("clip-micro", adapter=adapter, classes=names, **counted)
    else:
        model = zoo.load("clip-micro", num_classes=0)
        put_zero_shot_classifier(model, [n.replace("_", " ") for n in names])
        model.classes = names
    if method not in IN_IMAGES:
        model.backbone.visual.forward = lambda images: images  # type: ignore[union-attr]
    return model


def accuracy(model: zoo.Model, test: Any) -> float:
    return float(zoo.evaluate(model, test, batch_size=250, record="", progress=False)["accuracy"])


def fitted(name: str, train: Any, val: Any, seed: int, steps: int) -> zoo.Model:
    """A model trained, calibrated or searched as the method has it; what is chosen is chosen on `val`."""
    method, _ = METHODS[name]
    model = load(name, list(train.classes), seed)
    if not method:
        return model
    adapter: Any = model.adapters[method]
    if method == "tip-adapter":
        zoo.calibrate(model, train, augment="none", seed=seed)
    else:
        options: dict[str, Any] = {"optimizer_options": {"eps": 1e-4}} if method == "tip-adapter-f" else {}
        zoo.fit(
            *(model, train, val),
            epochs=min(steps, max(1, round(steps * BATCH / len(train)))),
            batch_size=min(BATCH, len(train)),
            lr=RATES.get(method),
            seed=seed,
            augment="none",
            progress=False,
            **options,
        )
    if hasattr(adapter, "search"):
        adapter.search(model, val, batch_size=250)
    return model


def base_to_new(
    name: str, pool: ImageDataset, test: ImageDataset, seed: int, steps: int, given: Any
) -> dict[str, float]:
    """Accuracy on the test images of either half of the classes, among themselves."""
    (base, _), (base_test, new_test) = by_class(pool, 2), by_class(test, 2)
    train, val = parts(base, 16, seed)
    model = fitted(name, given(train), given(val), seed, steps)
    found = {"base": accuracy(model, given(base_test))}
    if METHODS[name][0] not in NO_NEW:
        with tempfile.TemporaryDirectory() as folder:
            saved = folder if METHODS[name][0] else None
            if saved:
                model.save_adapter(folder)
            found["new"] = accuracy(load(name, list(new_test.classes or ()), saved=saved), given(new_test))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("ZOO_TEST_DATA", "../shared/data")))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=[n for n, (m, _) in METHODS.items() if not m or m in known()])
    parser.add_argument("--sets", nargs="*", default=list(SETS))
    parser.add_argument("--shots", type=int, nargs="*", default=list(SHOTS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--test", type=int, default=1000, help="test images, the first of the shuffled split")
    parser.add_argument("--rows", type=Path, default=RESULTS / "clip_few_shot.json", help="file of the rows")
    args = parser.parse_args()
    settings = {"steps": args.steps, "test": args.test}
    record: dict[str, Any] = (
        json.loads(args.rows.read_text()) if args.rows.exists() else {"settings": settings, "rows": []}
    )
    if record["settings"] != settings:
        raise SystemExit(f"{args.rows} is of other settings, {record['settings']}; name another file by --rows")
    done = {(r["set"], r["method"], r["shots"], r["seed"]) for r in record["rows"]}
    embeddings = Embeddings()
    for seed, which, name in itertools.product(range(args.seeds), args.sets, args.methods):
        given: Any = (lambda data: data) if METHODS[name][0] in IN_IMAGES else embeddings
        pool, test = (open_dataset(args.data / which, split=split) for split in ("train", "test"))
        test = test.select(np.arange(min(args.test, len(test))))
        for shots in (*args.shots, 0):  # 0: base to new
            if (which, name, shots, seed) in done:
                continue
            if shots:
                train, val = parts(pool, shots, seed)
                model = fitted(name, given(train), given(val), seed, args.steps)
                numbers = {"accuracy": accuracy(model, given(test))}
            else:
                numbers = base_to_new(name, pool, test, seed, args.steps, given)
            record["rows"].append({"set": which, "method": name, "shots": shots, "seed": seed, **numbers})
            print(json.dumps(record["rows"][-1]), flush=True)
            write_file(args.rows, (json.dumps(record, indent=1) + "\n").encode())
    order = {name: i for i, name in enumerate(METHODS)}
    record["rows"].sort(key=lambda r: (r["set"], order[r["method"]], r["shots"], r["seed"]))
    write_file(args.rows, (json.dumps(record, indent=1) + "\n").encode())
    write_file(args.rows.with_suffix(".md"), markdown(record["rows"]).encode())
    draw(record["rows"], args.rows.with_suffix(".png"))
    print(markdown(record["rows"]))


def known() -> list[str]:
    return zoo.list_adapters()


def values(rows: list[dict[str, Any]], which: str, method: str, shots: int, key: str) -> list[float]:
    """In %, one for each seed."""
    mine = [r for r in rows if (r["set"], r["method"], r["shots"]) == (which, method, shots)]
    if key == "H":
        return [
            200 * r["base"] * r["new"] / (r["base"] + r["new"]) if r["base"] + r["new"] else 0.0
            for r in mine
            if "new" in r
        ]
    return [100 * r[key] for r in mine if key in r]


def cell(found: list[float]) -> str:
    if not found:
        return ""
    return f"{statistics.mean(found):.1f}" + (f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else "")


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table for each data set: accuracy in %, mean and deviation over the seeds."""
    text = []
    for which in dict.fromkeys(r["set"] for r in rows):
        shots = sorted({r["shots"] for r in rows if r["set"] == which} - {0})
        columns = [
            *((k, "accuracy", f"{k} a class") for k in shots),
            (0, "base", "base"),
            (0, "new", "new"),
            (0, "H", "H"),
        ]
        text += [f"{which}\n", "| method | " + " | ".join(c[2] for c in columns) + " |"]
        text.append("| --- |" + " ---: |" * len(columns))
        for method in dict.fromkeys(r["method"] for r in rows if r["set"] == which):
            cells = [cell(values(rows, which, method, k, key)) for k, key, _ in columns]
            text.append(f"| {method} | " + " | ".join(cells) + " |")
        text.append("")
    return "\n".join(text)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against the number of images, one panel for each data set."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sets, methods = list(dict.fromkeys(r["set"] for r in rows)), list(dict.fromkeys(r["method"] for r in rows))
    figure, axes = plt.subplots(1, len(sets), figsize=(5.5 * len(sets), 4.2), layout="constrained", squeeze=False)
    for axis, which in zip(axes[0], sets):
        shots = sorted({r["shots"] for r in rows if r["set"] == which} - {0})
        for number, method in enumerate(methods):
            found = [values(rows, which, method, k, "accuracy") for k in shots]
            axis.plot(
                [k for k, f in zip(shots, found) if f],
                [statistics.mean(f) for f in found if f],
                marker="o",
                color="black" if method == "zero-shot" else f"C{number}",
                linestyle="--" if method == "zero-shot" else "-",
                label=method,
            )
        axis.set_xscale("log", base=2)
        axis.set_xticks(shots, [str(k) for k in shots])
        axis.set_xlabel("images of each class")
        axis.set_ylabel("test accuracy, %")
        axis.set_title(which)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
