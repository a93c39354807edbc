"""FacT against numbers recorded from the authors' code, and the counts of the paper.

`fact.json` holds logits and gradients of JieShibo/PETL-ViT (commit 026e4f1, `FacT/fact_tt.py` and `fact_tk.py`, their width 768
and 144 slices set to 48 and 24) on a timm ViT of 2 blocks, width 48, 3 heads, 32 px in patches of 8, in float64, r = 3, s = 0.5,
with the weights and images of `wave`. A gradient is its first three values, its norm and its sum.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from waves import SMALL, fill, fill_head, learn, pictures, summary, wave

import zoo

AUTHORS: dict[str, Any] = json.loads((Path(__file__).parent / "fact.json").read_text())
# their names -> ours, and whether ours is the transpose
SHARED = {"FacTu.weight": "u", "FacTv.weight": "v", "FacTc": "c", "FacTp": "p"}
OWN = {"q": "attn.q", "k": "attn.k", "v": "attn.v", "proj": "attn.o", "fc1": "mlp.up", "fc2": "mlp.down"}


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
    fill_head(model.head)  # type: ignore[arg-type]
    logits = model(pictures())
    torch.testing.assert_close(logits, torch.tensor(recorded["logits"], dtype=torch.float64), rtol=1e-9, atol=1e-9)
    learn(logits)
    for key, expected in recorded["gradients"].items():
        name, turned = ours(key)
        grad = named[name].grad
        assert grad is not None
        found = torch.tensor(summary(grad.T if turned else grad))
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-8)


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
