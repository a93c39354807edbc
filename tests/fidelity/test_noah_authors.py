"""NOAH against the authors' supernet (ZhangYuanhan-AI/NOAH), whole and in slices; counts of the supernet and of what they found.

`noah.json` holds outputs, gradients and their count of a sub-network, recorded by running their blocks with weights and images
set by `wave` and `fill` below (float64, width 48, two blocks, supernet of width 6). None of their code is here.
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

AUTHORS: dict[str, Any] = json.loads((Path(__file__).parent / "noah.json").read_text())
SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3}
OURS = {
    "visual_prompt_token": "tokens.prompt",
    "attn.LoRA_a.weight": "attn.q.lora_a",
    "adapter.ln1.weight": "mlp.down.weight",
    "adapter.ln1.bias": "mlp.down.bias",
    "adapter.ln2.weight": "mlp.up.weight",
    "adapter.ln2.bias": "mlp.up.bias",
}
# experiments/NOAH/subnet/VTAB/ViT-B_prompt_cifar100.yaml
FOUND = {
    "prompts": (10, 5, 10, 1, 5, 1, 10, 1, 10, 5, 1, 10),
    "lora": (10, 1, 5, 5, 1, 10, 1, 1, 1, 10, 1, 1),
    "adapter": (5, 10, 10, 10, 5, 1, 1, 1, 10, 10, 10, 1),
}


def build() -> Any:
    adapter = zoo.adapter("noah", prompts=6, lora=6, adapter=6, widths=(1, 2, 3, 4, 5, 6))
    model: Any = zoo.load("vit-micro", adapter, num_classes=4, pretrained=False, **SMALL).double().eval()
    fill(dict(model.backbone.named_parameters()))
    named = dict(model.adapters["noah"].named_parameters())
    with torch.no_grad():
        for i, theirs in enumerate(AUTHORS["whole"]["gradients"]):
            block, _, name = theirs.partition(".")
            if name == "attn.LoRA_b.weight":  # (3 d, r) is one there
                values = wave((144, 6), i + 1, 0.4).chunk(3)
                for role, part in zip("qkv", values):
                    named[f"blocks.{block}.attn.{role}.lora_b"].copy_(part)
                continue
            parameter = named[f"blocks.{block}.{OURS[name]}"]
            parameter.copy_(wave(tuple(parameter.shape), i + 1, 0.4))
        model.head.weight.copy_(wave((4, 48), 2, 0.5))
        model.head.bias.zero_()
    return model


@pytest.mark.parametrize("case", AUTHORS)
def test_equals_the_authors_supernet(case: str) -> None:
    """ "holes" has no LoRA and no adapter in the last block, and prompts in all: what stays behind theirs is another matter."""
    recorded = AUTHORS[case]
    model = build()
    adapter = model.adapters["noah"]
    adapter.choose(recorded["sizes"])
    assert adapter.cost(recorded["sizes"]) == recorded["parameters"]
    logits = model(wave((2, 3, 32, 32), 5, 1.5))
    torch.testing.assert_close(logits, torch.tensor(recorded["logits"], dtype=torch.float64), rtol=1e-9, atol=1e-9)
    F.cross_entropy(logits, torch.tensor([1, 3])).backward()
    named = dict(adapter.named_parameters())
    for theirs, expected in recorded["gradients"].items():
        block, _, name = theirs.partition(".")
        if name == "attn.LoRA_b.weight":
            grads = [named[f"blocks.{block}.attn.{role}.lora_b"].grad for role in "qkv"]
            grad = None if grads[0] is None else torch.cat(grads)  # type: ignore[arg-type]
        else:
            grad = named[f"blocks.{block}.{OURS[name]}"].grad
        assert (grad is None) == (expected is None), theirs
        if grad is not None:
            summary = [*grad.flatten()[:3].tolist(), grad.norm().item(), grad.sum().item()]
            torch.testing.assert_close(torch.tensor(summary), torch.tensor(expected), rtol=1e-5, atol=1e-8, msg=theirs)


def test_counts_on_vit_b16() -> None:
    model = zoo.load("vit-b16", num_classes=0, device="meta")
    for config, expected in (
        ({"prompts": 100, "lora": 100, "adapter": 100}, 921_600 + 3_686_400 + 1_853_616),
        (FOUND, 52_992 + 144_384 + 122_954),
    ):
        model.add_adapter(zoo.adapter("noah", **config), "noah")  # type: ignore[arg-type]
        assert model.num_parameters(trainable=True) == expected
        model.remove_adapter("noah")
    assert (921_600 + 3_686_400 + 1_853_616, 52_992 + 144_384 + 122_954) == (6_461_616, 320_330)


def test_cost_and_space_of_the_published_search() -> None:
    adapter = zoo.adapter("noah", prompts=100, lora=100, adapter=100, widths=(5, 10, 50, 100))
    model: Any = zoo.load("vit-b16", adapter, num_classes=0, device="meta")
    supernet = model.adapters["noah"]
    assert supernet.cost(FOUND) == 320_330 and supernet.cost(supernet.whole()) == 6_461_616
    assert supernet.space.depths == (3, 6, 9, 12) and supernet.space.count == 17_043_520**3
