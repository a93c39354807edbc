"""Training steps of low-rank, sparse and quantised methods beside LoRA with as many trained numbers, as ratios.

    python benchmarks/step_speed.py [--batch 8] [--steps 12] [--methods pst,l4q]

ViT-B/16 with 2 of its 12 equal blocks, random weights (they change no cost), a head; Adam. A method and its LoRA
take turns step by step in one process on one thread, and processor time counts, so other load matters little. The first two
steps warm up. A step is all that `zoo.fit` does in it: masks, scores, growth and schedules, which are shortened to these steps,
so that what happens now and then happens several times here. "step" is the ratio of medians; "run" that of all steps together,
what happens now and then included. Data that a method asks for before training (LT-SFT's first phase) are in neither. Writes
results/step_speed.{json,md}.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import zoo
from zoo.puzzle.costs import single_thread

RESULTS = Path(__file__).parent / "results"
SHAPE: dict[str, Any] = {"pretrained": False, "num_classes": 10, "depth": 2}
ALL: dict[str, Any] = {"targets": "all-linear"}
METHODS: dict[str, tuple[str, dict[str, Any], float]] = {  # label -> method, settings, the limit that we set ourselves
    "adalora": ("adalora", {"rank": 8, "target_rank": 6, **ALL}, 1.25),
    "dylora": ("dylora", {"rank": 8, **ALL}, 1.25),
    "vera": ("vera", {}, 1.25),
    "svfit": ("svfit", {}, 1.25),
    "increlora": ("increlora", {"rank": 2, "target_rank": 4, **ALL}, 1.25),
    "triadaptlora": ("triadaptlora", {"rank": 2, "target_rank": 4, **ALL}, 1.25),
    "mam": ("mam", {}, 1.25),
    "lt-sft": ("lt-sft", {"full_epochs": 1, "full_lr": 1e-3}, 1.25),
    "dsee": ("dsee", {}, 1.25),
    "dsl, moving every 4th step (100th by default)": ("dsl", {"interval": 4}, 1.25),
    "perp, biases and norms": ("perp", {"update": "none"}, 1.25),
    "perp, MaskLoRA": ("perp", {"update": "mask"}, 1.25),
    "perp, ScaleLoRA": ("perp", {"update": "scale"}, 1.25),
    "pst": ("pst", {}, 1.6),
    "l4q": ("l4q", {}, 1.6),
}


class Run:
    """A model in training, one step at a time."""

    def __init__(self, adapter: Any, images: Tensor, steps: int) -> None:
        torch.manual_seed(0)
        self.model, self.images = zoo.load("vit-b16", adapter, **SHAPE), images
        self.labels = torch.arange(len(images)) % 10
        self.hooks = zoo.training_hooks(self.model)
        if self.hooks.needs_calibration:
            self.hooks.calibrate([(images[:2], self.labels[:2])])
        self.optimizer = torch.optim.Adam(self.model.parameters_to_train().values(), lr=1e-3)
        self.hooks.fit_start(self.optimizer, total_steps=steps)
        self.model.train()
        self.count = self.model.num_parameters(trainable=True, head=False)
        self.times: list[float] = []

    def step(self, number: int) -> None:
        """Seconds of processor time of one training step are written down."""
        begin = time.process_time()
        self.hooks.step_start(number)
        outputs = self.model(self.images)
        (cross_entropy(outputs, self.labels) + self.hooks.extra_loss(outputs, self.labels)).backward()
        self.hooks.after_backward(number)
        self.optimizer.step()
        self.hooks.after_step(number)
        self.optimizer.zero_grad(set_to_none=True)
        self.hooks.step_end(number)
        self.times.append(time.process_time() - begin)


def lora_rank(count: int) -> int:
    """The rank at which LoRA of all projections has about so many numbers, at least 1."""
    one = zoo.load("vit-b16", zoo.adapter("lora", rank=1, **ALL), device="meta", **SHAPE)
    return max(1, round(count / one.num_parameters(trainable=True, head=False)))


def measured(label: str, images: Tensor, steps: int) -> dict[str, Any]:
    """One row."""
    method, settings, limit = METHODS[label]
    mine = Run(zoo.adapter(method, **copy.deepcopy(settings)), images, steps)
    rank = min(lora_rank(mine.count), 768)
    lora = Run(zoo.adapter("lora", rank=rank, **ALL), images, steps)
    for number in range(steps):
        for run in (mine, lora) if number % 2 else (lora, mine):
            run.step(number)
    one, other = mine.times[2:], lora.times[2:]
    step = statistics.median(one) / statistics.median(other)
    row = {"method": label, "trained": mine.count, "rank of LoRA": rank, "LoRA": lora.count, "limit": limit}
    return {**row, "step": round(step, 3), "run": round(sum(one) / sum(other), 3)}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| method | trained | LoRA of rank | trained | step | run | aim |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in rows:
        counts = f"{r['trained']:,} | {r['rank of LoRA']} | {r['LoRA']:,}"
        lines.append(f"| {r['method']} | {counts} | {r['step']:.2f} | {r['run']:.2f} | {r['limit']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--methods", help="labels of rows, by commas; nothing is written then")
    args = parser.parse_args()
    chosen = [m.strip() for m in args.methods.split(",")] if args.methods else list(METHODS)
    images = torch.randn(args.batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    rows = []
    with single_thread():
        for label in chosen:
            rows.append(measured(label, images, args.steps))
            print(rows[-1], flush=True)
    if not args.methods:
        settings = {"batch": args.batch, "steps": args.steps, "torch": torch.__version__}
        (RESULTS / "step_speed.json").write_text(json.dumps({**settings, "rows": rows}, indent=1) + "\n")
        (RESULTS / "step_speed.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
