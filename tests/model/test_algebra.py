"""States of adapters as vectors; moving averages; heads that grow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from train_parts import easy_data, fit, tiny_model

import zoo
from zoo.errors import ConfigError, MismatchError, UnknownNameError
from zoo.train import MovingAverage


def two(**settings: Any) -> zoo.Model:
    model = tiny_model(None)
    for name in ("a", "b"):
        model.add_adapter(zoo.adapter("lora", **settings), name)
        with torch.no_grad():
            for p in model.adapters[name].parameters():
                p.normal_()
    return model


def test_arithmetic() -> None:
    model = two()
    a, b = model.adapter_state("a"), model.adapter_state("b")
    key = "blocks.1.attn.v.lora_b"
    combined = 0.5 * a + b * 2 - a / 4
    torch.testing.assert_close(combined[key], 0.25 * a[key] + 2 * b[key])
    torch.testing.assert_close((-a)[key], -a[key])
    mean = zoo.average([a, b], weights=[3, 1])
    torch.testing.assert_close(mean[key], 0.75 * a[key] + 0.25 * b[key])
    assert a.nbytes == 4 * a.numel == 4 * 8 * 192
    assert (a - a).norm() == 0 and a.norm() == pytest.approx(sum(float(t.square().sum()) for t in a.values()) ** 0.5)
    half = a.to(torch.float16)
    assert half.nbytes == a.nbytes // 2
    model.set_adapter_state("a", combined)
    assert torch.equal(model.adapter_state("a")[key], combined[key])
    assert torch.equal(model.adapters["a"].get_parameter(key), combined[key])  # type: ignore[arg-type]
    combined[key].zero_()
    assert model.adapters["a"].get_parameter(key).any()  # a copy, both ways


def test_what_does_not_go_together_is_named() -> None:
    model = two()
    model.add_adapter(zoo.adapter("lora", rank=4), "c", activate=False)
    model.add_adapter("bitfit", "d", activate=False)
    a, c, d = (model.adapter_state(n) for n in "acd")
    with pytest.raises(
        MismatchError, match=r"'a' and 'c' do not .*'blocks.0.attn.q.lora_a' has shape \(8, 24\) in the first"
    ):
        a + c
    with pytest.raises(MismatchError, match="'a' and 'd' do not go together"):
        zoo.average([a, d])
    before = model.adapter_state("c")
    with pytest.raises(MismatchError, match="'a' and 'c'"):
        model.set_adapter_state("c", a)
    assert (model.adapter_state("c") - before).norm() == 0
    with pytest.raises(UnknownNameError, match="no adapter 'e'"):
        model.adapter_state("e")
    with pytest.raises(ConfigError, match="at least one"):
        zoo.average([])
    with pytest.raises(ConfigError, match="give one finite number for each"):
        zoo.average([a], [1.0, 2.0])
    with pytest.raises(ConfigError, match="one finite number for each"):
        zoo.average([a, a], [float("nan"), 1.0])
    for wrong in (lambda: zoo.average([dict(a)]), lambda: model.set_adapter_state("a", dict(a))):  # type: ignore[list-item, arg-type]
        with pytest.raises(ConfigError, match="expected a state"):
            wrong()
    with pytest.raises(ConfigError, match="divided by 0"):
        a / 0
    with pytest.raises(TypeError):
        a + 1  # type: ignore[operator]


@pytest.mark.parametrize("stop", [None, 3])
def test_a_moving_average_follows_and_is_resumed(tmp_path: Path, stop: int | None) -> None:
    """Against the average computed by hand from the weights after every step; with a kill in between."""
    known: dict[int, dict[str, Tensor]] = {}
    broken: list[int] = []

    class Notes:
        def step_end(self, model: zoo.Model, step: int) -> None:
            known[step] = dict(model.adapter_state("adapter"))
            if step == stop and not broken:
                broken.append(step)
                raise KeyboardInterrupt

    def go() -> zoo.Model:
        model = tiny_model(zoo.adapter("adapter", rank=2, learn_scale=True))
        model.copy_adapter("adapter", "slow")
        known.setdefault(-1, dict(model.adapter_state("slow")))
        callbacks = [MovingAverage("adapter", "slow", 0.9), Notes()]
        fit(model, easy_data(40), callbacks=callbacks, checkpoint=tmp_path, checkpoint_every=1)
        return model

    if stop is not None:
        with pytest.raises(KeyboardInterrupt):
            go()
    model = go()
    expected = known[-1]
    for step in range(6):
        expected = {n: 0.9 * t + 0.1 * known[step][n] for n, t in expected.items()}
    slow = model.adapter_state("slow")
    assert any(name.endswith("adapter_scale") for name in slow)
    for name, tensor in slow.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)
    assert model.active == ("adapter",) and not model.adapters["slow"].get_parameter(name).requires_grad


def test_averages_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(UnknownNameError, match=r"no adapter 'slow'.*model.copy_adapter\('lora', 'slow'\)"):
        fit(model, easy_data(16), callbacks=[MovingAverage("lora", "slow")])
    model.copy_adapter("lora", "slow", activate=True)
    with pytest.raises(ConfigError, match="'slow' is in use"):
        fit(model, easy_data(16), callbacks=[MovingAverage("lora", "slow")])
    with pytest.raises(ConfigError, match=r"decay is 1\.5"):
        MovingAverage("a", "b", 1.5)
    with pytest.raises(ConfigError, match="cannot follow itself"):
        MovingAverage("a", "a")


def test_a_head_grows() -> None:
    model = tiny_model("lora", num_classes=2)
    model.classes = ["red", "blue"]
    images = torch.randn(3, 3, 8, 8)
    before, old = model(images), model.head.weight.detach().clone()  # type: ignore[union-attr,operator]
    model.grow_head(["green", "white", "black"])
    assert model.num_classes == 5 and model.classes == ["red", "blue", "green", "white", "black"]
    assert torch.equal(model.head.weight[:2], old)  # type: ignore[index]
    torch.testing.assert_close(model(images)[:, :2], before)
    assert model.head.weight.requires_grad and "head/weight" in model.parameters_to_train()  # type: ignore[union-attr]
    for names, message in (
        (["pink", "blue"], "'blue' is a class that it has already"),
        (["pink", "pink"], "'pink' is a class that it has already"),
        ([], "no class is named"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.grow_head(names)
    with pytest.raises(ConfigError, match=r"expected a list of names, \['pink'\]"):
        model.grow_head("pink")
    with pytest.raises(ConfigError, match=r"num_classes is 3, and classes \['pink'\]; expected a list"):
        model.reset_head(3, ["pink"])
    assert model.num_classes == 5
    fresh = tiny_model("lora", num_classes=0)
    fresh.grow_head(["red"])
    assert fresh.classes == ["red"] and fresh(images).shape == (3, 1)
    with pytest.raises(ConfigError, match="whose classes have no names"):
        tiny_model("lora").grow_head(["red"])


def test_a_grown_head_is_saved(tmp_path: Path) -> None:
    model = zoo.load("vit-micro", "lora", num_classes=0)
    model.grow_head(["red", "blue"])
    model.grow_head(["green"])
    model.save_adapter(tmp_path)
    again = zoo.load(adapter=tmp_path)
    images = torch.randn(2, 3, 32, 32)
    assert again.classes == ["red", "blue", "green"] and torch.equal(again.eval()(images), model.eval()(images))
