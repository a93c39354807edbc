"""Saved adapters that an earlier version wrote (tests/disk/written): which there are, and how their models are made.

The backbones are tiny and their weights are a formula, so that what the folders hold does not hang on anybody's random numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WRITTEN = Path(__file__).resolve().parents[1] / "disk" / "written"
# Folder -> family, method and settings. All methods on one family, and one method on all families.
FOLDERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit-lora": ("vit", "lora", {"rank": 2}),
    "vit-dora": ("vit", "lora", {"rank": 2, "dora": True, "targets": "q,up"}),
    "vit-adapter": ("vit", "adapter", {"rank": 2, "form": "houlsby"}),
    "vit-adaptformer": ("vit", "adapter", {"rank": 2, "form": "adaptformer"}),
    "vit-bitfit": ("vit", "bitfit", {}),
    "vit-ia3": ("vit", "ia3", {}),
    "vit-linear": ("vit", "linear", {}),
    "vit-norm": ("vit", "norm", {}),
    "vit-prefix": ("vit", "prefix", {"num_tokens": 2}),
    "vit-spt": ("vit", "spt", {"budget": 0.01, "rank": 2}),
    "vit-ssf": ("vit", "ssf", {}),
    "vit-vpt": ("vit", "vpt", {"num_tokens": 2}),
    "vit-vqt": ("vit", "vqt", {"num_tokens": 1}),
    **{
        f"{family}-lora": (family, "lora", {"rank": 1})
        for family in ("swin", "groupmamba", "clip", "ast", "wav2vec2", "vl-t5", "vl-bart", "dit", "cogvideox")
    },
}


@torch.no_grad()
def fill(module: nn.Module, scale: float = 0.1) -> None:
    """Values by a formula: those of a vector near what they were, those of a matrix small."""
    for k, (_, p) in enumerate(sorted(module.named_parameters())):
        wave = torch.sin(torch.arange(p.numel(), dtype=torch.float64) * 0.7 + k).reshape(p.shape).to(p.dtype)
        p.copy_(wave * scale + (1.0 if p.ndim == 1 and k % 2 else 0.0))


def inputs(model: Any) -> tuple[Tensor, ...]:
    """A batch of two, by a formula; whole numbers (words, steps, labels) small enough for every tiny member."""
    found = []
    for k, x in enumerate(model.family.tiny_batch()):
        count = torch.arange(x.numel(), dtype=torch.float64)
        if x.is_floating_point():
            found.append(torch.sin(count * 0.37 + k).abs().reshape(x.shape).to(x.dtype))
        elif x.numel() and int(x.max()) > 1:
            found.append((count % 5 + 3).reshape(x.shape).to(x.dtype))
        else:
            found.append(torch.ones_like(x))
    return tuple(found)


@torch.no_grad()
def numbers(model: Any) -> list[float]:
    """Sums over what the model answers, each with other weights: four numbers that tell two answers apart."""
    answer = model.eval()(*inputs(model)).double().flatten()
    count = torch.arange(len(answer), dtype=torch.float64)
    return [float((answer * torch.cos(count * f)).mean()) for f in (0.0, 0.3, 1.1, 2.3)]
