"""Hyperformer: the forward written out, made once for each pass and task, tasks, extraction to a plain adapter, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from method_models import bare, images, shake
from torch import Tensor

import zoo
from zoo.errors import ConfigError, ContextError, UnknownNameError

SMALL: dict[str, Any] = {"rank": 3, "task_dim": 4, "hidden": 8, "projected": 6}
FORMS = pytest.mark.parametrize("form", ["hyperformer", "++"])


def attached(family: str = "vit", **settings: Any) -> zoo.Model:
    model = bare(family)
    torch.manual_seed(2)
    model.add_adapter(zoo.adapter("hyperformer", **{**SMALL, **settings}))
    return model


def of_task(model: zoo.Model, task: str) -> Tensor:
    with torch.no_grad():
        return model(images(), context={"task": task})


@FORMS
def test_forward_written_out(form: str) -> None:
    """A whole model: rows, network, maps and bottlenecks by their equations."""
    model = attached(form=form, tasks=("a", "b"))
    shake(model, "hyperformer")
    s = model.adapters["hyperformer"].hyper.state_dict()

    def affine(x: Tensor, key: str) -> Tensor:
        return x @ s[f"{key}.weight"].T + s[f"{key}.bias"]

    def adapter(y: Tensor, layer: int, kind: int) -> Tensor:
        rows = [s["tasks"][1], s["stacks.0.layers"][layer]]
        rows += [s["stacks.0.kinds"][kind]] if form == "++" else []
        e = affine(affine(torch.cat(rows), "stacks.0.projector.into").relu(), "stacks.0.projector.out")
        norm = "stacks.0.projector.norm"
        e = F.layer_norm(e, (6,), s[f"{norm}.weight"], s[f"{norm}.bias"], 1e-6)
        maps = f"stacks.0.makers.{0 if form == '++' else kind}"
        down, up = affine(e, f"{maps}.down").view(3, 48), affine(e, f"{maps}.up").view(48, 3)
        z = F.gelu(y @ down.T + affine(e, f"{maps}.down_bias"), approximate="tanh")
        z = z @ up.T + affine(e, f"{maps}.up_bias")
        return y + F.layer_norm(z, (48,), affine(e, f"{maps}.scale"), affine(e, f"{maps}.shift"))

    vit: Any = model.backbone
    with torch.no_grad(), model.disable():
        x = vit._pos_embed(vit.patch_embed(images()))
        for i, block in enumerate(vit.blocks):
            x = x + adapter(block.attn(block.norm1(x)), i, 0)
            x = x + adapter(block.mlp(block.norm2(x)), i, 1)
        expected = model.head(vit.forward_head(vit.norm(x), pre_logits=True))
    torch.testing.assert_close(of_task(model, "b"), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(of_task(model, "a"), expected)


@FORMS
def test_count(form: str) -> None:
    model = attached(form=form, tasks=("a", "b", "c"))
    maps = 7 * (2 * 48 * 3 + 3 + 3 * 48)
    network = 8 * (4 * (3 if form == "++" else 2) + 1) + 6 * 9 + 12
    rows = 4 * (3 + 2 + (2 if form == "++" else 0))
    sets = 1 if form == "++" else 2
    assert model.num_parameters(trainable=True, head=False) == sets * maps + network + rows


def test_stages_of_a_hierarchical_backbone_have_their_own_stack() -> None:
    model = attached("swin")
    hyper = model.adapters["hyperformer"].hyper
    assert [m.dim for stack in hyper.stacks for m in stack.makers] == [24, 24, 48, 48]
    assert [len(stack.layers) for stack in hyper.stacks] == [2, 2]
    assert model.train().probe(images()) == []


@FORMS
@pytest.mark.parametrize("memory", ["default", "min"])
def test_made_once_for_each_step(form: str, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = attached(form=form, tasks=("a", "b")).train()
    model.memory = memory
    hyper, runs = model.adapters["hyperformer"].hyper, []
    monkeypatch.setattr(hyper, "forward", lambda task, run=hyper.forward: runs.append(task) or run(task))
    for task in ("a", "b", "a"):
        model(images(), context={"task": task}).square().sum().backward()
    assert runs == ["a", "b", "a"]  # backward, and what it recomputes, made nothing


@FORMS
def test_a_task_of_zeros_still_has_an_adapter(form: str) -> None:
    """What biases and the rows of layers make is there without a task."""
    model = attached(form=form, tasks=("a", "b"))
    shake(model, "hyperformer")
    hyper = model.adapters["hyperformer"].hyper
    with torch.no_grad():
        hyper.tasks[0] = 0
        assert all(w.up.abs().max() > 0 for w in hyper("a").values())
        with model.disable():
            plain = model(images())
    assert not torch.allclose(of_task(model, "a"), plain)
    assert not torch.allclose(of_task(model, "a"), of_task(model, "b"))


@FORMS
@pytest.mark.parametrize("norms", [False, True])
def test_a_task_taken_out_is_a_plain_adapter(form: str, norms: bool, tmp_path: Path) -> None:
    model = attached(form=form, tasks=("a", "b"), train_norms=norms)
    shake(model, "hyperformer")
    expected = of_task(model, "b")
    names = model.adapters["hyperformer"].extract(model, "b", "only-b")
    assert names == (("only-b", "only-b-norm") if norms else ("only-b",))
    assert model.active == ("hyperformer",) and torch.equal(of_task(model, "b"), expected)
    model.save_adapter(tmp_path / "b", adapters=names)
    torch.manual_seed(0)
    plain = zoo.load(adapter=tmp_path / "b", pretrained=False)
    assert [a.method for a in plain.adapters.values()] == (["adapter", "norm"] if norms else ["adapter"])
    with torch.no_grad():
        torch.testing.assert_close(plain(images()), expected, rtol=1e-5, atol=1e-5)
    assert not plain.wanted
    with pytest.raises(UnknownNameError, match="no task 'c'"):
        model.adapters["hyperformer"].extract(model, "c")
    assert set(model.adapters) == {"hyperformer", *names}


def test_the_only_task_taken_out() -> None:
    model = attached()
    shake(model, "hyperformer")
    expected = model(images())
    assert model.adapters["hyperformer"].extract(model, "default") == ("adapter",)
    assert all(not p.requires_grad for p in model.adapters["adapter"].parameters())
    model.set_active("adapter")
    torch.testing.assert_close(model(images()), expected, rtol=1e-5, atol=1e-5)


def test_tasks_are_asked_for_and_checked() -> None:
    model = attached(tasks=("mnli", "qnli"))
    with pytest.raises(ContextError, match="needs 'task'"):
        model(images())
    with pytest.raises(UnknownNameError, match=r"knows no task 'mnl'.*mnli"):
        model(images(), context={"task": "mnl"})
    with model.context(task="qnli"):
        inside = model(images())
    assert torch.equal(inside, model(images(), context={"task": "qnli"}))
    assert torch.equal(inside, model(images(), context={"task": ["qnli"] * 4}))
    with pytest.raises(ContextError, match="mnli, qnli"):
        model(images(), context={"task": ["qnli", "mnli", "qnli", "qnli"]})
    single = attached(tasks=("only",))
    assert torch.equal(single(images()), single(images(), context={"task": "only"}))
    with pytest.raises(UnknownNameError, match="knows no task 'other'"):
        single(images(), context={"task": "other"})


def test_rows_of_a_batch_served_by_two_hyperformers_each_with_its_task() -> None:
    model = attached(tasks=("a", "b"))
    model.add_adapter(zoo.adapter("hyperformer", tasks=("a", "b"), form="++", **SMALL), "second", activate=False)
    shake(model, "hyperformer")
    shake(model, "second")
    names = ["second", "hyperformer", None, "second"]
    with torch.no_grad():
        routed = model(images(), adapters=names, context={"task": ["a", "b", "a", "a"]})
        for name, task, rows in (("second", "a", [0, 3]), ("hyperformer", "b", [1])):
            model.set_active(name)
            torch.testing.assert_close(routed[rows], of_task(model, task)[rows], rtol=1e-5, atol=1e-5)


def test_start_is_close() -> None:
    """gamma is 0.01 sqrt(p) large, and beta, too: what is added is some percent of its LayerNorm's output."""
    model = attached(rank=None, reduction=8.0, task_dim=64, hidden=128, projected=64)
    weights = model.adapters["hyperformer"].hyper(None)
    for made in (torch.cat([w.norm for w in weights.values()]), torch.cat([w.norm_bias for w in weights.values()])):
        assert float(made.detach().std()) == pytest.approx(0.01 * math.sqrt(64), rel=0.3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ()}, "tasks is empty"),
        ({"tasks": ("a", "a")}, "one twice"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": 2, "reduction": 4.0}, "both given"),
        ({"task_dim": 0}, "task_dim is 0"),
        ({"reduction": -1.0, "rank": None}, "reduction is -1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        zoo.adapter("hyperformer", **{**SMALL, **settings})
