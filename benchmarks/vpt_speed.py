"""VPT-deep against its straightforward form: step time and kept bytes, as ratios.

    python benchmarks/vpt_speed.py [--batch 8] [--rounds 5] [--backbones vit-b16 swin-t] [--tokens 50 100]

Both run forward and backward in turns in one process on one thread, and process time is what counts, so other load on the
machine hardly matters. The ViT has 3 of its 12 equal blocks. Weights are random: they change nothing here. Bytes are those kept
for backward, and are compared with BitFit on the same backbone.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import zoo

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "parts"))
from straightforward_vpt import StraightSwin, StraightViT

OPTIONS: dict[str, dict[str, Any]] = {"vit-b16": {"depth": 3}, "swin-t": {}, "swin-b": {}}


def step(run: nn.Module, images: Tensor) -> float:
    """Seconds of process time of one forward and backward pass."""
    begin = time.process_time()
    run(images).square().mean().backward()
    return time.process_time() - begin


def compare(backbone: str, tokens: int, batch: int, rounds: int) -> dict[str, Any]:
    """Ratios of one backbone and number of prompts; also checks that both forms give the same features."""
    torch.manual_seed(0)
    model = zoo.load(backbone, pretrained=False, num_classes=0, **OPTIONS.get(backbone, {}))
    plain = copy.deepcopy(model.backbone)
    images = torch.randn(batch, 3, *model.image_size)
    adapter = model.add_adapter(zoo.adapter("vpt", num_tokens=tokens))
    form = StraightSwin if backbone.startswith("swin") else StraightViT
    straight = form(plain, list(adapter.parameters()), deep=True)
    with torch.no_grad():
        difference = (model(images) - straight(images)).abs().max().item()
    model.train()
    times: dict[str, list[float]] = {"ours": [], "straightforward": []}
    for _ in range(rounds + 1):
        times["ours"].append(step(model, images))
        times["straightforward"].append(step(straight, images))
    ratios = [a / b for a, b in zip(times["ours"][1:], times["straightforward"][1:])]  # the first round warms up
    kept = model.saved_bytes(images)
    model.remove_adapter("vpt")
    model.add_adapter("bitfit")
    return {
        "backbone": backbone,
        "tokens": tokens,
        "batch": batch,
        "seconds": min(times["ours"]),
        "time_ratio": statistics.median(ratios),
        "time_ratio_range": [min(ratios), max(ratios)],
        "bytes_over_bitfit": kept / model.saved_bytes(images),
        "largest_difference": difference,
    }


def main() -> None:
    """Print one JSON line for each setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backbones", nargs="+", default=["vit-b16", "swin-t"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[50, 100])
    options = parser.parse_args()
    torch.set_num_threads(1)
    for backbone in options.backbones:
        for tokens in options.tokens:
            print(json.dumps(compare(backbone, tokens, options.batch, options.rounds)), flush=True)


if __name__ == "__main__":
    main()
