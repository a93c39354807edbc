"""A config of mmsegmentation that trains a backbone of ours on a folder of images and masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dense_data import SMALL


def config(data: Path, work: Path, iterations: int = 6, adapter: Any = None, **backbone: Any) -> dict[str, Any]:
    """As a dict for `mmengine.config.Config`."""
    mine = {"name": "swin-t", "pretrained": False, "seed": 0, **SMALL["swin"], **backbone}
    channels = [8, 16]
    steps: list[dict[str, Any]] = [
        {"type": "LoadImageFromFile"},
        {"type": "LoadAnnotations"},
        {"type": "Resize", "scale": (32, 32), "keep_ratio": False},
        {"type": "PackSegInputs"},
    ]
    dataset = {
        "type": "BaseSegDataset",
        "data_root": str(data),
        "data_prefix": {"img_path": "images", "seg_map_path": "masks"},
        "img_suffix": ".jpg",
        "seg_map_suffix": ".png",
        "metainfo": {"classes": ("dark", "bright"), "palette": [[0, 0, 0], [255, 255, 255]]},
        "pipeline": steps,
    }
    one: dict[str, Any] = {"batch_size": 2, "num_workers": 0, "dataset": dataset}
    # mmseg measures at the size of the files, so maps are read behind the resize
    late = [steps[0], steps[2], steps[1], steps[3]]
    measured = {
        **one,
        "dataset": {**dataset, "pipeline": late},
        "sampler": {"type": "DefaultSampler", "shuffle": False},
    }
    return {
        "default_scope": "mmseg",
        "custom_imports": {"imports": ["vision.mmseg"], "allow_failed_imports": False},
        "model": {
            "type": "EncoderDecoder",
            "data_preprocessor": {
                "type": "SegDataPreProcessor",
                "mean": [123.675, 116.28, 103.53],
                "std": [58.395, 57.12, 57.375],
                "bgr_to_rgb": True,
                "pad_val": 0,
                "seg_pad_val": 255,
                "size": (32, 32),
            },
            "backbone": {"type": "ZooBackbone", "adapter": adapter, **mine},
            "decode_head": {
                "type": "SegformerHead",
                "in_channels": channels,
                "in_index": [0, 1],
                "channels": 16,
                "num_classes": 2,
                "norm_cfg": {"type": "BN", "requires_grad": True},
                "align_corners": False,
                "loss_decode": {"type": "CrossEntropyLoss"},
            },
            "train_cfg": {},
            "test_cfg": {"mode": "whole"},
        },
        "train_dataloader": {**one, "sampler": {"type": "InfiniteSampler", "shuffle": True}},
        "val_dataloader": measured,
        "test_dataloader": measured,
        "val_evaluator": {"type": "IoUMetric", "iou_metrics": ["mIoU"]},
        "test_evaluator": {"type": "IoUMetric", "iou_metrics": ["mIoU"]},
        "train_cfg": {"type": "IterBasedTrainLoop", "max_iters": iterations, "val_interval": iterations},
        "val_cfg": {"type": "ValLoop"},
        "test_cfg": {"type": "TestLoop"},
        "optim_wrapper": {"type": "OptimWrapper", "optimizer": {"type": "AdamW", "lr": 0.01, "weight_decay": 0.0}},
        "default_hooks": {"checkpoint": {"type": "CheckpointHook", "by_epoch": False, "interval": iterations}},
        "log_level": "ERROR",
        "randomness": {"seed": 0},
        "work_dir": str(work),
    }
