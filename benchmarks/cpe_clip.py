"""CPE-CLIP on clip-micro over sessions of new classes: CIFAR-10 (4, then 3 sessions of 2) and 17 flowers (9, then 4 of 2).

    python benchmarks/cpe_clip.py --data <folder with cifar10/ and flowers17/> --seeds 3

Session 0 has `--base` images of each class, each later one 5 of each. The highest rate (the authors' 0.1, or ten times
that; `lr_min` is a hundredth) is chosen for each method by what a run over all sessions gives on images that were set aside of
every class of the training data, with a seed of its own; the test images are seen once, by the runs that are reported. Prints
accuracies over all classes seen after each session: zero-shot, CPE-CLIP with and without shrunken gradients, CoOp and MaPLe
trained in the same way.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

import zoo
from multimodal.tasks.zero_shot import put_zero_shot_classifier
from zoo.data import by_class
from zoo.data.dataset import ImageDataset
from zoo.data.sampling import known_labels

SIZES = {"cifar10": [4, 2, 2, 2], "flowers17": [9, 2, 2, 2, 2]}
# names that say what is to be seen
NAMES = {"cifar10": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]}
METHODS: dict[str, dict[str, Any]] = {
    "cpe-clip": {},
    "cpe-clip, whole gradients": {"balance": False},
    "maple": {"method": "maple"},
    "coop": {"method": "coop"},
}
RATES = (0.1, 1.0)


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
        found.append(round(float(zoo.evaluate(model, shown, task="classify", progress=False)["accuracy"]), 4))
    return found


def main() -> None:
    """Measure and print."""
    logging.disable(logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=list(SIZES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--base", type=int, default=48)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", type=float, help="the highest rate, instead of choosing it on the images set aside")
    options = parser.parse_args()
    for name in options.sets:
        train, held, test = parts(options.data / name, options.base)
        print(json.dumps({"set": name, "method": "zero-shot", "seen": zero_shot(test, SIZES[name])}), flush=True)
        for method in options.methods:
            tried = {}
            for rate in RATES if options.rate is None else ():
                settings = {**METHODS[method], "lr_max": rate, "lr_min": rate / 100}
                tried[rate] = go(train, held, SIZES[name], 100, **settings)
            rate = max(tried, key=lambda r: sum(tried[r])) if tried else options.rate
            settings = {**METHODS[method], "lr_max": rate, "lr_min": rate / 100}
            runs = [go(train, test, SIZES[name], seed, **settings) for seed in range(options.seeds)]
            line = {"set": name, "method": method, "rate": rate, "held out": tried, "runs": runs}
            line["mean"] = [round(float(v), 4) for v in np.mean(runs, axis=0)]
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
