"""Values of a forward pass reach every op in the right rows; carried tensors live for one pass."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from context_adapters import ByTask, Graded, ScaledByQuality, Stepping
from method_models import bare, images
from torch import Tensor
from train_parts import Stop, StopAt, easy_data, fit, tiny_model

import zoo
from zoo.errors import ConfigError, ContextError, UnknownNameError

QUALITY = torch.tensor([0.1, 0.9, 0.4, 1.5])
TASKS = ["birds", "cars", "cars", "birds"]
VALUES = {"quality": QUALITY, "task": TASKS}


def build(family: str = "vit", *adapters: Any, **options: Any) -> zoo.Model:
    model = bare(family, **options).double()
    torch.manual_seed(3)
    for adapter in adapters or (ScaledByQuality(),):
        model.add_adapter(adapter)
    return model


def x() -> Tensor:
    return images().double()


def one_by_one(model: zoo.Model, values: dict[str, Any], **options: Any) -> Tensor:
    return torch.cat(
        [model(x()[i : i + 1], context={k: v[i : i + 1] for k, v in values.items()}, **options) for i in range(4)]
    )


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_each_row_has_its_own_value(family: str) -> None:
    model = build(family)
    expected = one_by_one(model, VALUES)
    torch.testing.assert_close(model(x(), context=VALUES), expected)
    assert not torch.allclose(model(x(), context={**VALUES, "quality": QUALITY.flip(0)}), expected)
    torch.testing.assert_close(model.features(x(), context=VALUES).shape[0], 4)


def test_given_around_calls_and_nested() -> None:
    model = build()
    expected = model(x(), context=VALUES)
    with model.context(quality=QUALITY, task="cars"):
        with model.context(task=TASKS):
            assert torch.equal(model(x()), expected)
            same = model(x(), context={"task": ["cars"] * 4})  # the call's own go first
        assert torch.equal(model(x()), same)
    with pytest.raises(ContextError, match="needs 'quality'"):
        model(x())
    with pytest.raises(RuntimeError, match="stop"), model.context(quality=QUALITY):
        raise RuntimeError("stop")
    assert model._state.context.given == {}
    assert torch.equal(
        model(x(), context={"quality": 1.0, "task": 1}), model(x(), context={"quality": [1.0] * 4, "task": "cars"})
    )


def test_what_is_refused() -> None:
    model = build()
    with pytest.raises(ContextError, match=r"'scaled-by-quality' needs 'task' .*known: birds, cars"):
        model(x(), context={"quality": QUALITY})
    with pytest.raises(ContextError, match="3 values for a batch of 4"):
        model(x(), context={**VALUES, "quality": QUALITY[:3]})
    with pytest.raises(UnknownNameError, match=r"no task 'card'. Did you mean 'cars'"):
        model(x(), context={**VALUES, "task": "card"})
    with pytest.raises(UnknownNameError, match=r"reads a context value 'qualty'. Did you mean 'quality'"):
        model(x(), context={**VALUES, "qualty": QUALITY})
    with pytest.raises(ContextError, match="context is list; expected a dict"):
        model(x(), context=[QUALITY])  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="no adapter of this model reads"), bare("vit").context(task="a"):
        raise AssertionError
    with pytest.raises(ContextError, match="is a set; expected a tensor or list of 4"):
        model(x(), context={**VALUES, "quality": {1}})
    value = model.adapters["scaled-by-quality"].get_submodule("blocks.0.attn.q").quality
    with pytest.raises(ContextError, match="outside of a forward pass"):
        value.rows(x())
    assert model.wanted == {"quality": ("scaled-by-quality",), "task": ("scaled-by-quality",)}
    model.remove_adapter("scaled-by-quality")
    assert model.wanted == {} and model._wants == {}
    with pytest.raises(zoo.ZooError, match=r"outside of Adapter.attach"):
        model.points.context("task")


class Asks(ByTask):
    """Asks for what cannot be."""

    asked: Any = ("a b",)

    def attach(self, points: zoo.Points) -> None:
        points.context(*self.asked)


@pytest.mark.parametrize("asked", [("a b",), ("inputs", "batch"), ("quality", "row"), ("task.one",)])
def test_mistakes_of_a_method(asked: tuple[str, ...]) -> None:
    adapter = Asks()
    Asks.asked = asked
    with pytest.raises(ConfigError, match="'by-task'"):
        bare("vit").add_adapter(adapter)


@pytest.mark.parametrize("others", [(), ("bitfit",), ("prefix",)])
def test_per_sample_adapters(others: tuple[str, ...]) -> None:
    """Each adapter sees the values of its own rows, in one pass, and in sub-batches beside a method that needs them."""
    model = build()
    torch.manual_seed(4)
    model.add_adapter(ScaledByQuality(), "second", activate=False)
    for other in others:
        model.add_adapter(other, activate=False)
    names = ["second", others[0] if others else None, "scaled-by-quality", "second"]
    mixed = model(x(), adapters=names, context=VALUES)
    rows = []
    for i, name in enumerate(names):
        model.set_active(*([name] if name else []))
        rows.append(model(x()[i : i + 1], context={k: v[i : i + 1] for k, v in VALUES.items()}))
    torch.testing.assert_close(mixed, torch.cat(rows))
    model.set_active("second")
    with pytest.raises(ContextError, match="needs 'quality'"):
        model(x(), adapters=names, context={"task": "cars"})
    assert model.active == ("second",) and model._state.route is None and model._state.context.frame is None


def test_one_task_for_each_adapter_of_a_batch() -> None:
    model = build("vit", ByTask())
    model.add_adapter(ByTask(), "other", activate=False)
    names = ["other", "by-task", "by-task", "other"]
    mixed = model(x(), adapters=names, context={"task": TASKS})
    model.set_active("by-task")
    torch.testing.assert_close(mixed[1:3], model(x()[1:3], context={"task": "cars"}))
    with pytest.raises(ContextError, match="got birds, cars"):
        model(x(), context={"task": TASKS})


@pytest.mark.parametrize("family", ["vit", "swin"])
@pytest.mark.parametrize("memory", ["low", "min"])
@pytest.mark.parametrize("routed", [False, True])
def test_recomputation_sees_the_values_of_its_forward(family: str, memory: str, routed: bool) -> None:
    model = build(family, ScaledByQuality(), Stepping())
    options = {"adapters": ["scaled-by-quality", "stepping", "stepping", None]} if routed else {}
    found = []
    for setting in ("default", memory):
        model.memory = setting
        loss = model(x(), context=VALUES, **options).square().sum()
        with torch.no_grad():
            model(x()[:2], context={"quality": 7.0, "task": "cars"})  # another forward before the backward
        found.append(torch.autograd.grad(loss, list(model.parameters_to_train().values())))
        assert model._state.context.frame is None
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("method", ["vpt", "prefix", "vqt"])
def test_with_tokens_that_samples_share(method: str) -> None:
    """A prompt that all images share passes projections whose change depends on the image: one copy for each."""
    for grad in (True, False):
        model = build("vit", ScaledByQuality(), method).eval()
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(model(x(), context=VALUES), one_by_one(model, VALUES))
            first = model(x()[:1], context={"quality": QUALITY[:1], "task": "cars"})
            assert not torch.equal(model(x()[:1], context={"quality": QUALITY[1:2], "task": "cars"}), first)


class Reads(torch.nn.Module):
    def __init__(self, value: Any, dim: int) -> None:
        super().__init__()
        self.value, self.a = value, torch.nn.Parameter(torch.ones(dim) / dim)

    def forward(self, y: Tensor) -> Tensor:
        return y + self.a * self.value.rows(y).flatten(1).mean(1)[:, None, None]


class ReadsInputs(ByTask):
    def attach(self, points: zoo.Points) -> None:
        inputs = points.context("inputs")
        for point in points.select(kind="sublayer", role="mlp"):
            point.after(Reads(inputs, point.dim_out))


def test_the_inputs_themselves() -> None:
    model = build("vit", ReadsInputs(), ScaledByQuality())
    expected = torch.cat([model(x()[i : i + 1], context={"quality": 1.0, "task": "cars"}) for i in range(4)])
    torch.testing.assert_close(model(x(), context={"quality": 1.0, "task": "cars"}), expected)
    model.set_active("by-task")
    mixed = model(x(), adapters=[None, "by-task", None, "by-task"])
    torch.testing.assert_close(mixed[1::2], model(x()[1::2]))


# -- carried tensors ------------------------------------------------------------------------------------------------------


def by_hand(model: zoo.Model, adapter: Any, image: Tensor) -> Tensor:
    """The ViT's forward with h from sublayer to sublayer."""
    vit, h = model.backbone, torch.zeros(())
    tokens = vit._pos_embed(vit.patch_embed(image))
    for i, block in enumerate(vit.blocks):
        for name, norm, f in (("attn", block.norm1, block.attn), ("mlp", block.norm2, block.mlp)):
            step = adapter.get_submodule(f"blocks.{i}.{name}")
            y = type(f).forward(f, norm(tokens))
            h = torch.tanh(h + y @ step.a)
            tokens = tokens + y + h @ step.b
    return model.head(model.backbone.norm(tokens)[:, 0])


def test_carried_along_the_blocks() -> None:
    model = build("vit", Stepping())
    expected = by_hand_bare(model)
    torch.testing.assert_close(model(x()), expected)
    torch.testing.assert_close(model(x()), expected)  # nothing is left of the pass before
    mixed = model(x(), adapters=["stepping", None, None, "stepping"])
    torch.testing.assert_close(mixed[[0, 3]], expected[[0, 3]])
    assert model.probe(x()) == []


def by_hand_bare(model: zoo.Model) -> Tensor:
    adapter = model.adapters["stepping"]
    with model.disable():
        return by_hand(model, adapter, x())


def test_carried_tensors_are_freed_when_a_pass_breaks_off() -> None:
    model = build("vit", Stepping())
    held: list[weakref.ref[Tensor]] = []

    def stop(module: Any, inputs: Any, output: Any) -> None:
        frame = model._state.context.frame
        held.extend(weakref.ref(t) for t in frame.carried.values())
        raise KeyboardInterrupt

    handle = model.backbone.norm.register_forward_hook(stop)
    for _ in range(2):
        with (
            torch.no_grad(),
            contextlib.suppress(KeyboardInterrupt),
        ):  # pytest.raises would hold on to the frames of the failure
            model(x())
    handle.remove()
    gc.collect()
    assert len(held) == 2 and all(ref() is None for ref in held)
    assert model._state.context.frame is None
    model(x())


# -- compiled, copied, trained ---------------------------------------------------------------------------------------------


def test_compiles_as_one_graph() -> None:
    model = build("vit", ScaledByQuality(), ByTask(), Stepping())
    model.set_active("scaled-by-quality", "stepping")
    graphs = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    tasks = torch.tensor([0, 1, 1, 0])
    for quality in (QUALITY, QUALITY.flip(0)):
        values = {"quality": quality, "task": tasks}
        torch.testing.assert_close(compiled(x(), context=values), model(x(), context=values))
    assert len(graphs) == 1
    with model.context(**values):
        torch.testing.assert_close(compiled(x()), model(x()))
    model.set_active("by-task")
    seen = len(graphs)
    for task in ("birds", "cars", "birds"):  # a graph for each name
        torch.testing.assert_close(compiled(x(), context={"task": task}), model(x(), context={"task": task}))
    assert len(graphs) == seen + 2
    torch._dynamo.reset()


def test_a_copy_reads_its_own_values() -> None:
    model = build()
    twin = copy.deepcopy(model)
    with model.context(**VALUES), pytest.raises(ContextError):
        twin(x())
    assert torch.equal(twin(x(), context=VALUES), model(x(), context=VALUES))
    part = copy.deepcopy(model.adapters["scaled-by-quality"])
    assert all(not isinstance(m, zoo.Model) for m in part.modules())


def test_a_plain_model_makes_no_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("zoo.model.contextual.make_frame", never)
    model = build("vit", "lora")
    model(x())
    model(x(), adapters=["lora"] * 4)


def test_training_gets_values_from_its_task(tmp_path: Any) -> None:
    adapters = [ScaledByQuality(targets="q,v"), ByTask()]
    whole = tiny_model(adapters)
    with pytest.raises(ContextError, match="needs 'quality'"):
        fit(tiny_model(adapters), easy_data())
    report = fit(whole, easy_data(), easy_data(seed=1), task=Graded(), out=str(tmp_path / "whole"))
    assert report.history[-1]["loss"] < report.history[0]["loss"]
    metrics = zoo.evaluate(whole, easy_data(seed=1), task=Graded(), progress=False)
    assert metrics["loss"] == pytest.approx(report.history[-1]["val_loss"], rel=1e-5)


def test_resumes_exactly(tmp_path: Any) -> None:
    options = {"task": Graded(), "epochs": 3}
    whole, cut = (tiny_model([ScaledByQuality(targets="q,v"), Stepping()]) for _ in range(2))
    fit(whole, easy_data(), out=str(tmp_path / "a"), **options)
    with pytest.raises(Stop):
        fit(cut, easy_data(), out=str(tmp_path / "b"), callbacks=[StopAt(1, "epoch_end")], **options)
    again = tiny_model([ScaledByQuality(targets="q,v"), Stepping()])
    fit(again, easy_data(), out=str(tmp_path / "b"), **options)
    for key, value in whole.parameters_to_train().items():
        assert torch.equal(value, again.parameters_to_train()[key]), key
