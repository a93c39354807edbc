"""CoOp on clip-micro against its zero-shot classifier: CIFAR-10, a few images of each class.

    python benchmarks/coop.py --data <folder with cifar10/> --shots 16 --seeds 3

Prints accuracy on the test images: zero-shot, and for each seed CoOp (random and from a template) and the linear probe.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import zoo
from multimodal.tasks.zero_shot import put_zero_shot_classifier


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--images", type=int, default=2000, help="test images, from the beginning")
    options = parser.parse_args()
    folder = str(options.data / "cifar10")
    test = zoo.open_dataset(folder, split="test")
    test = test.select(range(min(options.images, len(test))))
    model = zoo.load("clip-micro", num_classes=0)
    put_zero_shot_classifier(model, test.classes)
    print("zero-shot", zoo.evaluate(model, test, task="classify", progress=False)["accuracy"], flush=True)
    methods: dict[str, Any] = {
        "coop, 16 random": zoo.adapter("coop"),
        "coop, a photo of a": zoo.adapter("coop", init="a photo of a"),
        "linear probe": zoo.adapter("linear"),
    }
    for name, adapter in methods.items():
        found = []
        for seed in range(options.seeds):
            train = zoo.open_dataset(folder, split="train", shots=options.shots, seed=seed)
            model = zoo.load("clip-micro", adapter, num_classes=10, seed=seed)
            zoo.fit(model, train, epochs=options.epochs, batch_size=32, seed=seed, progress=False)
            found.append(zoo.evaluate(model, test, progress=False)["accuracy"])
        values = torch.tensor(found)
        print(f"{name}: {values.mean():.4f} ({', '.join(f'{v:.4f}' for v in found)})", flush=True)


if __name__ == "__main__":
    main()
