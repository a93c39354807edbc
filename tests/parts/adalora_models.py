"""A small vision transformer with written-down weights, for AdaLoRA beside the authors' code and beside peft.

Every number comes from numpy's legacy generator, which gives the same ones everywhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

SHAPE: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
SETTINGS: dict[str, Any] = {"rank": 4, "target_rank": 2, "alpha": 16.0, "tinit": 3, "tfinal": 6, "interval": 3}
TOTAL, GAMMA, RATE = 20, 0.1, 0.02
# point of ours: module of timm; q, k and v stand in one projection there, which other libraries take as one
PLACES = {
    f"blocks.{b}.{point}": f"blocks.{b}.{path}"
    for b in range(2)
    for point, path in (("attn.o", "attn.proj"), ("mlp.up", "mlp.fc1"), ("mlp.down", "mlp.fc2"))
}


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def backbone() -> VisionTransformer:
    """The frozen network with its classifier."""
    model = VisionTransformer(num_classes=4, **SHAPE)
    with torch.no_grad():
        for seed, (name, p) in enumerate(sorted(model.named_parameters())):
            p.copy_(0.2 * numbers(seed, *p.shape) + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model.eval()


def batch(step: int) -> tuple[Tensor, Tensor]:
    return numbers(1000 + step, 8, 3, 8, 8), torch.arange(8) % 4


def start(place: str, dim_out: int, dim_in: int) -> tuple[Tensor, Tensor]:
    """P (o, r0) and Q (r0, i) of a projection."""
    seed = 2000 + 2 * sorted(PLACES.values()).index(place)
    rank = SETTINGS["rank"]
    return 0.1 * numbers(seed, dim_out, rank), 0.1 * numbers(seed + 1, rank, dim_in)


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets)
