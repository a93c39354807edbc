"""What a LoRA keeps as signs (ComPEFT): `vit-micro` on CIFAR-10, accuracy and bytes against k.

    python benchmarks/compeft.py --data <folder with cifar10/> --seeds 3

A LoRA of rank 8 is trained on 50 images of each class. It is saved with `encoding="compeft"` for k of 5, 10, 20, 30 and 50 % and
alpha of 0.5, 1, 2 and 4; for each k the alpha with the best accuracy on other training images (the validation data) is taken, and
only that one is measured on the test images. "alpha 1" is the authors' default, without any choice. The seed draws the images and
initial values. Bytes are those of places, signs and table in the file. Writes `results/compeft.{json,md}`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import zoo
from zoo.data import ImageDataset, few_shot, open_dataset
from zoo.disk import read, write_file
from zoo.disk.sizes import sizes

SHARES, ALPHAS = (5, 10, 20, 30, 50), (0.5, 1.0, 2.0, 4.0)
RESULTS = Path(__file__).parent / "results"


def accuracy(model: zoo.Model, data: ImageDataset) -> float:
    return float(zoo.evaluate(model, data, batch_size=100, record="", progress=False)["accuracy"])


def run(pool: ImageDataset, test: ImageDataset, seed: int, steps: int, held: int) -> list[dict[str, Any]]:
    """The rows of one seed."""
    order = np.random.default_rng(seed).permutation(len(pool))
    val, train = pool.select(np.sort(order[:held])), few_shot(pool.select(np.sort(order[held:])), 50, seed=seed)
    model = zoo.load("vit-micro", zoo.adapter("lora", rank=8), num_classes=10, seed=seed)
    bare = accuracy(model, test)
    rates = {"default": 5e-3, "head": 1e-2}
    zoo.fit(model, train, steps=steps, batch_size=32, lr=rates, seed=seed, augment="none", progress=False)
    model.eval()
    whole = model.adapter_state("lora")
    rows = [{"seed": seed, "k": 100, "kind": "whole", "test": accuracy(model, test), "untrained": bare}]
    with tempfile.TemporaryDirectory() as place:
        for k in SHARES:
            found: dict[float, tuple[float, zoo.AdapterState, dict[str, Any]]] = {}
            for alpha in ALPHAS:
                model.set_adapter_state("lora", whole)
                folder = model.save_adapter(Path(place) / f"{k}-{alpha}", encoding="compeft", k=k, alpha=alpha)
                state = zoo.AdapterState({**whole, **read(folder).adapter_tensors("lora")})
                model.set_adapter_state("lora", state)
                found[alpha] = (accuracy(model, val), state, sizes(folder)["lora"])
            best = max(ALPHAS, key=lambda a: found[a][0])
            for kind, alpha in (("chosen", best), ("alpha 1", 1.0)):
                model.set_adapter_state("lora", found[alpha][1])
                size = {key: found[alpha][2][key] for key in ("bytes", "golomb", "entropy", "ratio")}
                rows.append({"seed": seed, "k": k, "kind": kind, "alpha": alpha, "test": accuracy(model, test), **size})
                print(json.dumps(rows[-1]), flush=True)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """One row for each k: accuracy in % (mean and deviation over the seeds) and how many times smaller than 16 bits."""

    def told(k: int, kind: str) -> str:
        values = [100 * r["test"] for r in rows if (r["k"], r["kind"]) == (k, kind)]
        return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}"

    lines = [
        "| k | alpha 1 | alpha chosen | chosen alphas | times smaller | of the formula's bytes |",
        "| --- " * 6 + "|",
    ]
    for k in SHARES:
        own = [r for r in rows if r["k"] == k and r["kind"] == "chosen"]
        alphas = ", ".join(f"{r['alpha']:g}" for r in own)
        ratio = statistics.mean(r["ratio"] for r in own)
        share = statistics.mean(r["bytes"] / r["golomb"] for r in own)
        lines.append(f"| {k} | {told(k, 'alpha 1')} | {told(k, 'chosen')} | {alphas} | {ratio:.1f} | {share:.3f} |")
    return "\n".join([*lines, f"| whole | {told(100, 'whole')} | | | 1 | |"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("ZOO_TEST_DATA", "../shared/data")))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--val", type=int, default=200)
    parser.add_argument("--test", type=int, default=500, help="test images, the first of the shuffled split")
    args = parser.parse_args()
    pool = open_dataset(args.data / "cifar10", split="train")
    test = open_dataset(args.data / "cifar10", split="test").select(np.arange(args.test))
    rows = [row for seed in range(args.seeds) for row in run(pool, test, seed, args.steps, args.val)]
    settings = {"steps": args.steps, "val": args.val, "test": args.test}
    write_file(RESULTS / "compeft.json", (json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n").encode())
    (RESULTS / "compeft.md").write_text(markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
