"""FacT against numbers recorded from the authors' code, and the counts of the paper.

`fact.json` holds logits and gradients of JieShibo/PETL-ViT (commit 026e4f1, `FacT/fact_tt.py` and `fact_tk.py`, their width 768
and 144 slices set to 48 and 24) on a timm ViT of 2 blocks, width 48, 3 heads, 32 px in patches of 8, in float64, r = 3, s = 0.5,
with the weights and images of `wave`. A gradient is its first three values, its norm and its sum.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo

AUTHORS: dict[str, Any] = json.loads((Path(__file__).parent / "fact.json").read_text())
SMALL: dict[str, Any] = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
# their names -> ours, and whether ours is the transpose
SHARED = {"FacTu.weight": "u", "FacTv.weight": "v", "FacTc": "c", "FacTp": "p"}
OWN = {"q": "attn.q", "k": "attn.k", "v": "attn.v", "proj": "attn.o", "fc1": "mlp.up", "fc2": "mlp.down"}


def wave(shape: tuple[int, ...], phase: int, scale: float) -> Tensor:
    n = math.prod(shape)
    angle = torch.arange(n, dtype=torch.float64) * 0.7 * (1 + phase % 7) + phase
    return (scale * angle.sin()).view(shape)


@torch.no_grad()
def fill(named: dict[str, Tensor]) -> None:
    for i, (key, parameter) in enumerate(sorted(named.items())):
        if "norm" in key and key.endswith("weight"):
            parameter.copy_(1 + wave(parameter.shape, i, 0.2))
        elif key.endswith("bias"):
            parameter.copy_(wave(parameter.shape, i, 0.1))
        else:
            tokens = "token" in key or "pos" in key
            parameter.copy_(wave(parameter.shape, i, 1.0 if tokens else 2 / math.sqrt(parameter[0].numel())))


def ours(theirs: str) -> tuple[str, bool]:
    """`blocks.0.attn.q_FacTs.weight` -> (`blocks.0.attn.q.core`, True): our cores are (r, 4r), an nn.Linear's is transposed."""
    if theirs in SHARED:
        return f"factors_48.{SHARED[theirs]}", False
    role = theirs.split(".")[-2].removesuffix("_FacTs")
    return f"{'.'.join(theirs.split('.')[:2])}.{OWN[role]}.core", role != "fc2"


@pytest.mark.parametrize("form", ["tk", "tt"])
def test_equals_the_authors_code(form: str) -> None:
    recorded = AUTHORS[form]
    adapter = zoo.adapter("fact", form=form, rank=3, scale=0.5)
    model = zoo.load("vit-micro", adapter, num_classes=4, pretrained=False, **SMALL).double().eval()
    fill(dict(model.backbone.named_parameters()))
    named = dict(model.adapters["fact"].named_parameters())
    assert {ours(key)[0] for key in recorded["gradients"]} == set(named)
    with torch.no_grad():
        for i, key in enumerate(recorded["gradients"]):
            name, turned = ours(key)
            shape = tuple(named[name].T.shape if turned else named[name].shape)
            values = wave(shape, i + 1, 0.4)
            named[name].copy_(values.T if turned else values)
        model.head.weight.copy_(wave((4, 48), 2, 0.5))  # type: ignore[union-attr,operator,arg-type]
        model.head.bias.zero_()  # type: ignore[union-attr,operator]
    logits = model(wave((2, 3, 32, 32), 5, 1.5))
    torch.testing.assert_close(logits, torch.tensor(recorded["logits"], dtype=torch.float64), rtol=1e-9, atol=1e-9)
    F.cross_entropy(logits, torch.tensor([1, 3])).backward()
    for key, expected in recorded["gradients"].items():
        name, turned = ours(key)
        grad = named[name].grad
        assert grad is not None
        grad = grad.T if turned else grad
        summary = [*grad.flatten()[:3].tolist(), grad.norm().item(), grad.sum().item()]
        torch.testing.assert_close(torch.tensor(summary), torch.tensor(expected), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("form", "counts"),
    [
        ("tt", {8: 21_504, 16: 61_440, 32: 196_608, None: 61_440}),
        ("tk", {8: 13_952, 16: 30_976, 32: 86_528, None: 86_528}),
    ],
)
def test_counts_on_vit_b16(form: str, counts: dict[int | None, int]) -> None:
    model = zoo.load("vit-b16", num_classes=0, device="meta")
    for rank, expected in counts.items():
        model.add_adapter(zoo.adapter("fact", form=form, rank=rank), "fact")
        assert model.num_parameters(trainable=True) == expected, rank
        model.remove_adapter("fact")
