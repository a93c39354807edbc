"""mmsegmentation's runner with a backbone of ours on CamVid, from training to the test split.

    python benchmarks/mmseg_camvid.py --data <folder of the packs>/camvid --out run/

The Parquet pack is written out as the folders that mmseg reads; class 11 (unlabelled) becomes 255. swin-micro and a
SegFormer head, with an adapter and without ("none": the head alone is trained), at a rate that was fixed beforehand. The runner
validates once, behind the last iteration, and then tests, both at the size of the files (180 x 240): nothing is chosen. Writes
results/mmseg_camvid.json and mmseg_camvid.md, a row as soon as it is there; a run that was cut off goes on with the next row.
"""

from __future__ import annotations

import argparse
import io
import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from zoo.bench.report import mean_and_deviation
from zoo.disk import write_file

RESULTS = Path(__file__).parent / "results"
BATCH = 8
RATE = 2e-3  # of adapter and head
MEASURES = {"mIoU": "test mIoU, %", "mAcc": "mean accuracy of the classes, %", "aAcc": "accuracy of the pixels, %"}


def written(pack: Path, place: Path) -> list[str]:
    """`<place>/<split>/images` and `masks`; the names of the classes."""
    names = json.loads((pack / "classes.json").read_text())[:-1]
    for split in ("train", "val", "test"):
        if (place / split / "done").exists():
            continue
        for kind in ("images", "masks"):
            (place / split / kind).mkdir(parents=True, exist_ok=True)
        for row in pq.read_table(pack / f"{split}.parquet").to_pylist():
            stem = Path(row["name"]).stem
            (place / split / "images" / f"{stem}.jpg").write_bytes(row["image"])
            mask = np.array(Image.open(io.BytesIO(row["mask"])))
            Image.fromarray(np.where(mask == len(names), 255, mask).astype(np.uint8)).save(
                place / split / "masks" / f"{stem}.png"
            )
        (place / split / "done").touch()
    return names


def config(
    data: Path, names: list[str], work: Path, adapter: str | None, size: tuple[int, int], iterations: int, seed: int
) -> dict[str, Any]:
    """What mmengine is given."""
    load, maps, pack = ({"type": name} for name in ("LoadImageFromFile", "LoadAnnotations", "PackSegInputs"))
    resize: dict[str, Any] = {"type": "Resize", "scale": size[::-1], "keep_ratio": False}

    flip: dict[str, Any] = {"type": "RandomFlip", "prob": 0.5}

    def loader(split: str, steps: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
        dataset = {
            "type": "BaseSegDataset",
            "data_root": str(data / split),
            "data_prefix": {"img_path": "images", "seg_map_path": "masks"},
            "img_suffix": ".jpg",
            "seg_map_suffix": ".png",
            "metainfo": {"classes": tuple(names), "palette": [[i * 20] * 3 for i in range(len(names))]},
            "pipeline": steps,
        }
        return {"batch_size": BATCH, "num_workers": 0, "dataset": dataset, **options}

    still: dict[str, Any] = {"type": "DefaultSampler", "shuffle": False}
    measured: list[dict[str, Any]] = [load, resize, maps, pack]
    return {
        "default_scope": "mmseg",
        "custom_imports": {"imports": ["vision.mmseg"], "allow_failed_imports": False},
        "model": {
            "type": "EncoderDecoder",
            "data_preprocessor": {
                "type": "SegDataPreProcessor",
                "mean": [0.5071 * 255, 0.4866 * 255, 0.4409 * 255],
                "std": [0.2673 * 255, 0.2564 * 255, 0.2762 * 255],
                "bgr_to_rgb": True,
                "pad_val": 0,
                "seg_pad_val": 255,
                "size": size,
            },
            "backbone": {
                "type": "ZooBackbone",
                "name": "swin-micro",
                "adapter": adapter,
                "img_size": size,
                "seed": seed,
            },
            "decode_head": {
                "type": "SegformerHead",
                "in_channels": [48, 96, 192],
                "in_index": [0, 1, 2],
                "channels": 128,
                "num_classes": len(names),
                "norm_cfg": {"type": "BN", "requires_grad": True},
                "align_corners": False,
                "loss_decode": {"type": "CrossEntropyLoss"},
            },
            "train_cfg": {},
            "test_cfg": {"mode": "whole"},
        },
        "train_dataloader": loader(
            "train",
            [load, maps, resize, flip, pack],
            sampler={"type": "InfiniteSampler", "shuffle": True},
        ),
        "val_dataloader": loader("val", measured, sampler=still),
        "test_dataloader": loader("test", measured, sampler=still),
        "val_evaluator": {"type": "IoUMetric", "iou_metrics": ["mIoU"]},
        "test_evaluator": {"type": "IoUMetric", "iou_metrics": ["mIoU"]},
        "train_cfg": {"type": "IterBasedTrainLoop", "max_iters": iterations, "val_interval": iterations},
        "val_cfg": {"type": "ValLoop"},
        "test_cfg": {"type": "TestLoop"},
        "optim_wrapper": {"type": "OptimWrapper", "optimizer": {"type": "AdamW", "lr": RATE, "weight_decay": 0.01}},
        "param_scheduler": [
            {"type": "PolyLR", "power": 1.0, "begin": 0, "end": iterations, "eta_min": 0.0, "by_epoch": False}
        ],
        "default_hooks": {
            "checkpoint": {"type": "CheckpointHook", "by_epoch": False, "interval": iterations},
            "logger": {"type": "LoggerHook", "interval": 50},
        },
        "log_processor": {"by_epoch": False},
        "randomness": {"seed": seed},
        "work_dir": str(work),
    }


def attempt(data: Path, out: Path, adapter: str, seed: int, size: tuple[int, int], iterations: int) -> dict[str, Any]:
    """Train and test once: what was trained, and what the runner's evaluators found."""
    from mmengine.config import Config
    from mmengine.runner import Runner

    import vision.mmseg  # noqa: F401  # what `custom_imports` does where a config is read from a file

    names = written(data, out / "camvid")
    method = None if adapter == "none" else adapter
    work = out / f"{adapter}-{seed}-{iterations}"
    began = time.perf_counter()
    runner = Runner.from_cfg(Config(config(out / "camvid", names, work, method, size, iterations, seed)))
    runner.train()
    val = runner.message_hub.get_scalar("val/mIoU").current()
    found = {key: round(float(value), 2) for key, value in runner.test().items()}
    heads = runner.model.decode_head
    return {
        "adapter": adapter,
        "seed": seed,
        "trained": sum(p.numel() for p in runner.model.backbone.parameters() if p.requires_grad),
        "head": sum(p.numel() for p in heads.parameters() if p.requires_grad),
        "seconds": round(time.perf_counter() - began, 1),
        "val mIoU": round(float(val), 2),
        **{key: found[key] for key in MEASURES},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Means and standard deviations over seeds, in Markdown."""
    lines = ["| adapter | seeds | trained beside the head | val mIoU, % | " + " | ".join(MEASURES.values()) + " |"]
    lines.append("| --- | ---: | ---: | ---: |" + " ---: |" * len(MEASURES))
    for adapter in dict.fromkeys(r["adapter"] for r in rows):
        found = [r for r in rows if r["adapter"] == adapter]
        cells = [mean_and_deviation([r[key] for r in found]) for key in ("val mIoU", *MEASURES)]
        lines.append(f"| {adapter} | {len(found)} | {found[0]['trained']:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="what the runner writes: folders, checkpoints, logs")
    parser.add_argument("--adapters", nargs="+", default=["none", "lora"], help="methods; none trains the head alone")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(48, 64), help="height and width of what the backbone sees"
    )
    parser.add_argument("--iterations", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=Path, default=RESULTS / "mmseg_camvid.json", help="file of the rows")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    settings = {"size": list(given.size), "iterations": given.iterations, "batch_size": BATCH, "lr": RATE}
    record: dict[str, Any] = {"settings": settings, "rows": []}
    if given.rows.exists():
        record = json.loads(given.rows.read_text())
        if record["settings"] != settings:
            raise SystemExit(f"{given.rows} is of other settings, {record['settings']}; name another file by --rows")
    for seed in range(given.seeds):
        for adapter in given.adapters:
            if any((r["adapter"], r["seed"]) == (adapter, seed) for r in record["rows"]):
                continue
            found = attempt(given.data, given.out, adapter, seed, (given.size[0], given.size[1]), given.iterations)
            record["rows"].append(found)
            write_file(given.rows, (json.dumps(record, indent=1) + "\n").encode())
            print(json.dumps(found), flush=True)
    given.rows.with_suffix(".md").write_text(table(record["rows"]))
    print(table(record["rows"]))


if __name__ == "__main__":
    main()
