"""AdaLoRA against the paper's counts, against numbers recorded from the authors' code, and beside peft's AdaLora.

`adalora.json` was recorded from QingruZhang/AdaLoRA (commit d10f5eb): `SVDLinear`, `RankAllocator` and `compute_orth_regu`, 20
steps of Adam on the network, weights and images of `adalora_models`, the allocator called after the optimizer's step with t from
0, as their trainer does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adalora_models import GAMMA, PLACES, RATE, SETTINGS, SHAPE, TOTAL, backbone, batch, loss, start

import zoo
from zoo.adapters.parts.budget import Schedule
from zoo.train import training_hooks

RECORDED = json.loads((Path(__file__).parent / "adalora.json").read_text())


def ours(**settings: Any) -> zoo.Model:
    """The same network with our adapter, its factors as written down."""
    model = zoo.load("vit-micro", pretrained=False, num_classes=4, **SHAPE)
    theirs = backbone().state_dict()
    model.head.load_state_dict({"weight": theirs.pop("head.weight"), "bias": theirs.pop("head.bias")})
    model.backbone.load_state_dict(theirs)
    adapter = model.add_adapter(zoo.adapter("adalora", targets=("o", "up", "down"), **{**SETTINGS, **settings}))
    model.head.requires_grad_(False)
    with torch.no_grad():
        for point, place in PLACES.items():
            part: Any = adapter.module_at(point)
            p, q = start(place, *model.points[point].weight.shape)
            part.lora_p.copy_(p)
            part.lora_q.copy_(q)
    return model.train()


def run(model: zoo.Model, check: Any) -> Any:
    """All steps; `check(t, loss)` after each, before gradients are dropped. Returns the hooks, whose fit is not over."""
    hooks = training_hooks(model)
    optimizer = torch.optim.Adam(model.parameters_to_train().values(), lr=RATE)
    hooks.fit_start(optimizer, TOTAL)
    for t in range(TOTAL):
        images, targets = batch(t)
        outputs = model(images)
        total = loss(outputs, targets) + hooks.extra_loss(outputs, targets)
        total.backward()
        optimizer.step()
        hooks.after_step(t)
        check(t, total)
        optimizer.zero_grad(set_to_none=True)
    return hooks


def test_the_authors_run() -> None:
    """Loss, gradients, budget, every singular value after every pruning, and the network in the end."""
    model = ours()
    adapter: Any = model.adapters["adalora"]
    assert adapter.distance().item() == pytest.approx(RECORDED["orthogonality"], rel=1e-6)

    def check(t: int, total: Any) -> None:
        recorded = RECORDED["steps"][t]
        assert total.item() == pytest.approx(RECORDED["loss"][t], rel=1e-5)
        assert adapter.schedule.budget(t) == recorded["budget"]
        assert adapter.schedule.prunes(t) == recorded["pruned"]
        for point, place in PLACES.items():
            part = adapter.module_at(point)
            if t == 2:
                found = [float(f.grad.norm()) for f in (part.lora_p, part.lora_e, part.lora_q)]
                assert found == pytest.approx(RECORDED["gradients"][place], rel=1e-4)
            if "e" in recorded:
                expected = torch.tensor(recorded["e"][place])
                torch.testing.assert_close(part.lora_e.detach(), expected, rtol=1e-4, atol=1e-5)
                assert torch.equal(part.lora_e == 0, expected == 0)

    hooks = run(model, check)
    model.eval()
    images, expected = batch(99)[0], torch.tensor(RECORDED["logits"])
    before = model(images)
    torch.testing.assert_close(before, expected, rtol=1e-4, atol=1e-5)
    hooks.fit_end()
    ranks = {point: sum(v != 0 for v in RECORDED["steps"][-1]["e"][place]) for point, place in PLACES.items()}
    assert adapter.ranks() == ranks and sum(ranks.values()) == 12
    torch.testing.assert_close(model(images), before, rtol=1e-6, atol=1e-6)


def test_peft_beside_ours() -> None:
    """The same run in peft, step by step; its orthogonality term by hand, as it skips it without a `.loss`.

    tfinal is 5: peft prunes at T - tf in any case, the authors only if that is a multiple of the interval.
    """
    peft = pytest.importorskip("peft")
    from peft.tuners.adalora import AdaLoraConfig

    config = AdaLoraConfig(
        init_r=SETTINGS["rank"],
        target_r=SETTINGS["target_rank"],
        lora_alpha=int(SETTINGS["alpha"]),
        tinit=SETTINGS["tinit"],
        tfinal=5,
        deltaT=SETTINGS["interval"],
        total_step=TOTAL,
        target_modules=r"blocks\.\d\.(attn\.proj|mlp\.fc1|mlp\.fc2)",
    )
    theirs = peft.get_peft_model(backbone(), config).train()
    modules = {point: theirs.get_submodule(f"base_model.model.{place}") for point, place in PLACES.items()}
    with torch.no_grad():
        for point, module in modules.items():
            p, q = start(PLACES[point], module.out_features, module.in_features)
            module.lora_B["default"].copy_(p)
            module.lora_A["default"].copy_(q)
    trained = [f for m in modules.values() for f in (m.lora_A["default"], m.lora_E["default"], m.lora_B["default"])]
    optimizer = torch.optim.Adam(trained, lr=RATE)

    def check(t: int, total: Any) -> None:
        images, targets = batch(t)
        grams = [m.lora_A["default"] @ m.lora_A["default"].T for m in modules.values()]
        grams += [m.lora_B["default"].T @ m.lora_B["default"] for m in modules.values()]
        distance = torch.stack([torch.linalg.norm(g - torch.eye(len(g))) for g in grams]).mean()
        value = loss(theirs(images), targets) + GAMMA * distance
        value.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(t)
        optimizer.zero_grad()
        assert total.item() == pytest.approx(value.item(), rel=1e-5)
        for point, module in modules.items():
            e = adapter.module_at(point).lora_e
            torch.testing.assert_close(e, module.lora_E["default"][:, 0], rtol=1e-4, atol=1e-5)

    model = ours(tfinal=5)
    adapter: Any = model.adapters["adalora"]
    run(model, check)
    for point, place in PLACES.items():
        kept = next(v for k, v in config.rank_pattern.items() if place in k)
        assert (adapter.module_at(point).lora_e != 0).tolist() == kept


def test_budget_of_the_paper() -> None:
    """72 projections, 12 -> 8, README's schedule, which is also what the default fractions give for 3,000 steps."""
    adapter = zoo.adapter("adalora")
    model = zoo.load("vit-b16", num_classes=0, device="meta")
    live: Any = model.add_adapter(adapter)
    assert len(live.ranks()) == 72
    live.fit_start(model, None, 3000)
    assert live.schedule == Schedule(first=864, last=576, total=3000, warmup=500, final=1500, interval=10)
    assert [live.schedule.budget(t) for t in (0, 500, 501, 1000, 1500, 1501, 2999)] == [
        864,
        864,
        863,
        612,
        576,
        576,
        576,
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("vit-b16", 165_960), ("swin-t", 79_488 + 72), ("swin-b", 216_576 + 144), ("clip-vit-b16", 276_480 + 144)],
)
def test_counts(name: str, expected: int) -> None:
    """Of each unit of r0: i + o of every projection, and one singular value."""
    if name.startswith("clip"):
        pytest.importorskip("open_clip")
    model = zoo.load(name, "adalora", pretrained=False, device="meta", num_classes=0)
    assert model.num_parameters(trainable=True, head=False) == 12 * expected


@pytest.mark.parametrize(("width", "expected"), [(768, 2.40), (3072, 0.83)])
def test_orthogonality_at_the_start(width: int, expected: float) -> None:
    from zoo.adapters.parts.budget import distance
    from zoo.adapters.parts.triplets import Triplets

    torch.manual_seed(0)
    draws = [Triplets(width, width, 12, 1.0).lora_q for _ in range(20)]
    assert distance(draws).item() == pytest.approx(expected, rel=0.05)
