"""Light-PEFT against the authors' code (gccnlp/Light-PEFT), and the counts on ViT-B/16.

`light_peft.json` holds what their LoRA layer, their step, their averages over the second half of six steps (one of which gives
0 / 0) and their four prunings give in float64, for values that are set by `value` below. None of their code is here.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from zoo.adapters.light_peft import LightPEFT
from zoo.adapters.parts.estimated import Estimated

FILE = Path(__file__).parent / "light_peft.json"
IN, OUT, RANK, ALPHA = 10, 14, 4, 8.0
BLOCKS, HEADS, NEURONS = 3, 6, 40
POINTS = [
    f"blocks.{n}.{r}" for n in range(BLOCKS) for r in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")
]


def value(name: str, shape: tuple[int, ...]) -> Tensor:
    """Values that belong to a name."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    std = 1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.1
    return torch.from_numpy(std * random.standard_normal(shape))


@pytest.fixture(scope="module")
def theirs() -> dict[str, Any]:
    return json.loads(FILE.read_text())  # type: ignore[no-any-return]


def test_the_same_scores(theirs: dict[str, Any]) -> None:
    part = Estimated(IN, OUT, RANK, ALPHA / RANK, 0.0, 0).double().train()
    with torch.no_grad():
        part.lora_a.copy_(value("lora_a", (RANK, IN)))
        part.lora_b.copy_(value("lora_b", (OUT, RANK)))
    weight = value("weight", (OUT, IN))
    for n in range(6):
        part.measuring = n >= 3
        x = value(f"x{n}", (2, 5, IN)) * 3
        if n in theirs["nan_steps"]:
            x[1, 2] = 0
        part.zero_grad()
        y = Estimated.linear_group(((part, 0, OUT),), F.linear, x, weight, None)
        (y * value(f"probe{n}", (2, 5, OUT))).sum().backward()
        if part.measuring:
            part.close_step()
    assert theirs["nan_steps"] == [4] and part.module_score[1] == 3
    # the norms are formed in float32
    assert math.isclose(float(part.module_score[0]) / 3, theirs["module"], rel_tol=1e-6)
    torch.testing.assert_close(
        part.rank_score / 3, torch.tensor(theirs["ranks"], dtype=torch.float64), rtol=1e-9, atol=0
    )


def test_the_same_decisions(theirs: dict[str, Any]) -> None:
    size = {
        "img_size": 16,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": BLOCKS,
        "num_heads": HEADS,
        "mlp_ratio": NEURONS / 24,
    }
    model = zoo.load("vit-micro", pretrained=False, num_classes=5, **size)
    adapter: Any = model.add_adapter(LightPEFT(rank=RANK))
    model.double()
    parts = adapter.parts()
    assert list(parts) == POINTS
    with torch.no_grad():
        for n in range(BLOCKS):
            parts[f"blocks.{n}.attn.o"].gate.copy_(1 + value(f"heads{n}", (HEADS,)))
            parts[f"blocks.{n}.mlp.down"].gate.copy_(1 + value(f"neurons{n}", (NEURONS,)))
        parts["blocks.1.attn.o"].gate[3] = -5.0  # influential, and taken out: coefficients are compared with their sign
        for name, part in parts.items():
            part.module_score.copy_(torch.tensor([2 * float(value(f"{name}module", (1,)).abs()), 2.0]))
            part.rank_score.copy_(2 * value(f"{name}ranks", (RANK,)).abs())
        parts[theirs["modules"][0]].rank_score.fill_(2e-9)
    found = adapter.decisions(model)
    for kind in ("heads", "neurons"):
        assert found[kind] == {f"blocks.{n}": gone for n, gone in enumerate(theirs[kind])}
    assert 3 in found["heads"]["blocks.1"]
    assert found["ranks"] == {name: kept for name, kept in theirs["kept"].items() if kept}
    whole = adapter.decisions(model, 0, 0, 0.75, 0)
    assert list(whole["ranks"]) == theirs["modules"] and whole["heads"] == whole["neurons"] == {}


def test_counts_on_vit_b16() -> None:
    model = zoo.load("vit-b16", LightPEFT(), pretrained=False, num_classes=0, device="meta")
    assert model.num_parameters(trainable=True) == 165_888 * 8 + 12 * (12 + 3072)
    adapter: Any = model.adapters["light-peft"]
    parts = [p for p in adapter.parts().values() if p.low_rank]
    scores = torch.arange(72.0).quantile(0.75)
    assert len(parts) == 72 and int((torch.arange(72.0) > scores).sum()) == 18
    small = zoo.prune(model, heads={n: range(4) for n in range(12)})
    block: Any = small.backbone.blocks[0]  # type: ignore[union-attr,index]
    assert block.attn.qkv.out_features == 3 * 512 and block.attn.proj.in_features == 512
    part = small.adapters["light-peft"].module_at("blocks.0.attn.o")  # type: ignore[operator]
    assert part.lora_a.shape == (8, 512) and part.gate.shape == (8,)
    third = zoo.prune(small, neurons={n: range(1024) for n in range(12)})
    assert sum(p.numel() for p in third.backbone.parameters()) == 57_465_600
