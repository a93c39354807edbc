"""Few bits: L4Q beside rounding what LoRA was merged into, and LoRA on a quantised backbone, on vit-micro.

    python benchmarks/few_bits.py /data/cifar10

CIFAR-10, which the backbone was not trained on: so many training images of each class, a part of the test images, three seeds.
All methods change all projections at rank 4, with the same learning rate and epochs, the house's defaults and not chosen by any
result; the last epoch is measured. "merged, rounded" is LoRA folded into the weights, which are then rounded to the nearest by
the steps that L4Q starts with: what there is without quantisation-aware training. Writes results/few_bits.json and few_bits.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import zoo
from zoo.adapters.l4q import packed
from zoo.data import few_shot

RESULTS = Path(__file__).parent / "results"


def trained(adapter: Any, data: Any, seed: int, args: Any, quantise: str | None = None) -> zoo.Model:
    """vit-micro after a fit."""
    model = zoo.load("vit-micro", adapter, num_classes=10, seed=seed, quantise=quantise)
    options = {"epochs": args.epochs, "lr": args.lr, "batch_size": 32, "keep": "last", "seed": seed, "augment": "none"}
    zoo.fit(model, data, progress=False, **options)
    return model.eval()


def rounded(model: zoo.Model, bits: int) -> zoo.Model:
    """The merged model, rounded to the nearest."""
    plain, again = model.merge().state_dict(), zoo.load("vit-micro", num_classes=10)
    again.backbone.load_state_dict({k: v for k, v in plain.items() if k in again.backbone.state_dict()})
    again.heads.load_state_dict(model.heads.state_dict())
    again.add_adapter(zoo.adapter("l4q", bits=bits, rank=4))
    return again.eval()


def size(model: zoo.Model) -> int:
    """Bytes of the backbone."""
    return sum(t.nbytes for t in model.backbone.state_dict().values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cifar10", type=Path)
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--held", type=int, default=40, help="test images of each class")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--formats", nargs="*", default=[], help="LoRA on a backbone in these, int4 or nf4, too")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    train, test = (zoo.open_dataset(args.cifar10, split=split) for split in ("train", "test"))
    test = few_shot(test, args.held)
    rows: dict[str, list[float]] = {}
    bytes_of: dict[str, int] = {}
    began = time.perf_counter()

    def note(name: str, model: zoo.Model, held: zoo.Model | None = None) -> None:
        rows.setdefault(name, []).append(float(zoo.evaluate(model, test)["accuracy"]))
        bytes_of[name] = size(held or model)
        print(f"{name}: {rows[name][-1]:.4f} ({time.perf_counter() - began:.0f} s)", flush=True)

    for seed in args.seeds:
        data = few_shot(train, args.shots, seed)
        lora = trained(zoo.adapter("lora", rank=4, targets="all-linear"), data, seed, args)
        note("LoRA", lora)
        for bits in args.bits:
            again = rounded(lora, bits)
            note(f"LoRA, merged, rounded to {bits} bits", again, packed(again))
        for to in args.formats:
            adapter = zoo.adapter("lora", rank=4, targets="all-linear")
            note(f"LoRA on {to}, not merged", trained(adapter, data, seed, args, to))
        for bits in args.bits:
            learned = trained(zoo.adapter("l4q", bits=bits, rank=4), data, seed, args)
            note(f"L4Q, {bits} bits", learned, packed(learned))
        write(rows, bytes_of, args)


def write(rows: dict[str, list[float]], bytes_of: dict[str, int], args: Any) -> None:
    """Rows and table, of the seeds that are through."""
    about = {"torch": torch.__version__, "machine": platform.processor() or platform.machine(), **vars(args)}
    document = {"about": {k: str(v) for k, v in about.items() if k != "cifar10"}, "rows": rows, "bytes": bytes_of}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "few_bits.json").write_text(json.dumps(document, indent=1) + "\n")
    (RESULTS / "few_bits.md").write_text(table(rows, bytes_of, args))


def table(rows: dict[str, list[float]], bytes_of: dict[str, int], args: Any) -> str:
    """Mean and standard deviation over seeds."""
    told = f"{args.shots} training and {args.held} test images of each class, {args.epochs} epochs, learning rate {args.lr:g}."
    lines = ["# Few bits", "", __doc__.split("\n\n", 2)[2].strip(), "", told, ""]
    lines += ["| | accuracy, % | each seed | bytes of the backbone, of float32's |", "| --- | ---: | --- | ---: |"]
    for name, values in rows.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        each = ", ".join(f"{100 * v:.1f}" for v in values)
        share = bytes_of[name] / bytes_of["LoRA"]
        lines.append(f"| {name} | {100 * statistics.mean(values):.1f} ± {100 * spread:.1f} | {each} | {share:.2f} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
