"""LLaMA-Adapter V2 against the authors' two networks (OpenGVLab/LLaMA-Adapter) on the same weights, and its counts.

`llama_adapter_v2.json` holds what their 7B network (image added to the prompts of late blocks, biases) and their 65B network
(biases and scales of inputs) gave around a LLaMA of width 32 with 3 blocks, filled with waves; the loss is <scores, wave>. Their
layout of queries and keys is the interleaved one, ours the library's: weights were permuted, and gradients back. Their 65B code
rounds gates and prompts to half precision; it ran in single. What it says of CLIP's tokens is here computed from CLIP's parts.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from waves import fill, shift, summary, wave

import zoo

pytest.importorskip("transformers", reason="the extra 'multimodal' is not installed")

FILE = Path(__file__).parent / "llama_adapter_v2.json"
SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 60,
}
TOKENS = 3
EYE: dict[str, Any] = {"eye_dim": 6, "visual_width": 8, "visual_heads": 2, "visual_depth": 1}


def exact_norm(norm: Any, x: Tensor) -> Tensor:
    """The library's norm in double precision."""
    return norm.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon))


def build(form: str, **settings: Any) -> zoo.Model:
    """A LLaMA and its adapter, whose values are waves."""
    model = zoo.load("llama-7b", pretrained=False, **SIZE).double()
    fill(dict(model.backbone.named_parameters()))
    for module in model.backbone.modules():
        if type(module).__name__ == "LlamaRMSNorm":  # rounds to single precision
            module.forward = partial(exact_norm, module)
    model.add_adapter(zoo.adapter("llama-adapter-v2", form=form, num_tokens=TOKENS, **EYE, **settings))
    shift(dict(model.adapters["llama-adapter-v2"].named_parameters()), 0.3)
    with torch.no_grad():
        for name, parameter in model.adapters["llama-adapter-v2"].named_parameters():
            if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "scale")):
                parameter.add_(1)
    return model.eval()


def words() -> Tensor:
    """Two texts of seven words."""
    return (torch.arange(14).view(2, 7) * 11) % 55 + 3


def eye() -> Tensor:
    """Five tokens of an image for each."""
    return wave((2, 5, 6), 3, 1.0)


def weigh(scores: Tensor) -> Tensor:
    """A number that depends on all scores."""
    return (scores * wave(tuple(scores.shape), 4, 0.1)).sum()


@pytest.mark.parametrize("form", ["7b", "65b"])
def test_scores_and_gradients(form: str) -> None:
    recorded = json.loads(FILE.read_text())[form]
    model = build(form)
    scores = model(words(), context={"image": eye()} if form == "7b" else None)
    found = scores.detach().flatten()[::7]
    torch.testing.assert_close(found, torch.tensor(recorded["logits"], dtype=torch.float64), rtol=1e-5, atol=1e-5)
    weigh(scores).backward()
    named = dict(model.adapters["llama-adapter-v2"].named_parameters())
    assert set(named) == set(recorded["gradients"])
    for name, numbers in recorded["gradients"].items():
        expected, own = torch.tensor(numbers), torch.tensor(summary(named[name].grad))
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5 * float(expected[3]), msg=name)


# -- counts ---------------------------------------------------------------------------------------------------------------


def counts(model: zoo.Model) -> dict[str, int]:
    adapter = model.adapters["llama-adapter-v2"]
    named = dict(adapter.named_parameters())
    found = {group: sum(named[n].numel() for n in names) for group, names in adapter.groups().items()}
    norms = sum(p.numel() for n, p in named.items() if "norm" in n and not n.startswith("visual."))
    gates = sum(p.numel() for n, p in named.items() if n.endswith("product.gate"))
    return {**found, "norms": norms, "gates": gates}


def test_counts_of_the_paper_on_7b() -> None:
    model = zoo.load("llama-7b", "llama-adapter-v2", device="meta")
    found = counts(model)
    assert found["tuned"] - found["norms"] == 2_719_744  # biases and scales of seven projections
    assert round(100 * 2_719_744 / 6_738_415_616, 3) == 0.040
    assert found["norms"] == 266_240
    assert found["vision"] + found["prompts"] - found["gates"] == 60_460_800 + 1_269_760
    assert found["gates"] == 32 * 32  # one block of images, 31 of prompts


def test_counts_of_the_released_7b() -> None:
    found = counts(zoo.load("llama-7b", zoo.adapter("llama-adapter-v2", form="7b"), device="meta"))
    assert found["tuned"] == 1_363_968 and found["tuned"] - found["norms"] == 1_097_728
    assert found["vision"] + found["prompts"] == 61_731_584 - 32  # their first block has gates that nothing reads


def test_counts_on_65b() -> None:
    model = zoo.load("llama-65b", zoo.adapter("llama-adapter-v2", form="65b", layers=0), device="meta")
    assert model.num_parameters(trainable=True) == 13_803_520
