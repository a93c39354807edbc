"""CPE-CLIP on clip-micro over sessions of new classes: CIFAR-10 (4, then 3 sessions of 2) and 17 flowers (9, then 4 of 2).

    python benchmarks/cpe_clip.py --data <folder with cifar10/ and flowers17/> --seeds 3

Session 0 has `--base` images of each class, each later one 5 of each. The highest rate (the authors' 0.1, or ten times
that; `lr_min` is a hundredth) is chosen for each method by what a run over all sessions gives on images that were set aside of
every class of the training data, with a seed of its own (whole gradients have the rate of shrunken ones); the test images are
seen once, by the runs that are reported. Measured are accuracies over all classes seen after each session: zero-shot, CPE-CLIP
with and without shrunken gradients, CoOp and MaPLe trained in the same way. Rows are written as they come; a run that was
stopped goes on, so do runs with further methods. Writes `results/cpe_clip.{json,md}`.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from pathlib import Path
from typing import Any

import numpy as np

import zoo
from multimodal.tasks.zero_shot import put_zero_shot_classifier
from zoo.data import by_class
from zoo.data.dataset import ImageDataset
from zoo.data.sampling import known_labels
from zoo.disk import write_file

SIZES = {"cifar10": [4, 2, 2, 2], "flowers17": [9, 2, 2, 2, 2]}
# names that say what is to be seen
NAMES = {"cifar10": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]}
WHOLE = "cpe-clip, whole gradients"  # at the rate that was chosen for cpe-clip
METHODS: dict[str, dict[str, Any]] = {
    "cpe-clip": {},
    WHOLE: {"balance": False},
    "maple": {"method": "maple"},
    "coop": {"method": "coop"},
}
RATES = (0.1, 1.0)
RESULTS = Path(__file__).parent / "results"


def parts(folder: Path, base: int) -> tuple[ImageDataset, ImageDataset, ImageDataset]:
    """Training data, images set aside of the same split, test images (at most 1,000)."""
    classes = NAMES.get(folder.name)
    train, test = (zoo.open_dataset(str(folder), split=split, classes=classes) for split in ("train", "test"))
    labels = known_labels(train)
    chosen = np.random.default_rng(1234)
    rows, held = [], []
    for label in range(len(train.classes or ())):
        own = chosen.permutation(np.flatnonzero(labels == label))
        held += own[:16].tolist()
        rows += own[16 : 16 + base].tolist()
    return train.select(sorted(rows)), train.select(sorted(held)), test.select(range(min(1000, len(test))))


def go(train: ImageDataset, test: ImageDataset, sizes: list[int], seed: int, **settings: Any) -> list[float]:
    """Accuracy over all classes seen after each session."""
    model = zoo.load("clip-micro", num_classes=0, seed=seed)
    sessions, tests = by_class(train, sizes), by_class(test, sizes)
    report = zoo.run(model, "cpe-clip", sessions, tests, seed=seed, fit={"progress": False}, **settings)
    return [round(float(a), 4) for a in report.summary["seen"]]


def zero_shot(test: ImageDataset, sizes: list[int]) -> list[float]:
    """The same without training."""
    found = []
    for count in np.cumsum(sizes).tolist():
        names = list(test.classes or ())
        model = zoo.load("clip-micro", num_classes=0)
        shown = by_class(test, [count, len(names) - count] if count < len(names) else [count])[0]
        put_zero_shot_classifier(model, [n.replace("_", " ") for n in names[:count]])
        model.classes = names[:count]  # as the data set writes them
        found.append(round(float(zoo.evaluate(model, shown, task="classify", progress=False)["accuracy"]), 4))
    return found


def chosen_rate(method: str, train: ImageDataset, held: ImageDataset, sizes: list[int]) -> dict[str, list[float]]:
    """Accuracies on the images set aside by highest rate."""
    tried = {}
    for rate in RATES:
        tried[f"{rate:g}"] = go(train, held, sizes, 100, **METHODS[method], lr_max=rate, lr_min=rate / 100)
    return tried


def main() -> None:
    """Measure, write and print."""
    logging.disable(logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=list(SIZES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--base", type=int, default=48)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=Path, default=RESULTS / "cpe_clip.json", help="file of the rows")
    options = parser.parse_args()
    found: dict[str, Any] = {"base": options.base, "rates": {}, "rows": {}}
    if options.rows.is_file():
        found = json.loads(options.rows.read_text())
    if found["base"] != options.base:
        raise SystemExit(f"{options.rows} is of --base {found['base']}; name another file by --rows")

    def keep(where: str, key: str, value: Any) -> None:
        found[where][key] = value
        print(json.dumps({key: value}), flush=True)
        options.rows.parent.mkdir(parents=True, exist_ok=True)
        write_file(options.rows, (json.dumps(found, indent=1) + "\n").encode())
        write_file(options.rows.with_suffix(".md"), markdown(found).encode())

    for name in options.sets:
        train, held, test = parts(options.data / name, options.base)
        if (key := f"{name}, zero-shot, seed 0") not in found["rows"]:
            keep("rows", key, zero_shot(test, SIZES[name]))
        for method in options.methods:
            key = f"{name}, {method}"
            if rated(key) not in found["rates"]:
                keep("rates", rated(key), chosen_rate(rated(method), train, held, SIZES[name]))
            rate = best(found["rates"][rated(key)])
            for seed in range(options.seeds):
                if (row := f"{key}, seed {seed}") not in found["rows"]:
                    rates = {"lr_max": rate, "lr_min": rate / 100}
                    keep("rows", row, go(train, test, SIZES[name], seed, **METHODS[method], **rates))
    write_file(options.rows.with_suffix(".md"), markdown(found).encode())
    print(markdown(found))


def rated(key: str) -> str:
    """The row whose highest rate this one has."""
    return key.replace(WHOLE, "cpe-clip")


def best(tried: dict[str, list[float]]) -> float:
    """The highest rate whose accuracies over the sessions are the largest on average."""
    return float(max(tried, key=lambda rate: sum(tried[rate])))


def markdown(found: dict[str, Any]) -> str:
    """A table for each data set: accuracy in % over all classes seen behind each session, mean and deviation over the seeds."""
    text = []
    for name, sizes in SIZES.items():
        lines = []
        for method in ("zero-shot", *METHODS):
            key = f"{name}, {method}"
            runs = [seen for row, seen in found["rows"].items() if row.startswith(f"{key}, seed ")]
            if not runs:
                continue
            cells = []
            for column in zip(*runs, strict=True):
                values = [100 * v for v in column]
                spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.1f}{spread}")
            rate = f"{best(found['rates'][rated(key)]):g}" if rated(key) in found["rates"] else ""
            lines.append(f"| {method} | {rate} | {len(runs) if rate else ''} | {' | '.join(cells)} |")
        if lines:
            heads = " | ".join(f"{count} classes" for count in np.cumsum(sizes).tolist())
            text += [f"{name}\n", f"| method | highest rate | seeds | {heads} |"]
            text += ["| --- | ---: | ---: |" + " ---: |" * len(sizes), *lines, ""]
    return "\n".join(text)


if __name__ == "__main__":
    main()
