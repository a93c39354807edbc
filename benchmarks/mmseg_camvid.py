"""mmsegmentation's runner with a backbone of ours on CamVid, from training to the test split.

    python benchmarks/mmseg_camvid.py --data <folder of the packs>/camvid --out run/ --adapter lora --iterations 400

The Parquet pack is written out as the folders that mmseg reads; class 11 (unlabelled) becomes 255. swin-micro, a
SegFormer head; validated at the end and tested, both at the size of the files (180 x 240). Prints one JSON line.
"""

from __future__ import annotations

import argparse
import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image


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
    load, maps, pack = {"type": "LoadImageFromFile"}, {"type": "LoadAnnotations"}, {"type": "PackSegInputs"}
    resize = {"type": "Resize", "scale": size[::-1], "keep_ratio": False}

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
        return {"batch_size": 8, "num_workers": 0, "dataset": dataset, **options}

    still = {"type": "DefaultSampler", "shuffle": False}
    measured = [load, resize, maps, pack]
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
            [load, maps, resize, {"type": "RandomFlip", "prob": 0.5}, pack],
            sampler={"type": "InfiniteSampler", "shuffle": True},
        ),
        "val_dataloader": loader("val", measured, sampler=still),
        "test_dataloader": loader("test", measured, sampler=still),
        "val_evaluator": {"type": "IoUMetric", "iou_metrics": ["mIoU"]},
        "test_evaluator": {"type": "IoUMetric", "iou_metrics": ["mIoU"]},
        "train_cfg": {"type": "IterBasedTrainLoop", "max_iters": iterations, "val_interval": iterations},
        "val_cfg": {"type": "ValLoop"},
        "test_cfg": {"type": "TestLoop"},
        "optim_wrapper": {"type": "OptimWrapper", "optimizer": {"type": "AdamW", "lr": 2e-3, "weight_decay": 0.01}},
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


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--adapter", default="lora", help="a method; none trains the head alone")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(96, 128), help="height and width of what the backbone sees"
    )
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    from mmengine.config import Config
    from mmengine.runner import Runner

    import vision.mmseg  # noqa: F401  # what `custom_imports` does where a config is read from a file

    adapter = None if given.adapter == "none" else given.adapter
    names = written(given.data, given.out / "camvid")
    work = given.out / f"{given.adapter}-{given.seed}"
    size = (given.size[0], given.size[1])
    runner = Runner.from_cfg(
        Config(config(given.out / "camvid", names, work, adapter, size, given.iterations, given.seed))
    )
    runner.train()
    found = {k: round(float(v), 2) for k, v in runner.test().items()}
    trained = sum(p.numel() for p in runner.model.backbone.parameters() if p.requires_grad)
    print(
        json.dumps(
            {
                "adapter": given.adapter,
                "seed": given.seed,
                "trained": trained,
                "size": size,
                "iterations": given.iterations,
                **found,
            }
        )
    )


if __name__ == "__main__":
    main()
