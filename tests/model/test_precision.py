"""A half-precision backbone: adapters and heads stay in float32, every step counts, and casts happen at the op."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from method_models import CLASSES, METHODS, attach, bare, each, gradients, images, targets

import zoo
from zoo.engine.memory import MEMORY_SETTINGS

HALF = torch.bfloat16


def half_model(method: str, family: str = "vit", dtype: torch.dtype = HALF) -> zoo.Model:
    model = bare(family, dtype=dtype)
    adapter = model.add_adapter(zoo.adapter(method, **METHODS[method].trial))
    if adapter.needs_calibration:
        adapter.calibrate(model, [(images().to(dtype), targets())])
    return model


def family_of(method: str) -> str:
    families = METHODS[method].trial_families
    if not families:
        pytest.skip("tried on a family of its own, in the test of its name")
    return families[0]


@each
def test_every_step_moves_every_number(method: str) -> None:
    """Adapters were cast to bfloat16: scales near 1 never moved at the usual rate (ssf, norm: all; ia3: two thirds)."""
    model = half_model(method, family_of(method)).train()
    named = model.parameters_to_train()
    assert {p.dtype for p in named.values()} == {torch.float32}
    assert {p.dtype for p in model.backbone.parameters()} == {HALF}
    before = {k: p.detach().clone() for k, p in named.items()}
    outputs = model(images().to(HALF))
    assert outputs.dtype == HALF
    torch.nn.functional.cross_entropy(outputs.float(), targets()).backward()
    torch.optim.AdamW(named.values(), lr=METHODS[method].default_lr).step()
    for key, parameter in named.items():
        assert parameter.grad is not None, key
        pulled = parameter.grad != 0
        assert bool((parameter != before[key])[pulled].all()), key


@each
def test_what_it_promises_holds_in_half_precision(method: str) -> None:
    """The start is the pretrained function to the bit, settings of memory change no gradient, a merge is near and half, too."""
    model, x = half_model(method, family_of(method)), images().to(HALF)
    with torch.no_grad():
        before = bare(family_of(method), dtype=HALF)(x)
        assert torch.equal(model(x), before) == METHODS[method].identity
    found = {}
    for setting in MEMORY_SETTINGS:
        model.memory = setting
        found[setting] = gradients(model.train(), lambda: model(x).float().square().sum())
    assert all(torch.equal(g, found["off"][k]) for grads in found.values() for k, g in grads.items())
    if METHODS[method].merges:
        plain = model.eval().merge()
        assert {p.dtype for p in plain.parameters()} == {HALF}
        with torch.no_grad():
            torch.testing.assert_close(plain(x), model(x), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("how", ["to", "half", "inside"])
def test_a_cast_is_one_of_the_backbone(how: str) -> None:
    """`.to(torch.bfloat16)`, `.half()` and the cast of a module around the model keep adapters and heads, to the bit."""
    model = bare("vit")
    attach(model, "ssf")
    kept = {k: p.detach().clone() for k, p in model.parameters_to_train().items()}
    if how == "to":
        model.to(torch.bfloat16)
    elif how == "half":
        model.half()
    else:
        torch.nn.Sequential(model).bfloat16()
    assert model.dtype in (torch.float16, torch.bfloat16) and model.adapter_dtype == torch.float32
    assert all(torch.equal(p, kept[k]) and p.dtype == torch.float32 for k, p in model.parameters_to_train().items())
    assert model(images().to(model.dtype)).dtype == model.dtype
    assert model.float()(images()).dtype == torch.float32 and model.double().adapter_dtype == torch.float64


def test_files_keep_what_was_trained(tmp_path: Path) -> None:
    model = half_model("ssf")
    model.save_adapter(tmp_path / "wide")
    model.save_adapter(tmp_path / "half", dtype=torch.float16)
    again = bare("vit", dtype=HALF)
    from zoo.disk import attach as put
    from zoo.disk import read

    put(again, read(tmp_path / "wide"))
    own = again.parameters_to_train()
    assert all(torch.equal(p, own[k]) for k, p in model.parameters_to_train().items())
    for name, dtype in (("wide", torch.float32), ("half", torch.float16)):
        assert {t.dtype for t in read(tmp_path / name).tensors.values()} == {dtype}


@pytest.mark.parametrize("method", ["norm", "full", "lora", "ssf", "vpt"])
def test_compiled_and_copied(method: str) -> None:
    model, x = half_model(method).eval(), images().to(HALF)
    expected = gradients(model, lambda: model(x).float().square().sum())
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    found = gradients(twin, lambda: compiled(x).float().square().sum())
    torch._dynamo.reset()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0.1, atol=0.05 * float(value.abs().max()) + 1e-3)


def test_float32_runs_in_no_region(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a float32 backbone nothing is cast and no autocast region is entered."""
    model = bare("vit")
    attach(model, "lora")
    monkeypatch.setattr(torch, "autocast", None)
    with torch.no_grad():
        model(images())
    assert model.num_classes == CLASSES and model._state.narrow is None
