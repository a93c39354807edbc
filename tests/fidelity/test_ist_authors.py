"""IST against numbers recorded from the authors' code.

`ist.json` was recorded from antgroup/importance-aware-sparse-tuning-IST-paper (commit 53ab149): `ISTCallback` around 32 steps of
Adam on a vision transformer of eight blocks with a LoRA behind each attention, one batch of 16 for steps and for its looks at the
loss. Which blocks it drew is taken from there, since draws differ between versions of torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adalora_models import RATE, SHAPE, loss, numbers
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import zoo
from zoo.train import IST, OptimizerService, ist, training_hooks

RECORDED = json.loads((Path(__file__).parent / "ist.json").read_text())
DEEP = {**SHAPE, "depth": 8}


def ours() -> zoo.Model:
    """The same network and LoRA; the head is not trained."""
    vit = VisionTransformer(num_classes=4, **DEEP)
    with torch.no_grad():
        for seed, (name, p) in enumerate(sorted(vit.named_parameters())):
            p.copy_(0.2 * numbers(seed, *p.shape) + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    model = zoo.load("vit-micro", pretrained=False, num_classes=4, **DEEP)
    theirs = vit.state_dict()
    model.head.load_state_dict({"weight": theirs.pop("head.weight"), "bias": theirs.pop("head.bias")})
    model.backbone.load_state_dict(theirs)
    adapter: Any = model.add_adapter(zoo.adapter("lora", rank=2, alpha=4.0, targets="o"))
    model.head.requires_grad_(False)
    with torch.no_grad():
        for b in range(8):
            part = adapter.module_at(f"blocks.{b}.attn.o")
            part.lora_a.copy_(0.3 * numbers(3000 + 2 * b, 2, 24))
            part.lora_b.copy_(0.3 * numbers(3001 + 2 * b, 24, 2))
    return model.train()


def test_the_authors_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What blocks are drawn in proportion to, losses of the damped, scores, and the network that is trained."""
    model = ours()
    images, targets = numbers(1000, 16, 3, 8, 8), torch.arange(16) % 4
    sampler = IST()
    hooks = training_hooks(model, [sampler])
    optimizer = torch.optim.Adam(model.parameters_to_train().values(), lr=RATE)
    service = OptimizerService.wrap(optimizer, model, total_steps=32)
    hooks.fit_start(service, 32)
    draws: list[list[int]] = []
    looks: list[list[float]] = []

    def recorded(p: Tensor, count: int, generator: torch.Generator) -> tuple[int, ...]:
        chosen = draws.pop(0)
        assert count == len(chosen)
        # theirs: sigmoid(z) for what is damped, sigmoid(-z) for what is to learn
        torch.testing.assert_close(p, (-sampler.scores).sigmoid() if count == 2 else sampler.scores.sigmoid())
        return tuple(chosen)

    def noted(scores: Tensor, sets: Any, losses: Any, rate: float) -> Tensor:
        looks.append(list(losses))
        return moved(scores, sets, losses, rate)

    moved = ist.moved
    monkeypatch.setattr(ist, "drawn", recorded)
    monkeypatch.setattr(ist, "moved", noted)
    parameters = model.parameters_to_train()
    for step, active in enumerate(RECORDED["active"]):
        draws[:] = [*RECORDED["sets"].get(str(step), []), active]
        service.batches = [(images, targets)]
        hooks.step_start(step)
        assert not draws
        if str(step) in RECORDED["scores"]:
            assert looks.pop() == pytest.approx(RECORDED["probe_losses"][str(step)], rel=1e-5)
            assert sampler.scores.tolist() == pytest.approx(RECORDED["scores"][str(step)], rel=1e-4, abs=1e-6)
        learning = {int(name.split(".")[1]) for name, p in parameters.items() if p.requires_grad}
        assert learning == set(active)
        value = loss(model(images), targets)
        assert value.item() == pytest.approx(RECORDED["losses"][step], rel=1e-5), step
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for b, expected in enumerate(RECORDED["b"]):
        part: Any = model.adapters["lora"].module_at(f"blocks.{b}.attn.o")
        assert part.lora_b[:6, 0].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert not looks and sum(sampler.updates) == 2 * 32
