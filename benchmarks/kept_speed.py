"""Heads and queries on kept features against the same with the backbone in every step: process time of a step, and bytes.

    python benchmarks/kept_speed.py [--backbone vit-micro] [--batch 64] [--rounds 9]

Both run forward, backward and SGD in turns in one process on one thread, and process time is what counts, so other load on the
machine hardly matters. Weights are random, they change nothing here; the tables are read anew in each step, as in a fit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

import zoo
from zoo.train.frozen import Frozen

Turn = Callable[[], float]


def turns(backbone: str, adapter: Any, batch: int) -> tuple[Turn, Turn, int]:
    """A step of kept features and one of images, in seconds; and the bytes that an item takes."""
    torch.manual_seed(0)
    model = zoo.load(backbone, adapter, pretrained=False, num_classes=10).train()
    optimizer = torch.optim.SGD(model.parameters_to_train().values(), lr=1e-3)
    (images,), targets = model.family.example_batch(batch), torch.arange(batch) % 10
    frozen = Frozen(model)
    tables = frozen.take(images)
    places = torch.randperm(batch)

    def read(*inputs: Any) -> list[Tensor] | None:
        return [t[inputs[0]] for t in tables] if inputs[0] is places else None

    def step(inputs: Tensor) -> float:
        begin = time.process_time()
        with frozen.instead(read) if inputs is places else nullcontext():
            torch.nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.process_time() - begin

    size = sum(t[0].numel() * t.element_size() for t in tables)
    return lambda: step(places), lambda: step(images), size


def main() -> None:
    """Print one JSON line: medians of the ratios of two steps of a turn, and bytes an item."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit-micro")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name, adapter in {
        "linear": "linear",
        "vqt": "vqt",
        "vqt, 10 queries": zoo.adapter("vqt", num_tokens=10),
    }.items():
        kept, live, size = turns(options.backbone, adapter, options.batch)
        pairs = [(kept(), live()) for _ in range(options.rounds + 1)][1:]  # the first round warms up
        ratios = [a / b for a, b in pairs]
        found[name] = {
            "time": round(statistics.median(ratios), 3),
            "range": [round(min(ratios), 3), round(max(ratios), 3)],
            "bytes": size,
        }
    print(json.dumps({"backbone": options.backbone, "batch": options.batch, "kept / live": found}))


if __name__ == "__main__":
    main()
