"""ConES on clip-micro: the class embeddings are searched, from the zero-shot classifier on.

    python benchmarks/cones.py --data <folder with cifar10/> --shots 1 4 16 --seeds 3

Each seed draws k images of each class to train on and k others to choose by: `zoo.fit` keeps the epoch that is best on these. The
test images are looked at once for each row, and for "cones, before" before the first step. Rows:

- zero-shot: the names of the classes, "a photo of a {}.";
- cones: their embeddings searched; "3 templates": a vector of a class for each; "random": from random directions;
- cones, lora (`--lora`): then, the embeddings kept, a LoRA of rank 4 in the image tower for `--lora-epochs`;
- linear: the probe on the image's features.

What does not change the image tower is trained on its features, which are computed once, without augmentation.
Rows are written as they come; a run that was stopped goes on. Writes `results/cones.{json,md}`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset

import zoo
from multimodal.tasks.zero_shot import put_zero_shot_classifier
from zoo.data import ImageDataset, few_shot, open_dataset
from zoo.disk import write_file

RESULTS = Path(__file__).parent / "results"
TEMPLATES = ("a photo of a {}.", "a small picture of a {}.", "{}")
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "cones": ("cones", {}),
    "cones, 3 templates": ("cones", {"templates": TEMPLATES, "each": True}),
    "cones, random": ("cones", {"init": "random"}),
    "linear": ("linear", {}),
}
PLAIN: dict[str, Any] = {"batch_size": 32, "progress": False}


def halves(pool: ImageDataset, shots: int, seed: int) -> tuple[ImageDataset, ImageDataset]:
    """k images of each class to train on, and k others to choose by."""
    both = few_shot(pool, 2 * shots, seed=seed)
    labels = np.asarray(both.labels)
    places = [np.flatnonzero(labels == k) for k in range(len(pool.classes or ()))]
    first, second = (np.concatenate([p[part] for p in places]) for part in (slice(shots), slice(shots, None)))
    return both.select(first), both.select(second)


def accuracy(model: zoo.Model, test: Any) -> float:
    return float(zoo.evaluate(model, test, batch_size=250, record="", progress=False)["accuracy"])


def features(data: ImageDataset) -> ImageDataset:
    """The features of a data set's images in their place."""
    model = zoo.load("clip-micro", num_classes=0).eval()
    look = data.with_transform(model.preprocess())
    with torch.no_grad():
        found = [model.features(torch.stack([look[i][0] for i in part])) for part in chunks(len(data))]
    return open_dataset(TensorDataset(torch.cat(found), torch.as_tensor(np.asarray(data.labels))), classes=data.classes)


def chunks(count: int) -> list[range]:
    return [range(i, min(i + 250, count)) for i in range(0, count, 250)]


def on_features(model: zoo.Model) -> zoo.Model:
    """The model, whose images are features from now on."""
    model.backbone.encode_image = lambda x: x  # type: ignore[assignment]
    return model


def load(name: str, classes: list[str], seed: int) -> zoo.Model:
    method, settings = METHODS[name]
    return zoo.load("clip-micro", zoo.adapter(method, **settings), classes=classes, seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("ZOO_TEST_DATA", "../shared/data")))
    parser.add_argument("--set", default="cifar10", help="folder of the images: cifar10 or flowers17")
    parser.add_argument("--shots", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--lora", type=int, nargs="*", default=[16], help="images of each class for the second stage")
    parser.add_argument("--lora-epochs", type=int, default=10)
    parser.add_argument("--images", type=int, default=2000, help="test images, the first of the shuffled split")
    parser.add_argument("--rows", type=Path, default=RESULTS / "cones.json", help="file of the rows")
    args = parser.parse_args()
    pool, test = (open_dataset(args.data / args.set, split=split) for split in ("train", "test"))
    test = test.select(np.arange(min(args.images, len(test))))
    settings = {"epochs": args.epochs, "lora_epochs": args.lora_epochs, "images": args.images}
    record: dict[str, Any] = (
        json.loads(args.rows.read_text()) if args.rows.exists() else {"settings": settings, "rows": []}
    )
    if record["settings"] != settings:
        raise SystemExit(f"{args.rows} is of other settings, {record['settings']}; name another file by --rows")
    done = {(r["set"], r["method"], r["shots"], r["seed"]) for r in record["rows"]}

    def write(method: str, shots: int, seed: int, value: float) -> None:
        row = {"set": args.set, "method": method, "shots": shots, "seed": seed, "accuracy": value}
        record["rows"].append(row)
        print(json.dumps(row), flush=True)
        write_file(args.rows, (json.dumps(record, indent=1) + "\n").encode())
        write_file(args.rows.with_suffix(".md"), markdown(record["rows"]).encode())

    if (args.set, "zero-shot", 0, 0) not in done:
        model = zoo.load("clip-micro", num_classes=0)
        names = [name.replace("_", " ") for name in test.classes or ()]  # as the other rows read them
        put_zero_shot_classifier(model, names)
        model.take_names(test.classes)
        write("zero-shot", 0, 0, accuracy(model, test))
    classes, seen = list(test.classes or ()), features(test)
    for shots, seed in itertools.product(sorted(args.shots), range(args.seeds)):
        split = halves(pool, shots, seed)
        train, val = (features(part) for part in split)
        for name in METHODS:
            model = on_features(load(name, classes, seed))
            if name == "cones" and (args.set, "cones, before", shots, seed) not in done:
                write("cones, before", shots, seed, accuracy(model, seen))
            second = name == "cones" and shots in args.lora and (args.set, "cones, lora", shots, seed) not in done
            if (args.set, name, shots, seed) in done and not second:
                continue
            zoo.fit(model, train, val, epochs=args.epochs, seed=seed, augment="none", **PLAIN)
            if (args.set, name, shots, seed) not in done:
                write(name, shots, seed, accuracy(model, seen))
            if second:
                del model.backbone.encode_image  # images again
                model.add_adapter(zoo.adapter("lora", rank=4))
                model.set_active("cones", "lora", train="lora")
                zoo.fit(model, *split, epochs=args.lora_epochs, seed=seed, **PLAIN)
                write("cones, lora", shots, seed, accuracy(model, test))


def markdown(rows: list[dict[str, Any]]) -> str:
    """One row for each set and method, one column for each number of images; % with the deviation over seeds."""
    shots = sorted({r["shots"] for r in rows} - {0})
    lines = [
        "| data | method | " + " | ".join(f"{k} a class" for k in shots) + " |",
        "| --- | --- |" + " --- |" * len(shots),
    ]
    for key in dict.fromkeys((r["set"], r["method"]) for r in rows):
        cells = []
        for k in shots:
            mine = [100 * r["accuracy"] for r in rows if (r["set"], r["method"]) == key and r["shots"] in (k, 0)]
            spread = f" ± {statistics.stdev(mine):.1f}" if len(mine) > 1 else ""
            cells.append(f"{statistics.mean(mine):.1f}{spread}" if mine else "")
        lines.append(f"| {key[0]} | {key[1]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
