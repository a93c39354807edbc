"""The hooks that `zoo.fit` calls: their order, who is called, one's own loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from train_parts import easy_data, fit, tiny_model

import zoo
from zoo.errors import ConfigError
from zoo.train import training_hooks


class Recorder:
    """Notes the hooks in their order, and looks at gradients and weights on the way."""

    needs_calibration = True

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.weight: Tensor | None = None

    def calibrate(self, model: zoo.Model, batches: Any) -> None:
        self.calls.append("calibrate")
        first, again = next(iter(batches)), next(iter(batches))
        assert torch.equal(first[0], again[0]) and first[0].shape[1:] == (3, 8, 8)

    def fit_start(self, model: zoo.Model, optimizer: Any, total_steps: int) -> None:
        self.calls.append(("fit_start", total_steps))
        self.optimizer = optimizer

    def epoch_start(self, model: zoo.Model, epoch: int) -> None:
        self.calls.append(("epoch_start", epoch))

    def step_start(self, model: zoo.Model, step: int) -> None:
        self.calls.append(("step_start", step))
        assert model.training and not model.backbone.training
        assert all(p.grad is None for p in model.parameters_to_train().values())
        assert sum(len(targets) for _, targets in self.optimizer.batches) in (16, 8)

    def extra_loss(self, model: zoo.Model, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls.append(("extra_loss", len(outputs)))
        return 100 * model.head.weight.sum()

    def after_backward(self, model: zoo.Model, step: int) -> None:
        self.calls.append(("after_backward", step))
        assert float(model.head.weight.grad.mean()) == pytest.approx(100, abs=1)  # not clipped; counted once over parts
        self.weight = model.head.weight.detach().clone()

    def after_step(self, model: zoo.Model, step: int) -> None:
        self.calls.append(("after_step", step))
        assert model.head.weight.grad is not None and self.weight is not None
        assert not torch.equal(model.head.weight, self.weight)

    def step_end(self, model: zoo.Model, step: int) -> None:
        self.calls.append(("step_end", step))
        assert model.head.weight.grad is None

    def epoch_end(self, model: zoo.Model, epoch: int) -> None:
        self.calls.append(("epoch_end", epoch))

    def eval_start(self, model: zoo.Model) -> None:
        self.calls.append("eval_start")

    def eval_end(self, model: zoo.Model) -> None:
        self.calls.append("eval_end")

    def fit_end(self, model: zoo.Model) -> None:
        self.calls.append("fit_end")


def test_hooks_are_called_in_order() -> None:
    recorder, records = Recorder(), []
    fit(tiny_model(), easy_data(24), easy_data(8), epochs=1, accumulate=2, callbacks=[recorder, records.append])

    def one(step: int, parts: list[int]) -> list[Any]:
        extra = [("extra_loss", n) for n in parts]
        return [("step_start", step), *extra, ("after_backward", step), ("after_step", step), ("step_end", step)]

    assert recorder.calls == [
        "calibrate",
        ("fit_start", 2),
        ("epoch_start", 0),
        *one(0, [8, 8]),
        *one(1, [4, 4]),
        ("epoch_end", 0),
        "eval_start",
        "eval_end",
        "fit_end",
    ]
    assert len(records) == 1 and records[0]["extra_loss"] != 0


def test_an_adapters_hooks_are_called_only_while_it_is_active(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(["lora", "bitfit"])
    seen = []
    for name, adapter in model.adapters.items():
        monkeypatch.setattr(adapter, "step_start", lambda model, step, name=name: seen.append(name), raising=False)
    fit(model, easy_data(16), epochs=1)
    assert seen == ["lora", "bitfit"]
    model.set_active("bitfit")
    fit(model, easy_data(16), epochs=1)
    assert seen == ["lora", "bitfit", "bitfit"]


def test_hooks_in_ones_own_loop() -> None:
    model, recorder = tiny_model(), Recorder()
    images, labels = easy_data(16).tensors
    hooks = training_hooks(model, [recorder])
    hooks.calibrate([(images, labels)])
    optimizer = torch.optim.SGD(model.parameters_to_train().values(), lr=0.1)
    hooks.fit_start(optimizer, 1)
    model.train()
    recorder.optimizer.batches = [(images, labels)]
    hooks.step_start(0)
    outputs = model(images)
    (F.cross_entropy(outputs, labels) + hooks.extra_loss(outputs, labels)).backward()
    hooks.after_backward(0)
    optimizer.step()
    hooks.after_step(0)
    optimizer.zero_grad(set_to_none=True)
    hooks.step_end(0)
    hooks.fit_end()
    assert [c if isinstance(c, str) else c[0] for c in recorder.calls] == [
        *("calibrate", "fit_start", "step_start", "extra_loss", "after_backward", "after_step", "step_end", "fit_end")
    ]


@pytest.mark.parametrize("ended", [True, False])
def test_a_step_that_is_not_ended_is_ended_in_front_of_the_next(ended: bool) -> None:
    """PST prunes behind each step: without it a whole run would leave the network dense, in silence."""
    model = tiny_model(zoo.adapter("pst", rank=2, mask_rank=2, sparsity=0.5))
    images, labels = easy_data(8).tensors
    hooks = training_hooks(model)
    optimizer = torch.optim.SGD(model.parameters_to_train().values(), lr=0.1)
    hooks.fit_start(optimizer, 6)
    for step in range(6):
        hooks.step_start(step)
        F.cross_entropy(model(images), labels).backward()
        hooks.after_backward(step)
        optimizer.step()
        hooks.after_step(step)
        optimizer.zero_grad(set_to_none=True)
        if ended:
            hooks.step_end(step)
    hooks.fit_end()
    assert model.adapters["pst"].zeros() == pytest.approx(0.5, abs=0.01)  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["pst", "adalora", "increlora", "triadaptlora", "dsl", "light-peft"])
def test_a_schedule_without_a_number_of_steps_is_refused(method: str) -> None:
    hooks = training_hooks(tiny_model(method))
    with pytest.raises(ConfigError, match=rf"\({method}\) has a schedule.*hooks.fit_start"):
        hooks.step_start(0)


def test_a_calibration_that_was_forgotten_is_said() -> None:
    model = tiny_model(zoo.adapter("lt-sft", entries=50))
    hooks = training_hooks(model)
    hooks.fit_start(torch.optim.SGD(model.parameters_to_train().values(), lr=0.1), 2)
    with pytest.raises(ConfigError, match=r"\(lt-sft\) has to see data.*hooks.calibrate"):
        hooks.step_start(0)


def test_eval_end_is_called_after_an_error() -> None:
    model, recorder = tiny_model(), Recorder()
    with pytest.raises(RuntimeError, match="inside"), training_hooks(model, [recorder]).evaluation():
        raise RuntimeError("inside")
    assert recorder.calls == ["eval_start", "eval_end"]
