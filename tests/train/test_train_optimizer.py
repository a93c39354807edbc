"""The optimizer service: adding, dropping, replacing, freezing and editing while an optimizer runs, against torch's own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from train_parts import tiny_model

from zoo.errors import ConfigError, MismatchError
from zoo.train import OptimizerService, training_hooks


def parameter(seed: int, *shape: int) -> Parameter:
    return Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def pull(*parameters: Parameter) -> None:
    """Gradients as of the sum of squares plus one."""
    for p in parameters:
        p.grad = 2 * p.detach() + 1


def service(**options: Any) -> OptimizerService:
    return OptimizerService(**{"lr": 0.1, "total_steps": 10, "schedule": "constant", **options})


def test_one_group_is_torchs_adamw() -> None:
    a, b = parameter(0, 3, 2), parameter(0, 3, 2)
    mine = service(weight_decay=0.2, options={"betas": (0.8, 0.9)})
    mine.add({"a": a})
    theirs = torch.optim.AdamW([b], lr=0.1, weight_decay=0.2, betas=(0.8, 0.9))
    for _ in range(4):
        for p, stepper in ((a, mine), (b, theirs)):
            pull(p)
            stepper.step()
            stepper.zero_grad()
    assert torch.equal(a, b) and a.grad is None


def test_added_parameters_have_a_schedule_from_their_birth() -> None:
    """IncreLoRA: what is born at step 4 warms up then, and ends with the rest."""
    old, new = parameter(0, 2), parameter(1, 2)
    opt = service(schedule="cosine", warmup=2)
    opt.add({"old": old})
    rates: dict[str, list[float]] = {"old": [], "new": []}
    for step in range(10):
        if step == 4:
            opt.add({"new": new}, lr_scale=0.5)
        pull(old, new)
        opt.step()
        for name in opt.parameters:
            rates[name].append(opt.current_lr(name))
    assert rates["old"] == pytest.approx(
        [0.1 / 3, 0.2 / 3] + [0.05 * (1 + math.cos(math.pi * (s - 2) / 8)) for s in range(2, 10)]
    )
    assert rates["new"] == pytest.approx(
        [0.05 / 3, 0.1 / 3] + [0.025 * (1 + math.cos(math.pi * (s - 2) / 4)) for s in range(2, 6)]
    )
    assert opt.state("new")["step"] == 6  # Adam's bias correction counts from its birth too
    with pytest.raises(ConfigError, match="'new' is trained already"):
        opt.add({"new": new})


def test_dropped_parameters_stand_still() -> None:
    a, b = parameter(0, 2), parameter(1, 2)
    opt = service()
    opt.add({"x/a": a, "x/b": b})
    pull(a, b)
    opt.step()
    opt.drop("x/a")
    before, other = a.detach().clone(), b.detach().clone()
    pull(a, b)
    opt.step()
    assert torch.equal(a, before) and not torch.equal(b, other) and list(opt.parameters) == ["x/b"]
    with pytest.raises(ConfigError, match=r"No trained parameter is named 'x/a'"):
        opt.drop("x/a")


def test_frozen_parameters_stand_still_though_they_have_momentum_and_decay() -> None:
    a, b = parameter(0, 2, 2), parameter(1, 2, 2)
    opt = service(optimizer="sgd", weight_decay=0.5)
    opt.add({"a": a, "b": b})
    pull(a, b)
    opt.step()
    opt.freeze("a")
    before = a.detach().clone()
    assert a.grad is None and not a.requires_grad
    pull(b)
    opt.step()
    assert torch.equal(a, before)
    opt.unfreeze("*")
    pull(a)
    opt.step()
    assert a.requires_grad and not torch.equal(a, before)


def test_replacing_keeps_the_matching_state() -> None:
    """A slice of rows goes on as these rows of the whole would have; a growth keeps the old rows' state."""
    whole, twin = parameter(0, 4, 3), parameter(0, 4, 3)
    mine, theirs = service(), service()
    mine.add({"w": whole})
    theirs.add({"w": twin})
    for opt, p in ((mine, whole), (theirs, twin)):
        for _ in range(3):
            pull(p)
            opt.step()
    part = Parameter(whole.detach()[[0, 2]].clone())
    mine.replace("w", part, keep=[0, 2])
    grown = Parameter(torch.cat([part.detach(), torch.zeros(1, 3)]))
    mine.replace(part, grown, place=slice(0, 2))
    pull(grown)
    mine.step()
    pull(twin)
    theirs.step()
    assert torch.allclose(grown[:2], twin[[0, 2]], atol=1e-7) and list(mine.parameters) == ["w"]
    assert mine.state("w")["exp_avg"].shape == (3, 3)
    with pytest.raises(MismatchError, match="shape"):
        mine.replace("w", parameter(0, 5, 3))


def test_clearing_and_editing_state() -> None:
    a = parameter(0, 3, 2)
    opt = service()
    opt.add({"a": a})
    pull(a)
    opt.step()
    kept = opt.state(a)["exp_avg"][1].clone()
    opt.clear("a", [0, 2])
    assert torch.equal(opt.state("a")["exp_avg"][[0, 2]], torch.zeros(2, 2)) and torch.equal(
        opt.state("a")["exp_avg"][1], kept
    )

    def double(key: str, value: Tensor) -> Tensor:
        return 2 * value if key == "exp_avg" else value

    opt.edit("a", double)
    assert torch.equal(opt.state("a")["exp_avg"][1], 2 * kept)
    opt.clear("a")
    assert not opt.state("a")
    pull(a)
    opt.step()
    opt.reset()
    assert not opt.state("a")


def test_scaling_the_rate_of_some_keeps_their_state() -> None:
    a, b = parameter(0, 2), parameter(1, 2)
    opt = service()
    opt.add({"x/a": a, "y/b": b})
    pull(a, b)
    opt.step()
    average = opt.state("x/a")["exp_avg"].clone()
    opt.scale_lr("x/*", 3.0)
    assert torch.equal(opt.state("x/a")["exp_avg"], average)
    pull(a, b)
    opt.step()
    assert opt.current_lr("x/a") == pytest.approx(0.3) and opt.current_lr("y/b") == pytest.approx(0.1)
    assert len(opt.groups) == 2
    opt.scale_lr(a, 1.0)
    assert len(opt.groups) == 1


def test_a_second_optimizer() -> None:
    a, gate, twin = parameter(0, 2), parameter(1, 2), parameter(1, 2)
    opt = service()
    opt.add({"a": a})
    opt.add({"gate": gate}, optimizer="sgd", lr_scale=0.5)
    theirs = torch.optim.SGD([twin], lr=0.05, momentum=0.9)
    for _ in range(3):
        pull(a, gate, twin)
        opt.step()
        theirs.step()
    assert torch.allclose(gate, twin) and "exp_avg" in opt.state("a") and "momentum_buffer" in opt.state("gate")


def test_saved_and_loaded_it_goes_on_exactly() -> None:
    def build() -> tuple[OptimizerService, dict[str, Parameter]]:
        opt = service(schedule="linear", weight_decay=0.1)
        parameters = {"a": parameter(0, 3, 2), "b": parameter(1, 2), "c": parameter(2, 2), "d": parameter(3, 2)}
        opt.add({"a": parameters["a"], "b": parameters["b"]})
        return opt, parameters

    def middle(opt: OptimizerService, p: dict[str, Parameter]) -> None:
        opt.add({"c": p["c"]}, lr_scale=2.0, warmup=3)
        opt.add({"d": p["d"]}, optimizer="sgd")
        opt.scale_lr("b", 0.5)
        opt.freeze("b")

    def run(opt: OptimizerService, p: dict[str, Parameter], steps: int) -> None:
        for _ in range(steps):
            pull(*(q for n, q in p.items() if n in opt.parameters and q.requires_grad))
            opt.step()
            opt.zero_grad()

    first, p = build()
    run(first, p, 2)
    middle(first, p)
    run(first, p, 2)
    plain, tensors = first.save()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    kept = {n: q.detach().clone() for n, q in p.items()}
    order = list(first.parameters)
    run(first, p, 3)

    second, q = build()
    with torch.no_grad():
        for name in q:
            q[name].copy_(kept[name])
    second.load(plain, tensors, q)
    assert list(second.parameters) == order and not q["b"].requires_grad
    run(second, q, 3)
    assert all(torch.equal(p[n], q[n]) for n in p)
    assert [g["lr"] for g in first.groups] == [g["lr"] for g in second.groups]
    third, _ = build()
    with pytest.raises(MismatchError, match="lacks, first 'c'"):
        third.load(plain, tensors, {})


def test_around_somebodys_own_optimizer() -> None:
    model = tiny_model()
    named = model.parameters_to_train()
    optimizer = torch.optim.AdamW(named.values(), lr=0.01)
    given = []

    class Grow:
        def fit_start(self, model: Any, optimizer: OptimizerService, total_steps: int) -> None:
            given.append(optimizer)

    hooks = training_hooks(model, [Grow()])
    hooks.fit_start(optimizer, 10)
    assert list(given[0].parameters) == list(named)
    extra = parameter(0, 2)
    given[0].add({"lora/extra": extra}, lr_scale=0.5)
    assert optimizer.param_groups[-1]["params"] == [extra] and optimizer.param_groups[-1]["lr"] == 0.005
    pull(extra)
    before = extra.detach().clone()
    optimizer.step()
    assert not torch.equal(extra, before)
    given[0].freeze("head/*")
    assert not named["head/weight"].requires_grad
