"""Put a trained `vit-micro` into the package, and write its card from the log of the run that made it.

python scripts/embed_vit_micro.py --run runs/vit-micro
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import zoo

ROOT = Path(__file__).resolve().parent.parent
CARD = """---
license: apache-2.0
library_name: adapter-zoo
pipeline_tag: image-classification
tags: [adapter-zoo, vit]
datasets: [cifar100]
---

# vit-micro

A Vision Transformer for 32 x 32 images that comes with adapter-zoo, small enough to adapt in minutes on a CPU: patch 4,
width 192, {depth} blocks, 3 heads, {parameters:,} parameters, fp16 weights of {size:.1f} MB. It is for trying methods and
for tests, not for comparison with published CIFAR-100 results: it was trained for {epochs} epochs only.

```python
import zoo
model = zoo.load("vit-micro")                                   # 100 classes of CIFAR-100
model = zoo.load("vit-micro", adapter="lora", num_classes=10)   # a task of yours
```

| measured | value |
| --- | --- |
| CIFAR-100 test accuracy ({images:,} images, read once after the last epoch) | {accuracy:.2f} % |
| training loss of the last epoch (with mixing and label smoothing) | {loss} |
| epochs | {epochs} |
| seconds of training ({device}, shared machine) | {seconds:,.0f} |
| fingerprint | `{fingerprint}` |

## Training

`scripts/pretrain_vit_micro.py`, CIFAR-100 train split (50,000 images; WebP re-encoded at quality 95, mean PSNR 36.6 dB), with the
arguments

{arguments}

Muon for the matrices of the blocks and AdamW for the rest, cosine schedule with warm-up, random crop and flip, erasing, mixup
and cutmix, label smoothing 0.1, half of the patches dropped in the first part, moving average of the weights, bf16. The machine
was shared, so the seconds say little about speed.
The first 19 epochs were run with `--epochs 24 --patch-drop-epochs 0.7`, the last three with the arguments above, which ends the
cosine two epochs earlier.
CIFAR-100 as published has 10 images that occur in both splits.

{learning}## Licence

The weights: Apache-2.0. The data: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009; no licence
stated.
"""


LEARNING = """## Adapted to another task

2,000 images of CIFAR-10 (200 of each class) for training, all 10,000 test images; mean and deviation over {seeds} seeds, the last
of {epochs} epochs (`benchmarks/learning.py`):

{table}
"""


def learning() -> str:
    """The section with the table of `benchmarks/learning.py`, if that was run on these weights."""
    results = ROOT / "benchmarks" / "results"
    if not (results / "learning.md").exists():
        return ""
    record = json.loads((results / "learning.json").read_text())
    if record["backbone"] != zoo.load("vit-micro").fingerprint:
        return ""
    seeds = record["summary"][0]["seeds"]
    return LEARNING.format(seeds=seeds, epochs=record["epochs"], table=(results / "learning.md").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/vit-micro"))
    args = parser.parse_args()
    weights = ROOT / "vision" / "weights" / "vit-micro.safetensors"
    weights.parent.mkdir(exist_ok=True)
    shutil.copyfile(args.run / "vit-micro.safetensors", weights)
    log = json.loads((args.run / "log.json").read_text())
    model = zoo.load("vit-micro")
    skip = ("data", "out", "limit_steps")
    options = {k: v for k, v in log["arguments"].items() if k not in skip}
    text = CARD.format(
        depth=len(model.backbone.blocks),  # type: ignore[arg-type]
        parameters=model.num_parameters(),
        size=weights.stat().st_size / 1e6,
        accuracy=100 * log["final"]["test_accuracy"],
        images=log["final"]["images"],
        loss=log["epochs"][-1]["loss"],
        epochs=len(log["epochs"]),
        seconds=sum(e["seconds"] for e in log["epochs"]),
        device=options.pop("device"),
        fingerprint=model.fingerprint,
        learning=learning(),
        arguments="\n".join(f"- `--{k.replace('_', '-')} {v}`" for k, v in options.items()),
    )
    (ROOT / "model_cards" / "vit-micro.md").write_text(text)
    (ROOT / "model_cards" / "vit-micro.log.json").write_text(
        json.dumps({"epochs": log["epochs"], "final": log["final"]}, indent=1) + "\n"
    )
    print(text)


if __name__ == "__main__":
    main()
