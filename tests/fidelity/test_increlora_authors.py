"""IncreLoRA against numbers recorded from the authors' code, and the counts and rounds of its budget.

`increlora.json` was recorded from FeiyuZhang98/IncreLoRA (commit 51a2d73): `SVDLinear`, `RankAllocator` and `compute_orth_regu`,
20 steps of Adam on the network, weights and images of `adalora_models`, the allocator called between backward and the
optimizer's step with t from 0, as their trainer does. Their first block is that of AdaLoRA's numbers, cut to one direction;
those that it grows are `later`. When their growth is over, what waits stays in their lists with e = 0, and in the mean of the
regulariser: there it was taken out of the lists, which changes none of their outputs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adalora_models import GAMMA, PLACES, RATE, SHAPE, TOTAL, backbone, batch, loss, numbers, start
from torch import Tensor

import zoo
from zoo.adapters.increlora import IncreLoRA
from zoo.train import training_hooks

RECORDED = json.loads((Path(__file__).parent / "increlora.json").read_text())
SETTINGS: dict[str, Any] = {"target_rank": 4, "added": 2, "top_h": 3, "tinit": 3, "interval": 3, "orthogonality": GAMMA}


def later(place: str, number: int, dim_out: int, dim_in: int) -> tuple[Tensor, Tensor]:
    """P (o, 1) and Q (1, i) of the direction `number` that came later."""
    seed = 5000 + 200 * sorted(PLACES.values()).index(place) + 2 * number
    return 0.1 * numbers(seed, dim_out, 1), 0.1 * numbers(seed + 1, 1, dim_in)


def ours() -> zoo.Model:
    """The same network with our adapter, its first directions as written down."""
    model = zoo.load("vit-micro", pretrained=False, num_classes=4, **SHAPE)
    theirs = backbone().state_dict()
    model.head.load_state_dict({"weight": theirs.pop("head.weight"), "bias": theirs.pop("head.bias")})
    model.backbone.load_state_dict(theirs)
    adapter = model.add_adapter(zoo.adapter("increlora", targets=("o", "up", "down"), **SETTINGS))
    model.head.requires_grad_(False)
    with torch.no_grad():
        for point, place in PLACES.items():
            part: Any = adapter.module_at(point)
            p, q = start(place, *model.points[point].weight.shape)
            part.lora_p.copy_(p[:, :1])
            part.lora_q.copy_(q[:1])
    return model.train()


def test_the_authors_run() -> None:
    """Loss, scores, every growth, gradients of every block, and the network in the end."""
    model = ours()
    adapter: Any = model.adapters["increlora"]
    parts = [adapter.module_at(point) for point in PLACES]
    hooks = training_hooks(model)
    optimizer = torch.optim.Adam(model.parameters_to_train().values(), lr=RATE)
    hooks.fit_start(optimizer, TOTAL)
    known = dict.fromkeys(PLACES, 1)
    for t in range(TOTAL):
        images, targets = batch(t)
        outputs = model(images)
        total = loss(outputs, targets) + hooks.extra_loss(outputs, targets)
        total.backward()
        assert total.item() == pytest.approx(RECORDED["loss"][t], rel=1e-5), t
        assert GAMMA * adapter.distance().item() == pytest.approx(RECORDED["orth"][t], rel=1e-5), t
        assert hooks.ready() == (t > 12)
        if t < len(RECORDED["scores"]):
            found = [float(part.sink.grad) for part in parts]
            assert found == pytest.approx(RECORDED["scores"][t], rel=1e-4, abs=1e-9)
        if t == 8:
            for part, place in zip(parts, PLACES.values()):
                for index, expected in enumerate(RECORDED["gradients"][place]):
                    check_gradients([block[index] for block in part.blocks()], expected, dim=int(index == 0))
        hooks.after_backward(t)
        if t < len(RECORDED["product"]) - 1:  # with the last growth they are dropped
            product = (adapter.scores_mean * adapter.scores_spread).tolist()
            assert product == pytest.approx(RECORDED["product"][t], rel=1e-3, abs=1e-12)
        if str(t) in RECORDED["ranks"]:
            assert [part.rank for part in parts] == RECORDED["ranks"][str(t)]
        for point, part in zip(PLACES, parts):
            for p, _, q in part.blocks()[known[point] :]:
                pairs = [later(PLACES[point], 2 * (known[point] - 1) + k, len(p), q.shape[1]) for k in range(2)]
                with torch.no_grad():
                    p.copy_(torch.cat([a for a, _ in pairs], dim=1))
                    q.copy_(torch.cat([b for _, b in pairs]))
                known[point] += 1
        optimizer.step()
        hooks.after_step(t)
        optimizer.zero_grad(set_to_none=True)
    assert [t for t, _ in adapter.grown] == [6, 9, 12]
    model.eval()
    images, expected = batch(99)[0], torch.tensor(RECORDED["logits"])
    before = model(images)
    torch.testing.assert_close(before, expected, rtol=1e-4, atol=1e-5)
    hooks.fit_end()
    torch.testing.assert_close(model(images), before, rtol=1e-5, atol=1e-6)
    for part, place in zip(parts, PLACES.values()):
        torch.testing.assert_close(part.lora_e.detach(), torch.tensor(RECORDED["e"][place]), rtol=1e-4, atol=1e-5)
    assert sum(adapter.ranks().values()) == 24


def check_gradients(blocks: list[Tensor | None], expected: list[float], dim: int) -> None:
    """The norms of the first block's gradient, and of each later direction's."""
    live = [b for b in blocks if b is not None]
    found = [float(live[0].grad.norm())]  # type: ignore[union-attr]
    for block in live[1:]:
        assert block.grad is not None
        found += [float(g.norm()) for g in (block.grad.T if dim else block.grad)]
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "rounds"),
    [({"target_rank": 2, "top_h": 2, "added": 1}, 36), ({"target_rank": 8, "top_h": 3}, 42)],
)
def test_rounds(settings: dict[str, Any], rounds: int) -> None:
    """72 projections, with the steps of the authors' scripts for MNLI and CoLA."""
    model = zoo.load("vit-b16", num_classes=0, device="meta")
    adapter: Any = model.add_adapter(IncreLoRA(tinit=100, interval=100, **settings))
    adapter.fit_start(None, None, 6700)
    schedule = adapter.schedule
    assert schedule.first == 72 and schedule.last == 72 * settings["target_rank"] and schedule.needed == rounds
    steps = [t for t in range(6700) if schedule.grows(t)]
    assert steps[0] == 200 and steps[rounds - 1] == 100 * (rounds + 1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("vit-b16", 165_960), ("swin-t", 79_488 + 72), ("swin-b", 216_576 + 144), ("clip-vit-b16", 276_480 + 144)],
)
def test_counts(name: str, expected: int) -> None:
    """Of each unit of r0: i + o of every projection, and one singular value."""
    if name.startswith("clip"):
        pytest.importorskip("open_clip")
    model = zoo.load(name, "increlora", pretrained=False, device="meta", num_classes=0)
    assert model.num_parameters(trainable=True, head=False) == expected


def test_the_paper_s_budget_on_meta() -> None:
    """With rank 2 everywhere: 331,920 on ViT-B/16 (LoRA's 331,776 and 144 singular values), 1 / 256 of the network."""
    model = zoo.load("vit-b16", num_classes=0, device="meta")
    live: Any = model.add_adapter(zoo.adapter("increlora"))
    for name, part in live.growing().items():
        live.extend(name, part, 1, 0)
    assert model.num_parameters(trainable=True, head=False) == 331_920
    live.fit_end(model)
    assert model.num_parameters(trainable=True, head=False) == 331_920 and set(live.ranks().values()) == {2}
