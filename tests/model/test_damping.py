"""Damping: scaled effects against adapters that were scaled by hand; off is off, to the bit; afterwards all is as before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from method_models import BATCH, METHODS, attach, bare, build, images, loss_of, shake, state
from torch import Tensor

import zoo
from zoo.errors import ConfigError, SelectionError


def lora(**config: Any) -> zoo.Model:
    model = bare("vit", depth=3)
    model.add_adapter(zoo.adapter("lora", rank=2, **config), "lora")
    shake(model, "lora")
    return model


def scaled_by_hand(model: zoo.Model, factors: dict[int, float]) -> Tensor:
    """LoRA's effect is linear in B."""
    kept = {k: p.detach().clone() for k, p in model.adapters["lora"].named_parameters()}
    with torch.no_grad():
        for key, p in model.adapters["lora"].named_parameters():
            if key.endswith("lora_b"):
                p.mul_(factors.get(int(key.split(".")[1]), 1.0))
        logits = model(images())
        for key, p in model.adapters["lora"].named_parameters():
            p.copy_(kept[key])
    return logits


@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0, -1.0, {1: 0.0}, {0: 0.5, 2: 0.0}, {"blocks.1": 3.0}])
def test_factors(factor: Any) -> None:
    model = lora(targets="all-linear")
    whole = model(images())
    by_block = (
        dict.fromkeys(range(3), factor)
        if isinstance(factor, float)
        else {int(str(k)[-1]): f for k, f in factor.items()}
    )
    with zoo.damped(model, "lora", factor):
        damped = model(images())
    torch.testing.assert_close(damped, scaled_by_hand(model, by_block), rtol=1e-5, atol=1e-5)
    assert not torch.equal(damped, whole)
    assert torch.equal(model(images()), whole)


def test_one_inside_the_other() -> None:
    model = lora()
    whole = model(images())
    with zoo.damped(model, "lora", {0: 0.5}):
        outer = model(images())
        with zoo.damped(model, "lora", {0: 0.5, 1: 0.0}):
            torch.testing.assert_close(model(images()), scaled_by_hand(model, {0: 1.0}))
            inner = model(images())
        assert torch.equal(model(images()), outer)
    assert torch.equal(model(images()), whole)
    torch.testing.assert_close(inner, scaled_by_hand(model, {0: 0.25, 1: 0.0}), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["vit", "swin"])
@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_off_and_on_again(method: str, family: str) -> None:
    """Off at all blocks is the bare backbone, to the bit, or refused with the reason; nothing stays behind."""
    model = bare(family)
    with torch.no_grad():
        off = model(images())
    attach(model, method)
    shake(model, method)
    frozen = state(model)
    with torch.no_grad():
        on = model(images())
        try:
            with zoo.damped(model, method, 0.0):
                assert torch.equal(model(images()), off)
        except ConfigError as error:
            assert "head reads" in str(error)
        try:
            with zoo.damped(model, method, 0.5):
                half = model(images())
                assert half.isfinite().all()
                if METHODS[method].trial_families and next(model.adapters[method].parameters(), None) is not None:
                    assert not torch.equal(half, off) and not torch.equal(half, on)
        except ConfigError as error:
            assert "switch" in str(error).lower() or "head reads" in str(error)
        assert torch.equal(model(images()), on)
    assert all(torch.equal(v, frozen[k]) for k, v in state(model).items())
    model.remove_adapter(method)
    with torch.no_grad():
        assert torch.equal(model(images()), off)


@pytest.mark.parametrize("memory", ["default", "low", "min"])
def test_gradients(memory: str) -> None:
    model = lora().train()
    found = []
    for model.memory in ("default", memory):
        with zoo.damped(model, "lora", {0: 0.5, 1: 0.0}):
            model.zero_grad()
            loss_of(model).backward()
        found.append({k: p.grad.clone() for k, p in model.parameters_to_train().items() if p.grad is not None})
    assert not any(k.startswith("lora/blocks.1.") for k in found[0])
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(v, found[1][k]) for k, v in found[0].items())


def test_backward_outside_of_the_context() -> None:
    """What is kept gives the gradients of the damped model; blocks that are run again refuse."""
    model = lora().train()
    found = []
    for model.memory, inside in (("default", True), ("default", False), ("low", False)):
        model.zero_grad()
        with zoo.damped(model, "lora", 0.5):
            loss = loss_of(model)
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found.append([p.grad.clone() for p in model.parameters_to_train().values() if p.grad is not None])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    model.memory = "min"
    with zoo.damped(model, "lora", 0.5):
        loss = loss_of(model)
    with pytest.raises(ConfigError, match="inside of the context"):
        loss.backward()
    loss = loss_of(model)
    with zoo.damped(model, "lora", 0.5), pytest.raises(ConfigError, match="inside of the context"):
        loss.backward()


def test_per_sample_adapters() -> None:
    model = lora()
    attach(model, "bitfit", "other", activate=False)
    shake(model, "other")
    rows = ["lora", "other", None, "lora"][:BATCH]
    with torch.no_grad():
        whole = model(images(), adapters=rows)
        with zoo.damped(model, "lora", {0: 0.5}):
            alone = model(images())
            routed = model(images(), adapters=rows)
    torch.testing.assert_close(routed[[0, 3]], alone[[0, 3]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(routed[[1, 2]], whole[[1, 2]])


def test_compiles() -> None:
    model = lora()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    try:
        with torch.no_grad():
            whole = compiled(images())
            for factor in (0.5, {0: 0.0}):
                with zoo.damped(compiled, "lora", factor):
                    torch.testing.assert_close(compiled(images()), model(images()), rtol=1e-5, atol=1e-5)
                    assert not torch.equal(model(images()), whole)
            torch.testing.assert_close(compiled(images()), whole)
    finally:
        torch._dynamo.reset()


def test_changes_inside_of_the_context() -> None:
    """An adapter may be taken away, and another may come, while one is damped."""
    model = lora()
    with torch.no_grad():
        with model.disable():
            off = model(images())
        with zoo.damped(model, "lora", 0.5):
            model.remove_adapter("lora")
            attach(model, "ssf")
        on = model(images())
        assert not torch.equal(on, off)
        model.remove_adapter("ssf")
        assert torch.equal(model(images()), off)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.backbone.modules())


def test_refusals() -> None:
    model = build("vit", "lora", "bitfit")
    for arguments, error, match in (
        (("quack",), ConfigError, "not active"),
        (("lora", float("nan")), ConfigError, "finite number"),
        (("lora", True), ConfigError, "finite number"),
        (("lora", {7: 0.0}), SelectionError, "no block 7"),
        (("lora", {"text.blocks.0": 0.0}), SelectionError, "no block 'text.blocks.0'"),
        (("bitfit", 0.5), ConfigError, "not scaled"),
    ):
        with pytest.raises(error, match=match), zoo.damped(model, *arguments):
            pass
    with pytest.raises(ConfigError, match="head reads"), zoo.damped(build("vit", "vqt"), "vqt"):
        pass
    with pytest.raises(ConfigError, match="Switch it off"), zoo.damped(build("vit", "prefix"), "prefix", 0.5):
        pass
    with pytest.raises(ConfigError, match="runs its blocks as one"), zoo.damped(build("vit", "meft"), "meft", {1: 0.0}):
        pass
