"""Methods whose ranks grow against LoRA of the same rank: process time of a training step, as ratios.

    python benchmarks/growth_speed.py [--batch 4] [--rounds 5] [--rank 2]

All run forward, backward and Adam in turns in one process on one thread, and process time is what counts, so other load on the
machine hardly matters. The ViT-B/16 has 2 of its 12 equal blocks; weights are random, they change nothing here. IncreLoRA has a
directions that wait while it grows. "look" is what TriAdaptLoRA does at a step of growth besides the growth itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from torch import Tensor

import zoo


def step(model: zoo.Model, optimizer: Any, images: Tensor, work: Any = None) -> float:
    """Seconds of process time of one training step."""
    begin = time.process_time()
    loss = model(images).square().mean()
    adapter: Any = next(iter(model.adapters.values()))
    if (extra := adapter.extra_loss(model, None, None)) is not None:
        loss = loss + extra
    loss.backward()
    if work is not None:
        work()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.process_time() - begin


def made(name: str, rank: int, **settings: Any) -> tuple[zoo.Model, Any]:
    """A model with triplets of this rank (LoRA's, or those of a first block), and its optimizer."""
    torch.manual_seed(0)
    more = {} if name == "lora" else {"target_rank": rank + 2}
    adapter = zoo.adapter(name, rank=rank, targets="all-linear", **more, **settings)
    model = zoo.load("vit-b16", adapter, pretrained=False, num_classes=0, depth=2).train()
    return model, torch.optim.Adam(model.parameters_to_train().values(), lr=1e-3)


def main() -> None:
    """Print one JSON line: medians of the ratios to LoRA's step in the same turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs: dict[str, tuple[Any, Any, Any]] = {
        "lora": (*made("lora", options.rank), None),
        "increlora": (*made("increlora", options.rank), None),
        "increlora, growing": (*made("increlora", options.rank), None),
        "triadaptlora": (*made("triadaptlora", options.rank), None),
        "triadaptlora, look": (*made("triadaptlora", options.rank), None),
    }
    model, _, _ = runs["increlora, growing"]
    growing: Any = model.adapters["increlora"]
    for name, part in growing.growing().items():
        growing.reserve(name, part, 1)
    growing.watch()
    optimizer = torch.optim.Adam(model.parameters_to_train().values(), lr=1e-3)
    runs["increlora, growing"] = (model, optimizer, growing.sensitivities)
    model, optimizer, _ = runs["triadaptlora, look"]
    looking: Any = model.adapters["triadaptlora"]
    work = lambda: torch.stack([part.size() for part in looking.parts().values()]).sort()  # noqa: E731
    runs["triadaptlora, look"] = (model, optimizer, work)
    images = torch.randn(options.batch, 3, 224, 224)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds + 1):
        for name, (model, optimizer, work) in runs.items():
            times[name].append(step(model, optimizer, images, work))
    ratios = {}
    for name, mine in times.items():
        found = [a / b for a, b in zip(mine[1:], times["lora"][1:])]  # the first round warms up
        ratios[name] = {
            "median": round(statistics.median(found), 3),
            "range": [round(min(found), 3), round(max(found), 3)],
        }
    print(json.dumps({"batch": options.batch, "rank": options.rank, "ratios": ratios}))


if __name__ == "__main__":
    main()
