"""A made-up adapter, a small model and a folder's config, for the tests of the folder format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import zoo
from zoo.disk.layout import CONFIG, WEIGHTS, pack, unpack

SMALL = {"pretrained": False, "depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32}
POINT = "lora/blocks.0.attn.q.lora_a"


def parts(value: float = 1.0) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, Any], str]:
    """Config, tensors, record and card of a made-up adapter in which everything says `value`."""
    config = {
        "backbone": {"name": "vit-ti16", "fingerprint": "v1:ab", "kwargs": {"img_size": 32}},
        "adapters": [{"name": "lora", "method": "lora", "config": {"rank": 2, "alpha": value}, "plan": None}],
        "head": {"num_classes": 2, "classes": ["cat", "dog"]},
    }
    tensors = {
        POINT: torch.full((2, 300), value),
        "lora/blocks.1.norm1.scale": torch.full((7,), value, dtype=torch.bfloat16),
        "lora/steps": torch.tensor(int(value)),
        "head/weight": torch.full((2, 3), value, dtype=torch.float16),
    }
    return config, tensors, {"metrics": {"accuracy": value}}, f"# card {value}\n"


def small_model(seed: int = 0, adapter: Any = "lora", **options: Any) -> zoo.Model:
    """A tiny ViT, the same for the same seed, whose trainable values are random and not those of its start."""
    torch.manual_seed(seed)
    model = zoo.load("timm:vit_tiny_patch16_224", adapter=adapter, **{"num_classes": 3, **SMALL, **options})
    with torch.no_grad():
        for parameter in model.parameters_to_train().values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def edit(folder: Path, change: Callable[[dict[str, Any]], Any], *, sign: bool = True) -> None:
    """Change the config: by hand alone, or as somebody would who makes the copy in the weights file and its checksum fit."""
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    if sign:
        tensors, copy, _ = unpack((folder / WEIGHTS).read_bytes(), folder / WEIGHTS)
        own = {key: value for key, value in config.items() if key != "checksum"}
        data, digest = pack(own, copy["metrics"], copy["card"], tensors)
        (folder / WEIGHTS).write_bytes(data)
        if "checksum" in config:
            config["checksum"] = digest
    (folder / CONFIG).write_text(json.dumps(config))
