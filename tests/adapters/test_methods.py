"""Every registered method on both families: what all of them promise. The methods and models stand in method_models.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from method_models import (
    FAMILIES,
    METHODS,
    attach,
    bare,
    both,
    build,
    each,
    gradients,
    images,
    loss_of,
    shake,
    state,
)
from sampled import few
from torch import Tensor
from torch._dynamo.utils import counters

import zoo
from zoo.engine.memory import MEMORY_SETTINGS
from zoo.errors import ConfigError, MergeError


def test_every_method_is_here() -> None:
    """All that are registered, each on a family of its own choice or with a test of its own that says where it works."""
    assert sorted(METHODS) == zoo.list_adapters()
    own = {path.stem for path in Path(__file__).parents[1].rglob("test_*.py")}
    for name, cls in METHODS.items():
        assert set(cls.trial_families) <= set(FAMILIES), name
        assert cls.trial_families or f"test_{name}" in own, f"{name} is tried nowhere: it needs tests/**/test_{name}.py"


@both
@each
def test_start(family: str, method: str) -> None:
    model = bare(family)
    with torch.no_grad():
        before = model(images())
        attach(model, method)
        after = model(images())
    assert after.isfinite().all()
    assert torch.equal(after, before) == METHODS[method].identity
    with torch.no_grad(), model.disable():
        assert torch.equal(model(images()), before)


@each
def test_an_empty_batch(method: str) -> None:
    """timm's ViT takes one (its Swin does not): what a server may be asked between two requests."""
    model = build("vit", method).eval()
    with torch.no_grad():
        assert model(images()[:0]).shape == (0, model(images()).shape[1])


@both
@each
def test_removal(family: str, method: str) -> None:
    """After attaching, training and removing: the same keys, the same bits, and nothing of ours on any module."""
    model = bare(family)
    modules = {name: (type(m), set(vars(m))) for name, m in model.backbone.named_modules()}
    frozen, logits = state(model), model(images())
    attach(model, method)
    assert set(model.backbone.state_dict()) == set(frozen)
    model.train()
    optimizer = torch.optim.SGD(model.parameters_to_train().values(), lr=0.1)
    loss_of(model).backward()
    optimizer.step()
    head = {k: v.clone() for k, v in model.heads["default"].state_dict().items()}
    model.eval()
    model.remove_adapter(method)
    assert state(model).keys() == frozen.keys()
    assert all(torch.equal(v, frozen[k]) for k, v in state(model).items())
    for name, module in model.backbone.named_modules():
        assert modules[name] == (type(module), set(vars(module)))
        assert not module._forward_hooks and not module._forward_pre_hooks
    if all(torch.equal(v, head[k]) for k, v in bare(family).heads["default"].state_dict().items()):
        assert torch.equal(model(images()), logits)
    assert not any(p.requires_grad for p in model.backbone.parameters())


@both
@each
def test_merge(family: str, method: str) -> None:
    model = build(family, method)
    shake(model, method)
    frozen = state(model)
    if not METHODS[method].merges:
        with pytest.raises(MergeError, match=f"'{re.escape(method)}'.*cannot be merged"):
            model.merge()
    else:
        plain = model.merge()
        assert type(plain) is type(model.backbone)
        assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in plain.modules())
        with torch.no_grad():
            torch.testing.assert_close(plain(images()), model(images()), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(v, frozen[k]) for k, v in state(model).items())


@both
@each
def test_nothing_is_dead(family: str, method: str) -> None:
    model = build(family, method).train()
    assert model.probe(images()) == []
    shake(model, method)
    assert model.probe(images()) == []
    found = gradients(model, lambda: loss_of(model))
    assert set(found) == set(model.parameters_to_train())
    assert all(g.isfinite().all() for g in found.values())
    assert [k for k, g in found.items() if not g.any()] == []


@both
@each
def test_two_steps_move_every_tensor(family: str, method: str) -> None:
    model = build(family, method).train()
    with model.disable():
        frozen = state(model)
    start = {k: p.detach().clone() for k, p in model.parameters_to_train().items()}
    # Adam without its epsilon moves whatever has a gradient at all, however small
    optimizer = torch.optim.Adam(model.parameters_to_train().values(), lr=0.01, eps=1e-30)
    before = loss_of(model).item()
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        loss_of(model).backward()
        optimizer.step()
        moved = {k for k, p in model.parameters_to_train().items() if not torch.equal(p, start[k])}
        assert moved
    assert moved == set(start)
    assert loss_of(model).item() < before
    with model.disable():
        assert all(torch.equal(v, frozen[k]) for k, v in state(model).items())


@both
@each
def test_modes(family: str, method: str) -> None:
    model = build(family, method)
    adapter = model.adapters[method]
    model.train()
    assert adapter.training and model.head.training
    assert all(m.training for m in adapter.modules())
    assert model.backbone.training == (method == "full")
    model.eval()
    assert not any(m.training for m in model.modules())
    shake(model, method)
    with torch.no_grad():
        first = model(images())
        assert torch.equal(model(images()), first)
        model.train()
        model.eval()
        assert torch.equal(model(images()), first)
        # What is computed once for evaluation must notice that parameters changed.
        shake(model, method, seed=4)
        if next(iter(adapter.parameters()), None) is not None:
            assert not torch.equal(model(images()), first)


@both
@each
def test_save_and_reload(family: str, method: str, tmp_path: Path) -> None:
    model = build(family, method)
    shake(model, method)
    with torch.no_grad():
        expected = model(images())
    model.save_adapter(tmp_path / "saved")
    torch.manual_seed(0)  # the same random backbone
    again = zoo.load(adapter=tmp_path / "saved", pretrained=False)
    with torch.no_grad():
        assert torch.equal(again(images()), expected)
    assert again.active == (method,)
    assert again.parameters_to_train().keys() == model.parameters_to_train().keys()


@both
@each
def test_on_off_and_switching(family: str, method: str) -> None:
    model = bare(family)
    with torch.no_grad():
        off = model(images())
        seen = {}
        for seed, name in enumerate(("a", "b")):
            attach(model, method, name, activate=False)
            model.set_active(name)
            shake(model, name, seed)
            seen[name] = model(images())
        for name in ("a", "b", "a"):
            model.set_active(name)
            assert torch.equal(model(images()), seen[name])
            assert {k.split("/")[0] for k in model.parameters_to_train()} <= {name, "head"}
        model.set_active()
        assert torch.equal(model(images()), off)
        model.set_active("b")
        with model.disable():
            assert torch.equal(model(images()), off)
        assert model.active == ("b",)
        model.remove_adapter("a")
        assert torch.equal(model(images()), seen["b"])


@both
@pytest.mark.parametrize("order", ["first", "second"])
@each
def test_together_with_lora(family: str, method: str, order: str) -> None:
    """LoRA beside every method, in either order: both act, both learn, and each is there alone again without the other."""
    model = bare(family)
    names = [method, "beside"] if order == "first" else ["beside", method]
    for name in names:
        attach(model, "lora" if name == "beside" else method, name)
    assert model.active == tuple(names)
    for name in names:
        shake(model, name)
    assert model.train().probe(images()) == []
    model.eval()
    with torch.no_grad():
        together = model(images())
        model.set_active(method)
        alone = model(images())
        assert not torch.equal(together, alone)
        model.set_active(*names)
        assert torch.equal(model(images()), together)
        if METHODS[method].merges:
            torch.testing.assert_close(model.merge()(images()), together, rtol=1e-5, atol=1e-5)
        else:
            with pytest.raises(MergeError, match=f"'{re.escape(method)}'.*cannot be merged"):
                model.merge()
        model.remove_adapter("beside")
        assert torch.equal(model(images()), alone)


@both
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@each
def test_per_sample_adapters(family: str, method: str, train: bool) -> None:
    """Each row is what the adapter named for it gives alone; in training the gradients are those of the rows."""
    model = bare(family)
    for seed, name in enumerate(("a", "b")):
        attach(model, method, name, activate=False)
        shake(model, name, seed)
    attach(model, "lora", "c", activate=False)
    shake(model, "c")
    model.set_active("a")
    model.train(train)
    rows = ["b", None, "a", "c"]
    if train and model.adapters["a"].batch_wise:
        with pytest.raises(ConfigError, match="'b' normalises over the batch"):
            model(images(), adapters=rows)
        return
    alone = []
    for i, name in enumerate(rows):
        model.set_active(*([name] if name else []))
        alone.append(model(images())[i : i + 1])
    expected = torch.cat(alone)
    model.set_active("a")
    logits = model(images(), adapters=rows)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert model.active == ("a",)
    if train:
        for name in ("a", "b", "c"):
            model.adapters[name].requires_grad_(True)
        named = {f"{n}/{k}": p for n in ("a", "b", "c") for k, p in model.adapters[n].named_parameters()}
        weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5))
        total: dict[str, Tensor] = {}
        for i, name in enumerate(rows):
            model.set_active(*([name] if name else []))
            mine = {k: p for k, p in named.items() if k.split("/")[0] == name}
            if mine:
                row = (model(images())[i] * weights[i]).sum()
                total |= dict(zip(mine, torch.autograd.grad(row, list(mine.values()), allow_unused=True)))
        model.set_active("a")
        for p in named.values():
            p.requires_grad_(True)
        routed = (model(images(), adapters=rows) * weights).sum()
        found = torch.autograd.grad(routed, list(named.values()), allow_unused=True)
        for (key, wanted), grad in zip(((k, total[k]) for k in named), found):
            assert (wanted is None) == (grad is None), key
            if wanted is not None:
                torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("setting", ["low", "min"])
@each
def test_per_sample_gradients_when_recomputed(method: str, setting: str) -> None:
    """Recomputation in backward, when the batch is no longer routed, serves each row by its own adapter again."""
    model = bare("vit")
    for seed, name in enumerate(("a", "b")):
        attach(model, method, name, activate=False)
        shake(model, name, seed)
    model.set_active("b")
    model.train()
    named = {f"{n}/{k}": p for n in "ab" for k, p in model.adapters[n].named_parameters()}
    if model.adapters["a"].batch_wise:
        with pytest.raises(ConfigError, match="'a' normalises over the batch"):
            model(images(), adapters=["a", None, "b", "a"])
        return
    found = []
    for memory in ("default", setting):
        model.memory = memory
        for p in named.values():
            p.requires_grad_(True)
        loss = model(images(), adapters=["a", None, "b", "a"]).square().sum()
        found.append(torch.autograd.grad(loss, [*named.values(), *model.head.parameters()]))
    assert model.active == ("b",)
    assert all(torch.equal(a, b) for a, b in zip(*found))


@both
@each
def test_memory_settings_give_plain_gradients(family: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recomputed instead of kept changes no gradient by a bit, and the settings keep less and less."""
    model = build(family, method).train()
    shake(model, method)
    found, kept = {}, {}
    for setting in MEMORY_SETTINGS:
        model.memory = setting
        found[setting] = gradients(model, lambda: loss_of(model))
        kept[setting] = model.saved_bytes(images())
    model.memory = "default"
    monkeypatch.setattr("zoo.engine.memory._Recording.__enter__", lambda self: None)
    plain = gradients(model, lambda: loss_of(model))
    for setting, gradient in found.items():
        for key, value in gradient.items():
            assert torch.equal(value, plain[key]), (setting, key)
    assert kept["default"] >= kept["low"]


def compiled_sets() -> list[Any]:
    """Every method alone; switched with another, which compiles twice as much, a sample of them in every run."""
    drawn = {method: few("vit", method) for method in METHODS}
    alone = [pytest.param(method, False, id=method) for method in METHODS if not drawn[method]]
    marks = {method: () if drawn[method] else pytest.mark.rest for method in METHODS}
    return alone + [pytest.param(method, True, id=f"{method}-switched", marks=marks[method]) for method in METHODS]


@pytest.mark.parametrize(("method", "switched"), compiled_sets())
def test_compiles_whole_and_once(method: str, switched: bool) -> None:
    """One graph for each set of adapters, equal to eager, and none when switching back."""
    model = bare("vit", depth=1)
    attach(model, method)
    attach(model, "bitfit" if method == "lora" else "lora", "other", activate=False)
    shake(model, method)
    shake(model, "other")
    model.train()
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    graphs = []
    try:
        for name in (method, "other", method, "other", method) if switched else (method, method):
            model.set_active(name)
            found = gradients(model, lambda: compiled(images()).square().sum())
            graphs.append(counters["stats"]["unique_graphs"])
            if len(graphs) <= 2:
                expected = gradients(model, lambda: model(images()).square().sum())
                assert found.keys() == expected.keys()
                for key, value in expected.items():
                    torch.testing.assert_close(
                        found[key], value, rtol=1e-3, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}"
                    )
                torch.testing.assert_close(compiled(images()), model(images()), rtol=1e-5, atol=1e-5)
    finally:
        torch._dynamo.reset()
    assert graphs == ([1, 2, 2, 2, 2] if switched else [1, 1])
