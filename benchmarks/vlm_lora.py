"""LoRA of different towers on the kinds of questions that `vlm-micro` was not trained on: `zoo.fit(task="generate")`.

    python benchmarks/vlm_lora.py DATA OUT.json [--seeds 3] [--train 240] [--test 240] [--epochs 2]

Every arm sees the same questions of the three left-out kinds (`scripts/easy_vqa_kinds.py`) and is measured, greedy, on such
questions of the test split, read once at the end. The epoch is chosen on drawings of the train split that no arm is trained on.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from easy_vqa_kinds import LEFT_OUT, Row, images, rows

import zoo
from multimodal.data.questions import Question
from zoo.disk import write_file

VALIDATION = 400  # drawings at the end of the train split that choose the epoch
PROJECTIONS = "{q,k,v,o,gate,up,down}"
ARMS: dict[str, tuple[str, ...]] = {
    "text": (f"text.**.{PROJECTIONS}",),
    "eyes": ("visual.**.{q,k,v,o,up,down}", "projector.fc*"),
    "both": (f"text.**.{PROJECTIONS}", "visual.**.{q,k,v,o,up,down}", "projector.fc*"),
}


def questions(kept: list[Row], seen: dict[int, bytes], count: int, draw: random.Random) -> list[Question]:
    """`count` questions, as many of each kind."""
    found = []
    for kind in LEFT_OUT:
        group = [row for row in kept if row.kind == kind]
        found += draw.sample(group, min(len(group), count // len(LEFT_OUT)))
    return [Question(seen[row.image], row.question, (row.answer,), row.image) for row in found]


def run(data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Exact answers before, and of each arm and seed."""
    train, test = rows(data, "train"), rows(data, "test")
    pictures, others = images(data, "train"), images(data, "test")
    apart = set(sorted(pictures)[-VALIDATION:])
    asked = questions(test, others, options.test, random.Random(0))
    chosen = questions([r for r in train if r.image in apart], pictures, 90, random.Random(0))
    record: dict[str, Any] = {"options": {k: v for k, v in vars(options).items() if k not in ("data", "out")}}
    bare = zoo.load("vlm-micro")
    record["before"] = zoo.evaluate(bare, asked, task="generate", batch_size=64)["exact_match"]
    record["arms"] = {name: [] for name in ARMS}
    for seed in range(options.seeds):
        learnt = questions([r for r in train if r.image not in apart], pictures, options.train, random.Random(seed))
        for name, targets in ARMS.items():
            model = zoo.load("vlm-micro", zoo.adapter("lora", rank=8, targets=targets), seed=seed)
            start = time.monotonic()
            settings: dict[str, Any] = {"epochs": options.epochs, "batch_size": 24, "lr": 3e-3, "task": "generate"}
            zoo.fit(model, learnt, chosen, seed=seed, **settings)
            exact = zoo.evaluate(model, asked, task="generate", batch_size=64)["exact_match"]
            trained = model.num_parameters(trainable=True)
            record["arms"][name].append(
                {"seed": seed, "exact": exact, "trained": trained, "seconds": time.monotonic() - start}
            )
            print(f"{name:5} seed {seed}: {exact:.4f}", flush=True)
            write_file(options.out, (json.dumps(record, indent=1) + "\n").encode())
    return record


def main() -> None:
    """Measure, and print the table of the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    for name, value in (("seeds", 3), ("train", 240), ("test", 240), ("epochs", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    record = run(options.data, options)
    print(f"| before | | {100 * record['before']:.1f} |")
    for name, runs in record["arms"].items():
        exact = [100 * r["exact"] for r in runs]
        spread = statistics.stdev(exact) if len(exact) > 1 else 0.0
        print(f"| LoRA, {name} | {runs[0]['trained']:,} | {statistics.mean(exact):.1f} ± {spread:.1f} |")


if __name__ == "__main__":
    main()
