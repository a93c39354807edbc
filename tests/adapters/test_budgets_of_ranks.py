"""Methods whose ranks reach a budget while they train: what holds for all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from train_parts import difference, easy_data, fit, tiny_model

import zoo
from zoo.train import training_hooks

# Settings for twelve projections, and the sum of their ranks in the end
METHODS: dict[str, tuple[dict[str, Any], int]] = {
    "adalora": ({"rank": 4, "target_rank": 2}, 24),
    "increlora": ({"target_rank": 3, "added": 2}, 36),
    "triadaptlora": ({"target_rank": 3, "added": 2}, 36),
}
GROWING = ("increlora", "triadaptlora")


@pytest.mark.parametrize(
    ("method", "more"),
    [("adalora", {}), ("increlora", {"top_h": 1, "interval": 1})],  # of 24 steps the first 13 change ranks
)
def test_no_epoch_before_the_budget_is_chosen(
    method: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first epochs would win: their validation is made to look better."""
    settings, budget = METHODS[method]
    model = tiny_model(zoo.adapter(method, **settings, **more))
    real = zoo.train.trainer.Trainer.evaluate

    def flattered(self: Any) -> dict[str, Any]:
        return {**real(self), "accuracy": 1.0 - self.run.step / 1000}

    monkeypatch.setattr(zoo.train.trainer.Trainer, "evaluate", flattered)
    report = fit(model, easy_data(64), easy_data(16, seed=1), epochs=6, keep="best", lr=1e-2)
    assert report.best["epoch"] == 4 and report.best["chosen"] == "best"
    adapter: Any = model.adapters[method]
    assert sum(adapter.ranks().values()) == budget


@pytest.mark.parametrize("method", METHODS)
def test_ones_own_loop_in_mixed_precision(method: str) -> None:
    settings, budget = METHODS[method]
    model = tiny_model(zoo.adapter(method, **settings)).train()
    hooks = training_hooks(model)
    optimizer = torch.optim.Adam(model.parameters_to_train().values(), lr=1e-2)
    hooks.fit_start(optimizer, 12)
    inputs, targets = easy_data(16).tensors
    for step in range(12):
        hooks.step_start(step)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(inputs)
            extra = hooks.extra_loss(outputs, targets)
            loss = torch.nn.functional.cross_entropy(outputs, targets) + extra
        assert isinstance(extra, Tensor) and extra.dtype == torch.float32
        loss.backward()
        hooks.after_backward(step)
        optimizer.step()
        hooks.after_step(step)
        optimizer.zero_grad()
        assert method != "adalora" or hooks.ready() == (step > 6)
    assert hooks.ready()
    hooks.fit_end()
    adapter: Any = model.adapters[method]
    assert sum(adapter.ranks().values()) == budget
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
        id(p) for p in model.parameters_to_train().values()
    }


@pytest.mark.parametrize("method", GROWING)
def test_a_frozen_one_is_left_alone(method: str) -> None:
    """Another adapter is trained beside it."""
    model = tiny_model([zoo.adapter(method, **METHODS[method][0]), "lora"])
    model.set_active(method, "lora", train="lora")
    adapter: Any = model.adapters[method]
    before = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    report = fit(model, easy_data(32), steps=5)
    assert "extra_loss" not in report.history[0] and adapter.plan is None
    assert difference(dict(adapter.named_parameters()), before) == 0
