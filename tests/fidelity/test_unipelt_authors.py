"""UniPELT against the authors' code (morningmoni/UniPELT), with its separate gates and with the central one, and its count.

`unipelt.json` holds outputs and gradients recorded by running their attention, LoRA and adapter in the blocks of a pre-norm ViT
whose weights and images are set by `wave` and `fill` below (float64, width 48, two blocks). None of their code is here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from waves import fill, wave

import zoo

AUTHORS: dict[str, Any] = json.loads((Path(__file__).parent / "unipelt.json").read_text())
SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3}
# their places -> ours, in a block
OURS = {
    "prefix.k": "attn.product.keys",
    "prefix.v": "attn.product.values",
    "query.a": "attn.q.lora_a",
    "query.b": "attn.q.lora_b",
    "value.a": "attn.v.lora_a",
    "value.b": "attn.v.lora_b",
    "query.gate": "attn.gates.q",
    "value.gate": "attn.gates.v",
    "adapter.down": "mlp.adapter_down",
    "adapter.up": "mlp.adapter_up",
    "adapter.gate": "mlp.gate",
}


def ours(theirs: str, central: bool) -> str:
    block, _, place = theirs.partition(".")
    place = place.removesuffix(".weight").removesuffix(".bias")
    leaf = theirs[len(f"{block}.{place}") :]
    if place == "gate":
        return f"blocks.{block}.attn.{'gate' if central else 'gates.prefix'}{leaf}"
    return f"blocks.{block}.{OURS[place]}{leaf}"


@pytest.mark.parametrize("kind", ["gates", "central"])
def test_equals_the_authors_code(kind: str) -> None:
    recorded, central = AUTHORS[kind], kind == "central"
    adapter = zoo.adapter("unipelt", num_tokens=3, rank=2, reduction=8, central=central)
    model: Any = zoo.load("vit-micro", adapter, num_classes=4, pretrained=False, **SMALL).double().train()
    fill(dict(model.backbone.named_parameters()))
    named = dict(model.adapters["unipelt"].named_parameters())
    assert {ours(key, central) for key in recorded["gradients"]} == set(named)
    with torch.no_grad():
        for i, key in enumerate(recorded["gradients"]):
            parameter = named[ours(key, central)]
            parameter.copy_(wave(tuple(parameter.shape), i + 1, 0.4))
        model.head.weight.copy_(wave((4, 48), 2, 0.5))
        model.head.bias.zero_()
    logits = model(wave((2, 3, 32, 32), 5, 1.5))
    torch.testing.assert_close(logits, torch.tensor(recorded["logits"], dtype=torch.float64), rtol=1e-9, atol=1e-9)
    F.cross_entropy(logits, torch.tensor([1, 3])).backward()
    for key, expected in recorded["gradients"].items():
        grad = named[ours(key, central)].grad
        assert grad is not None
        summary = [*grad.flatten()[:3].tolist(), grad.norm().item(), grad.sum().item()]
        torch.testing.assert_close(torch.tensor(summary), torch.tensor(expected), rtol=1e-5, atol=1e-8, msg=key)


def test_counts_on_vit_b16() -> None:
    model = zoo.load("vit-b16", num_classes=0, device="meta")
    whole = 12 * (15_360 + 24_576 + 74_544 + 3_076)
    assert whole == 1_410_672
    for config, expected in (
        ({}, whole),
        ({"methods": ("prefix",)}, 12 * (15_360 + 769)),
        ({"methods": ("lora",)}, 12 * (24_576 + 2 * 769)),
        ({"methods": ("adapter",)}, 12 * (74_544 + 769)),
        ({"central": True}, whole - 12 * 769),  # (768 + 1) * 2 in the place of three gates
    ):
        model.add_adapter(zoo.adapter("unipelt", **config), "unipelt")  # type: ignore[arg-type]
        assert model.num_parameters(trainable=True) == expected, config
        model.remove_adapter("unipelt")
