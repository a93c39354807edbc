"""Generated weights: once for each forward pass, recomputed blocks and compiled models included; kept in evaluation; copies."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from method_models import bare, images, loss_of
from torch import Tensor, nn
from train_parts import Stop, StopAt, easy_data, fit, tiny_model, weights

import zoo
from zoo import registry
from zoo.engine.memory import MEMORY_SETTINGS
from zoo.errors import AttachError, ContextError

RUNS: list[str | None] = []


class Vectors(nn.Module):
    """A row for each task -> a vector for each point."""

    def __init__(self, tasks: tuple[str, ...], points: int, dim: int) -> None:
        super().__init__()
        self.names, self.dim = tasks, dim
        self.rows = nn.Parameter(torch.randn(len(tasks), 4))
        self.map = nn.Linear(4, points * dim)

    def forward(self, task: str | None) -> tuple[Tensor, ...]:
        if not torch.compiler.is_compiling():
            RUNS.append(task)
        row = self.rows[0 if task is None else self.names.index(task)]
        return self.map(row).view(-1, self.dim).unbind(0)


class Shift(nn.Module):
    """`y -> y * (1 + v)`, v made by the generator."""

    def __init__(self, made: Any, generator: Vectors, index: int) -> None:
        super().__init__()
        self.made, self.shared, self.index = made, (generator,), index

    def forward(self, y: Tensor) -> Tensor:
        return y * (1 + self.made.get()[self.index])


@pytest.fixture(autouse=True)
def method() -> Iterator[None]:
    RUNS.clear()

    @registry.register_adapter("made")
    @dataclass
    class Made(zoo.Adapter):
        tasks: tuple[str, ...] = ("a", "b")
        used: bool = True

        def attach(self, points: zoo.Points) -> None:
            chosen = points.select("mlp", kind="sublayer")
            task = points.context("task", "batch", required=len(self.tasks) > 1, choices=self.tasks, example="a")
            generator = Vectors(tuple(self.tasks), len(chosen), chosen[0].dim_out)
            made = points.generate("vectors", generator, task)
            for i, point in enumerate(chosen):
                point.after(Shift(made, generator, i) if self.used else nn.Identity())

    yield
    registry._adapters.pop("made", None)


def build(**settings: Any) -> zoo.Model:
    model = bare("vit")
    torch.manual_seed(2)
    model.add_adapter(zoo.adapter("made", **settings))
    return model


def test_once_for_each_pass_with_plain_gradients() -> None:
    found = []
    for memory in MEMORY_SETTINGS:
        model = build().train()
        model.memory = memory
        RUNS.clear()
        with model.context(task="b"):
            loss_of(model).backward()
        assert RUNS == ["b"], memory
        assert not model.adapters["made"].vectors.rows.grad[0].any()
        found.append({k: p.grad for k, p in model.parameters_to_train().items()})
    # against a generator that runs at every point
    model = build().train()
    generator = model.adapters["made"].vectors
    for i in (0, 1):
        shift = model.adapters["made"].module_at(f"blocks.{i}.mlp")
        shift.made = type("Anew", (), {"get": lambda self: generator("b")})()
    with model.context(task="b"):
        loss_of(model).backward()
    found.append({k: p.grad for k, p in model.parameters_to_train().items()})
    for other in found[1:]:
        for key, gradient in found[0].items():
            torch.testing.assert_close(other[key], gradient, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(found[0][k], found[i][k]) for i in (1, len(MEMORY_SETTINGS) - 1) for k in found[0])


def test_two_passes_before_one_backward_each_read_their_own() -> None:
    """Recomputation of the first pass, after the second, sees the first task's weights."""
    model = build().train()
    gradients = []
    for memory in ("default", "min"):
        model.memory = memory
        model.zero_grad(set_to_none=True)
        first = model(images(), context={"task": "a"}).square().sum()
        second = model(images(), context={"task": "b"}).sum()
        (first + second).backward()
        gradients.append([p.grad.clone() for p in model.parameters_to_train().values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_kept_in_evaluation_until_a_parameter_changes() -> None:
    model = build().eval()
    with torch.no_grad():
        seen = {task: model(images(), context={"task": task}) for task in "ab"}
        assert RUNS == ["a", "b"]
        for task in "abba":
            assert torch.equal(model(images(), context={"task": task}), seen[task])
        assert RUNS == ["a", "b"]
        model.adapters["made"].vectors.map.bias.add_(1)
        changed = model(images(), context={"task": "a"})
        assert RUNS == ["a", "b", "a"] and not torch.equal(changed, seen["a"])
        model.adapters["made"].vectors.map.bias.data = model.adapters["made"].vectors.map.bias.data - 1
        model.train().eval()
        torch.testing.assert_close(model(images(), context={"task": "a"}), seen["a"])
    model(images(), context={"task": "a"}).sum().backward()  # with gradients it is made anew
    assert len(RUNS) == 5


def test_learns_counts_and_saves(tmp_path: Path) -> None:
    model = build()
    assert model.train().probe(images()) == []
    assert model.num_parameters(trainable=True, head=False) == 2 * 4 + 5 * 2 * 48
    assert all(k.startswith("vectors.") for k in model.adapters["made"].state_dict())
    kept = {}
    with model.context(task="a"):
        for memory in ("default", "min"):
            model.memory = memory
            kept[memory] = model.saved_bytes(images())
    assert kept["min"] < 0.3 * kept["default"]  # blocks without a parameter of their own are checkpointed too
    model.save_adapter(tmp_path / "out")
    torch.manual_seed(0)
    again = zoo.load(adapter=tmp_path / "out", pretrained=False).eval()
    assert torch.equal(again(images(), context={"task": "b"}), model.eval()(images(), context={"task": "b"}))


def test_copies_have_a_generator_of_their_own() -> None:
    model = build().eval()
    with torch.no_grad():
        before = model(images(), context={"task": "a"})
        twin = copy.deepcopy(model)
        twin.adapters["made"].vectors.map.bias.add_(1)
        assert torch.equal(model(images(), context={"task": "a"}), before)
        assert not torch.equal(twin(images(), context={"task": "a"}), before)
    shift = twin.adapters["made"].module_at("blocks.0.mlp")
    assert shift.made.generator is twin.adapters["made"].vectors is shift.shared[0]


def test_rows_of_two_adapters() -> None:
    """Per-sample adapters: each has what its own generator made for its own task; recomputed, too."""
    model = build()
    torch.manual_seed(5)
    model.add_adapter("made", "second", activate=False)
    model.train()
    found = []
    for memory in ("default", "min"):
        model.memory = memory
        model.zero_grad(set_to_none=True)
        output = model(images(), adapters=["made", "second", None, "second"], context={"task": ["a", "b", "a", "b"]})
        output.square().sum().backward()
        found.append([p.grad for a in model.adapters.values() for p in a.parameters()])
    assert all(g is not None and g.any() for g in found[0])
    assert all(torch.equal(a, b) for a, b in zip(*found))
    with torch.no_grad():
        model.set_active("second")
        alone = model(images(), context={"task": "b"})
    torch.testing.assert_close(output[[1, 3]], alone[[1, 3]], rtol=1e-5, atol=1e-5)


def test_compiles_as_one_graph_with_one_run() -> None:
    model = build().train()
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    try:
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for task in ("a", "b", "a"):
            found = compiled(images(), context={"task": task})
            torch.testing.assert_close(found, model(images(), context={"task": task}), rtol=1e-5, atol=1e-5)
    finally:
        torch._dynamo.reset()
    assert len(graphs) == 2  # one for each task
    for graph in graphs:  # what only the generator does
        assert [n.args[1:] for n in graph.graph.nodes if n.target == "view" and n.args[-1] == 48] == [(-1, 48)]


def test_a_broken_off_run_goes_on_exactly(tmp_path: Path) -> None:
    def run(folder: Path | None, stop: int | None) -> dict[str, Tensor]:
        model = tiny_model(zoo.adapter("made"))
        with model.context(task="b"):
            options = {"epochs": 2, "batch_size": 8, "checkpoint": folder, "checkpoint_every": 1, "lr": 1e-2}
            fit(model, easy_data(24), callbacks=[] if stop is None else [StopAt(stop)], **options)
        return weights(model)

    with pytest.raises(Stop):
        run(tmp_path / "run", stop=3)
    resumed, unbroken = run(tmp_path / "run", None), run(tmp_path / "whole", None)
    assert resumed.keys() == unbroken.keys()
    assert all(torch.equal(resumed[k], unbroken[k]) for k in unbroken)


def test_refusals() -> None:
    with pytest.raises(AttachError, match="shares 'vectors', and no module at a point uses it"):
        build(used=False)
    model = build()
    with pytest.raises(ContextError, match="outside of a forward pass"):
        model.adapters["made"].module_at("blocks.0.mlp")(torch.zeros(1, 2, 48))
    with pytest.raises(AttachError, match="outside of Adapter"):
        model.points.generate("vectors", Vectors(("a",), 2, 48))
