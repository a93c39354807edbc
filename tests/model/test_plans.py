"""What methods chose from data goes with the states of their adapters, or states are refused; nothing is mixed in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from zoo.errors import AttachError, ConfigError, MergeError, MismatchError
from zoo.registry import adapter_class
from zoo.train import MovingAverage

TINY: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 3, "pretrained": False, "num_classes": 3}
METHODS: dict[str, dict[str, Any]] = {
    "sct": {"channels": 5, "std": 0.2},
    "petalface": {"rank": 2, "dropout": 0.0, "threshold": None},
    "vqt": {"num_tokens": 1},
    "spt": {"budget": 0.005, "rank": 1},
}
each = pytest.mark.parametrize("method", METHODS)


def images(seed: int, count: int = 4) -> Tensor:
    x = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return x * (1 + seed) * torch.linspace(0.1, 1, 32)  # of other sharpness too


def load(method: str, seed: int | None, **options: Any) -> zoo.Model:
    """One backbone, an adapter that has chosen by data of its own (`seed` None: not yet), away from its start."""
    torch.manual_seed(0)
    model = zoo.load("vit-micro", zoo.adapter(method, **METHODS[method]), **{**TINY, **options})
    if seed is None:
        return model.eval()
    adapter: Any = model.adapters[method]
    with torch.no_grad():
        if method == "vqt":
            model.head.weight.copy_(torch.randn(model.head.weight.shape, generator=torch.Generator().manual_seed(seed)))  # type: ignore[union-attr,operator]
            adapter.select(model, 0.5)
        else:
            adapter.calibrate(model, [(images(seed), torch.tensor([0, 1, 2, 0]))])
        generator = torch.Generator().manual_seed(seed)
        for p in adapter.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model.eval()


def same_adapter(a: zoo.Model, b: zoo.Model, name: str = "", of: str = "") -> bool:
    with torch.no_grad():
        theirs = b.features(images(7))
        return torch.allclose(a.features(images(7)), theirs, atol=1e-6)


@each
def test_a_state_brings_its_plan(method: str, tmp_path: Path) -> None:
    a, b, fresh = load(method, 1), load(method, 2), load(method, None)
    assert a.adapters[method].plan != b.adapters[method].plan and not same_adapter(a, b)
    state = a.adapter_state(method)
    b.set_adapter_state(method, state)
    assert b.adapters[method].plan == a.adapters[method].plan and same_adapter(a, b)
    assert all(p.requires_grad for p in b.adapters[method].parameters())
    b.save_adapter(tmp_path)
    torch.manual_seed(0)
    c = zoo.load(adapter=tmp_path, pretrained=False).eval()
    assert torch.equal(c(images(7)), b(images(7)))
    if method == "vqt":  # its head reads all features
        before = fresh(images(7))
        with pytest.raises(MismatchError, match="the head reads 144"):
            fresh.set_adapter_state(method, state)
        assert fresh.adapters[method].plan is None and torch.equal(fresh(images(7)), before)
        fresh = load(method, None, num_classes=0)
    fresh.set_adapter_state(method, state)
    assert same_adapter(a, fresh)


@each
def test_states_of_different_choices_are_not_mixed(method: str) -> None:
    a, b, fresh = (load(method, seed).adapter_state(method) for seed in (1, 2, None))
    for mix in (lambda: a + b, lambda: a - b, lambda: zoo.average([a, 0.5 * b]), lambda: a.to(torch.float64) + fresh):
        with pytest.raises(MismatchError, match="do not go together"):
            mix()
    assert (zoo.average([a, 2 * a, -a / 2]) - a).plan == a.plan is not None


@each
def test_a_copy_has_the_plan(method: str) -> None:
    model = load(method, 1)
    before = model.features(images(7))
    model.copy_adapter(method, "twin")
    model.set_active("twin")
    torch.testing.assert_close(model.features(images(7)), before)
    assert model.adapters["twin"].plan == model.adapters[method].plan


@each
def test_checkpoints_of_adapters_bring_plans(method: str) -> None:
    a, b, fresh = load(method, 1), load(method, 2), load(method, None)
    small = a.adapter_state_dict()
    b.load_adapter_state_dict(small)
    assert same_adapter(a, b)
    wrong = {k: v for k, v in small.items() if k != "heads.default.bias"}
    plan, before = fresh.adapters[method].plan, {k: v.clone() for k, v in fresh.adapter_state_dict().items()}
    with pytest.raises(MismatchError):
        fresh.load_adapter_state_dict({**wrong, "unknown": torch.zeros(1)})
    after = fresh.adapter_state_dict()
    assert fresh.adapters[method].plan == plan and list(after) == list(before)
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    with pytest.raises(MismatchError, match="first 'plans"):
        b.load_adapter_state_dict({k: v for k, v in small.items() if not k.startswith("plans.")})


def test_a_state_that_does_not_say_its_plan() -> None:
    a, b = load("sct", 1), load("sct", 2)
    state = zoo.AdapterState(dict(a.adapter_state("sct")), "mine")
    with pytest.raises(MismatchError, match=r"chosen differently from data .'blocks.0.mlp.index'"):
        b.set_adapter_state("sct", state)
    a.set_adapter_state("sct", 2 * state)
    assert a.adapters["sct"].plan == load("sct", 1).adapters["sct"].plan


def test_a_plan_that_cannot_be_taken() -> None:
    a, b = load("sct", 1), load("sct", 2)
    state, before = a.adapter_state("sct"), b(images(7))
    state.plan = {"channels": {"blocks.0.mlp": [1]}}
    with pytest.raises(MismatchError, match="'sct' cannot take what 'sct' has chosen"):
        b.set_adapter_state("sct", state)
    assert torch.equal(b(images(7)), before)
    other = load("spt", 1).adapter_state("spt")
    with pytest.raises(MismatchError):
        b.set_adapter_state("sct", other)
    assert torch.equal(b(images(7)), before)
    b.adapters["sct"].join(object())  # type: ignore[operator]
    with pytest.raises(MismatchError, match="chosen differently"):
        b.set_adapter_state("sct", a.adapter_state("sct"))


def test_what_is_trained_stays_so() -> None:
    a, b = load("sct", 1), load("sct", 2)
    b.add_adapter("lora", "l")
    b.set_active("sct", "l", train="l")
    with b.disable():
        pass
    b.set_adapter_state("sct", a.adapter_state("sct"))
    assert b.active == ("sct", "l")
    assert not any(p.requires_grad for p in b.adapters["sct"].parameters())
    assert all(p.requires_grad for p in b.adapters["l"].parameters())
    b.set_active("sct", "l")
    next(b.adapters["sct"].parameters()).requires_grad_(False)
    b.set_adapter_state("sct", load("sct", 3).adapter_state("sct"))
    assert [p.requires_grad for p in b.adapters["sct"].parameters()] == [False, True, True, True]


@pytest.mark.parametrize("method", ["sct", "petalface", "spt"])
@pytest.mark.parametrize("stop", [None, 3])
def test_a_moving_average_from_before_the_calibration(method: str, stop: int | None, tmp_path: Path) -> None:
    """It takes the choice over, follows, and is resumed."""
    data = torch.utils.data.TensorDataset(images(1, 8), torch.arange(8) % 3)
    options: dict[str, Any] = {"batch_size": 2, "lr": 1e-2, "progress": False, "device": "cpu"}
    options |= {"schedule": "constant", "warmup": 0.0, "checkpoint": tmp_path}
    for steps in (6,) if stop is None else (stop, 6):
        model = load(method, None)
        model.copy_adapter(method, "slow")
        zoo.fit(model, data, steps=steps, callbacks=[MovingAverage(method, "slow", 0.0)], resume=True, **options)
    slow, fast = model.adapter_state("slow"), model.adapter_state(method)
    assert slow.plan == fast.plan is not None and (slow - fast).norm() == 0
    expected = model.eval().features(images(7))
    model.set_active("slow")
    assert torch.equal(model.features(images(7)), expected)
    other = load(method, 2)
    other.copy_adapter(method, "slow")
    other.set_adapter_state(method, load(method, 1).adapter_state(method))
    with pytest.raises(MismatchError, match="do not go together"):
        zoo.fit(other, data, steps=2, callbacks=[MovingAverage(method, "slow")], **{**options, "checkpoint": None})


def test_uncalibrated_ones_are_still_refused() -> None:
    model = load("sct", 1)
    model.set_adapter_state("sct", load("sct", None).adapter_state("sct"))
    with pytest.raises(ConfigError, match="does not know which channels"):
        model(images(1))


@pytest.mark.parametrize("method", [m for m in zoo.list_adapters() if adapter_class(m).needs_calibration])
def test_what_is_not_decided_is_not_merged(method: str) -> None:
    """Merged, it would be the bare network, or one that was never trained."""
    try:
        model = zoo.load("vit-micro", zoo.adapter(method, **adapter_class(method).trial), **TINY)
    except AttachError:
        pytest.skip(f"{method} does not go with this backbone")
    with pytest.raises(MergeError):
        model.merge()
