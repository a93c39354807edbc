"""What class texts cost a step: prompts in front of class names against a plain pass through the text tower.

    python benchmarks/class_texts.py [--backbone open_clip:ViT-B-32] [--classes 10] [--batch 4] [--rounds 5]

A step is forward and backward of the texts alone: embeddings of images are given. "plain" is open_clip's own `encode_text` of the
same classes as "a photo of a {}.", whole contexts, with a gradient to the words' embeddings, as every method of class prompts
needs. "whole" are the same methods without the cut behind the last end of a text (`zoo.heads.text`). CoCoOp has texts of its own
for each image, so it is compared with a plain pass over as many texts. Weights are random: they change nothing here. All take
turns on one thread, processor time; medians. Bytes are those kept for backward. Writes `results/class_texts.{json,md}`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zoo

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import clock, machine
from zoo.disk import write_file
from zoo.puzzle.costs import single_thread

RESULTS = Path(__file__).parent / "results"
METHODS: dict[str, dict[str, Any]] = {"coop": {"num_tokens": 16}, "cocoop": {}}
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def load(backbone: str, method: str, classes: int, batch: int, whole: bool) -> tuple[zoo.Model, Tensor]:
    """The method on a tower of random weights, which takes embeddings of images in place of these, and such embeddings."""
    names = [NAMES[i % 10] + (f" {i // 10}" if i >= 10 else "") for i in range(classes)]
    model = zoo.load(backbone, zoo.adapter(method, **METHODS[method]), classes=names, pretrained=False).train()
    model.backbone.visual.forward = lambda images: images  # type: ignore[union-attr]
    head: Any = model.head
    if whole:
        head.cut = head.ids
    return model, torch.randn(batch, model.family.feature_dim, generator=torch.Generator().manual_seed(0))


def plain(model: Any, texts: int) -> Callable[[], Tensor]:
    """open_clip's own text tower over so many texts."""
    clip: Any = model.merge().requires_grad_(False)
    ids = model.family.tokenize([f"a photo of a {NAMES[i % 10]}." for i in range(texts)])
    clip.token_embedding.register_forward_hook(lambda module, given, words: words.detach().requires_grad_())
    return lambda: clip.encode_text(ids)  # type: ignore[no-any-return]


def contestants(backbone: str, classes: int, batch: int) -> dict[str, tuple[Callable[[], Tensor], Callable[[], int]]]:
    """What is measured by name: a forward pass, and how its bytes are counted."""
    found: dict[str, Any] = {}
    for method in METHODS:
        texts = classes * (batch if method == "cocoop" else 1)
        bare = zoo.load(backbone, num_classes=0, pretrained=False, tower="both")
        run = plain(bare, texts)
        ignore = list(bare.backbone.parameters())
        found[f"plain, {texts} texts"] = (run, lambda run=run, ignore=ignore: zoo.saved_bytes(run, ignore))
        for whole in (True, False):
            model, images = load(backbone, method, classes, batch, whole)
            name = f"{method}{', whole' if whole else ''}"
            found[name] = (lambda m=model, x=images: m(x), lambda m=model, x=images: m.saved_bytes(x))
    return found


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="open_clip:ViT-B-32")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "class_texts.json")
    options = parser.parse_args()
    with single_thread():
        runs = contestants(options.backbone, options.classes, options.batch)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        mark = torch.zeros(())
        for number in range(options.rounds + 1):
            for name, (run, _) in runs.items():
                start = clock(mark)
                run().square().mean().backward()
                if number:  # the first round warms up
                    seconds[name].append(clock(mark) - start)
        kept = {name: count() for name, (_, count) in runs.items()}
    rows, beside = [], ""
    for name in runs:
        beside = name if name.startswith("plain") else beside
        times, memory = statistics.median(seconds[name]) / statistics.median(seconds[beside]), kept[name] / kept[beside]
        rows.append({"name": name, "step": round(times, 3), "kept": round(memory, 3)})
    settings = {k: v for k, v in vars(options).items() if k != "out"}
    about = {**settings, "machine": machine("cpu")}
    write_file(options.out, (json.dumps({"about": about, "rows": rows}, indent=1) + "\n").encode())
    text = ["| texts | step, of the plain pass above | kept for backward, of the same |", "| --- | ---: | ---: |"]
    text += [f"| {r['name']} | {r['step']:.2f} | {r['kept']:.2f} |" for r in rows]
    write_file(options.out.with_suffix(".md"), ("\n".join(text) + "\n").encode())
    print("\n".join(text))


if __name__ == "__main__":
    main()
