"""Weighted sums of adapters against sums of merged weights; small states for others' trainers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from method_models import METHODS, attach, bare, each, images, shake
from safetensors.torch import load_file, save_file
from torch import Tensor

import zoo

SUMS = [m for m, cls in METHODS.items() if cls.sums] + [
    "lora",
    "adalora",
    "increlora",
    "triadaptlora",
    "vera",
    "dylora",
    "diffora",
]
WEIGHTS = {"a": 0.7, "b": -0.4}


def pair(method: str, family: str = "vit") -> zoo.Model:
    model = bare(family).eval()
    for seed, name in enumerate("ab"):
        attach(model, method, name, activate=False)
        shake(model, name, seed)
    return model


def merged(model: zoo.Model, *names: str) -> dict[str, Tensor]:
    model.set_active(*names)
    return {k: v.double() for k, v in model.merge().state_dict().items() if v.is_floating_point()}


@pytest.mark.parametrize("family", ["vit", "swin"])
@pytest.mark.parametrize("method", SUMS)
def test_the_change_of_the_weights_is_the_sum(method: str, family: str) -> None:
    model = pair(method, family)
    frozen = merged(model)
    changes = {n: merged(model, n) for n in WEIGHTS}
    added = model.combine(WEIGHTS)
    assert model.active == ("combined",) and model.probe(images()) == []
    found = merged(model, "combined")
    for key, start in frozen.items():
        expected = start + sum(w * (changes[n][key] - start) for n, w in WEIGHTS.items())
        torch.testing.assert_close(found[key], expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model.merge()(images()), model(images()), rtol=1e-4, atol=1e-5)
    assert added.name == "combined" and set(model.adapters) == {"a", "b", "combined"}


def test_lora_of_other_ranks_points_and_scales(tmp_path: Path) -> None:
    model = bare("vit").eval()
    model.add_adapter(zoo.adapter("lora", rank=2, alpha=8.0), "a", activate=False)
    model.add_adapter(zoo.adapter("lora", rank=3, targets=("q", "up"), rslora=True), "b", activate=False)
    model.add_adapter(zoo.adapter("adalora", rank=2, target_rank=1), "c", activate=False)
    weights = {"a": 0.5, "b": 2.0, "c": -1.0}
    for seed, name in enumerate(weights):
        shake(model, name, seed)
    frozen = merged(model)
    changes = {n: merged(model, n) for n in weights}
    model.combine(weights, "sum")
    found = merged(model, "sum")
    for key, start in frozen.items():
        expected = start + sum(w * (changes[n][key] - start) for n, w in weights.items())
        torch.testing.assert_close(found[key], expected, rtol=1e-5, atol=1e-5)
    assert len(model.adapters["sum"].module_at("blocks.0.attn.q").lora_a) == 7  # type: ignore[operator]
    model.save_adapter(tmp_path, adapters=["sum"])
    torch.manual_seed(0)
    again = bare("vit").eval()
    from zoo.disk import attach as put
    from zoo.disk import read

    put(again, read(tmp_path))
    assert torch.equal(again(images()), model(images()))


@each
def test_what_has_no_sum_is_refused(method: str) -> None:
    if method in SUMS:
        return
    model = pair(method)
    before = list(model.adapters), model.active, model(images())
    with pytest.raises(zoo.ZooError, match=r"not linear in its parameters|of (their|its) own, and a sum of heads"):
        model.combine(WEIGHTS)
    assert (list(model.adapters), model.active) == before[:2] and torch.equal(model(images()), before[2])


def test_refusals() -> None:
    model = pair("lora")
    model.add_adapter("ssf", "s", activate=False)
    model.add_adapter(zoo.adapter("lora", dora=True), "d", activate=False)
    model.add_adapter("lora", "h", num_classes=2, activate=False)
    for weights, words in (
        ({"a": 0.5, "s": 0.5}, "different ways"),
        ({"a": 0.5, "d": 0.5}, "not linear"),
        ({"a": 0.5, "zzz": 0.5}, "no adapter 'zzz'"),
        ({"a": float("nan")}, "finite number"),
        ({"a": True}, "finite number"),
        ({}, "weights by name"),
        ({"a": 0.5, "h": 0.5}, "has a head of its own"),
    ):
        with pytest.raises(zoo.ZooError, match=words):
            model.combine(weights)
    assert list(model.adapters) == ["a", "b", "s", "d", "h"]
    model.combine({"a": 0.5, "h": 0.5}, head="h")
    assert model.num_classes == 2 and torch.equal(model.head.weight, model.heads["h"].weight)


@each
def test_small_states(method: str, tmp_path: Path) -> None:
    model = bare("vit")
    attach(model, method)
    shake(model, method)
    found = model.adapter_state_dict()
    assert not [k for k in found if k.startswith("backbone.")] and [k for k in found if k.startswith("heads.")]
    save_file({k: v.contiguous() for k, v in found.items()}, tmp_path / "small.safetensors")
    other = bare("vit")
    other.add_adapter(zoo.adapter(method, **METHODS[method].trial))
    other.load_adapter_state_dict(load_file(tmp_path / "small.safetensors"))
    assert torch.equal(other.eval()(images()), model.eval()(images()))


def test_states_that_do_not_fit_change_nothing() -> None:
    model = pair("lora")
    found = model.adapter_state_dict()
    first = next(iter(found))
    before = {k: v.clone() for k, v in found.items()}
    for wrong in (
        {k: v for k, v in found.items() if k != first},
        {**found, "adapters.zzz.x": torch.ones(1)},
        {k: v[:1] if k == first else v + 1 for k, v in found.items()},
        {**found, "backbone.cls_token": torch.ones(1, 1, 48)},
    ):
        with pytest.raises(zoo.ZooError, match="does not fit the adapters and heads"):
            model.load_adapter_state_dict(wrong)
        assert all(torch.equal(v, before[k]) for k, v in model.adapter_state_dict().items())
