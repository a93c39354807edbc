"""Publish adapters that `zoo bench compare --keep` trained beside the small backbones, with their cards.

    python scripts/ship_compared.py <out of the comparison> --data-root <folder of data sets>
    python scripts/ship_compared.py <out> --only 'flowers17/lora-*' 'esc10/*'

The first seed's adapter of each method and data set. Weights are rounded to fp16 first; the accuracy in the card is that of the
rounded weights on all test items, or on `--test-items` of them. The learning rate is the one that the search chose on validation
items; no test item chose anything. An adapter that ships already is left as it is without `--again`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path

import torch

import zoo
from zoo.bench.sets import named_sets, ready

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 1_000_000  # bytes of one adapter
SETS = {
    "cifar10": ("CIFAR-10", "https://www.cs.toronto.edu/~kriz/cifar.html"),
    "digits": (
        "Handwritten digits (scikit-learn)",
        "https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
    ),
    "flowers17": ("Oxford 17 Flowers", "https://www.robots.ox.ac.uk/~vgg/data/flowers/17/"),
    "orl_faces": ("ORL faces (40 identities)", "https://cam-orl.co.uk/facedatabase.html"),
    "fsdd": ("Free Spoken Digit Dataset", "https://github.com/Jakobovski/free-spoken-digit-dataset"),
    "fsdd-speakers": ("Free Spoken Digit Dataset, speakers", "https://github.com/Jakobovski/free-spoken-digit-dataset"),
    "esc10": ("ESC-10", "https://github.com/karolpiczak/ESC-50"),
}


def published(backbone: str, folder: Path) -> str:
    """`vit-micro-spt-adapter-flowers17` of `flowers17/spt_form=adapter-43105`."""
    label = folder.name.rpartition("-")[0]
    words = [label.partition("_")[0], *re.findall(r"=([A-Za-z][\w-]*?)(?=_|$)", label)]
    return "-".join([backbone, *words, folder.parent.name.replace("_", "-")])


def ship(folder: Path, shots: int | None, root: Path, again: bool, items: int | None) -> str:
    """Round, measure and write one adapter; returns what to print."""
    model = zoo.load(adapter=folder)
    weights = model.family.weights_folder
    assert weights is not None, f"{model.backbone_name} has no folder of weights"
    name = published(model.backbone_name, folder)
    if (weights / name).exists() and not again:
        return f"{name}: ships already"
    with torch.no_grad():
        for parameter in model.parameters_to_train().values():
            parameter.copy_(parameter.half())
    sets = named_sets(type(model.family), folder.parent.name, root=root, shots=shots, test_items=items)
    found = zoo.evaluate(model, ready(model, sets.test), record="", progress=False)
    title, url = SETS[folder.parent.name]
    model.record |= {
        "task": "audio-classification" if "audio" in model.family.modality else "image-classification",
        "data": {"name": title, "url": url, "train": len(sets.train), "test": len(sets.test)},
        "metrics": {"test": {"accuracy": round(found["accuracy"], 4)}},
        "license": "apache-2.0",
    }
    saved = model.save_adapter(weights / name, dtype=torch.float16)
    if (size := (saved / "adapter_model.safetensors").stat().st_size) >= LARGEST:
        shutil.rmtree(saved)
        return f"{name}: left out, {size:,} bytes are too many"
    (ROOT / "model_cards" / f"{name}.md").write_text((saved / "README.md").read_text())
    return f"{name}: {100 * found['accuracy']:.1f} % of {len(sets.test)} test items, {size:,} bytes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of a comparison, with adapters/ and comparison.json")
    parser.add_argument("--only", nargs="*", default=["*"], help="patterns of <data>/<label>")
    default = Path(os.environ.get("ZOO_TEST_DATA", "../shared/data"))
    parser.add_argument("--data-root", type=Path, default=default, help="folder of data sets")
    parser.add_argument("--test-items", type=int, help="measure on so many test items; by default on all")
    parser.add_argument("--again", action="store_true", help="replace what ships already")
    args = parser.parse_args()
    shots = json.loads((args.out / "comparison.json").read_text())["protocol"]["shots"]
    for config in sorted((args.out / "adapters").glob("*/*/adapter_config.json")):
        folder = config.parent
        if any(fnmatch(f"{folder.parent.name}/{folder.name}", pattern) for pattern in args.only):
            print(ship(folder, shots, args.data_root, args.again, args.test_items), flush=True)


if __name__ == "__main__":
    main()
