"""Per-sample adapters while training: every named adapter learns, and a call that fails leaves nothing behind."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from method_models import BATCH, attach, bare, images

import zoo
from zoo.errors import ConfigError

NAMES = ["a", "b", "a", "b"]
METHODS = ["bitfit", "norm", "full", "spt", "lora", "vpt", "vqt"]


def pair(method: str, active: tuple[str, ...] = ()) -> zoo.Model:
    model = bare("vit")
    for name in "ab":
        attach(model, method, name, activate=False)
    for seed, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        for p in model.adapters[name].parameters():
            p.data += 0.02 * torch.randn(p.shape, generator=generator)
    model.set_active(*active)
    return model.train()


@pytest.mark.parametrize("memory", ["default", "min"])
@pytest.mark.parametrize("active", [(), ("a",), ("b",)])
@pytest.mark.parametrize("method", METHODS)
def test_every_named_adapter_gets_the_gradients_of_its_rows(method: str, active: tuple[str, ...], memory: str) -> None:
    """Those of the model with this adapter alone on these rows, whoever is active."""
    model = pair(method, active)
    model.memory = memory
    parameters = model.parameters_to_train("a", "b")
    model(images(), adapters=NAMES).square().sum().backward()
    found = {k: p.grad for k, p in parameters.items()}
    assert [k for k, g in found.items() if g is None] == []
    assert model.active == active

    expected: dict[str, Any] = dict.fromkeys(parameters, 0)
    for name in "ab":
        model.set_active(name)
        for p in parameters.values():
            p.grad = None
        rows = torch.tensor([i for i, n in enumerate(NAMES) if n == name])
        model(images()[rows]).square().sum().backward()
        for key, p in parameters.items():
            expected[key] = expected[key] + (p.grad if p.grad is not None else 0)
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-3, atol=1e-4, msg=key)


def test_what_was_left_out_of_training_stays_frozen() -> None:
    model = pair("lora")
    model.set_active("a", "b", train="a")
    model(images(), adapters=NAMES).square().sum().backward()
    assert all(p.grad is None for p in model.adapters["b"].parameters())
    assert all(p.grad is not None for p in model.adapters["a"].parameters())
    with torch.no_grad():
        model(images(), adapters=NAMES)
    assert not any(p.requires_grad for p in model.adapters["b"].parameters())
    assert not any(k.startswith("b/") for k in model.parameters_to_train("a", "b"))


@pytest.mark.parametrize("method", ["bitfit", "full"])
@pytest.mark.parametrize("place", ["backbone.blocks.1", "heads.default"])
def test_a_call_that_breaks_off_leaves_the_backbone_frozen(method: str, place: str) -> None:
    model = pair(method)
    frozen = {k: (id(p), p.clone(), p.requires_grad) for k, p in model.backbone.named_parameters()}
    calls = []

    def stop(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    handle = model.get_submodule(place).register_forward_hook(stop)
    with contextlib.suppress(KeyboardInterrupt):
        model(images(), adapters=NAMES)
    handle.remove()
    assert len(calls) == 2 and model.active == ()
    for key, parameter in model.backbone.named_parameters():
        same, value, learns = frozen[key]
        assert id(parameter) == same and torch.equal(parameter, value) and parameter.requires_grad == learns, key


def test_a_step_trains_both() -> None:
    model = pair("bitfit")
    before = {k: p.clone() for k, p in model.parameters_to_train("a", "b").items()}
    optimizer = torch.optim.SGD(model.parameters_to_train("a", "b").values(), lr=0.1)
    losses = []
    for _ in range(5):
        loss = torch.nn.functional.cross_entropy(model(images(), adapters=NAMES), torch.arange(BATCH))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, before[k]) for k, p in model.parameters_to_train("a", "b").items())


def test_heads_of_different_widths() -> None:
    model = bare("vit")
    model.add_adapter("lora", "a", num_classes=3, activate=False)
    model.add_adapter("lora", "b", activate=False)
    with pytest.raises(ConfigError, match="different widths"):
        model(images(), adapters=NAMES)


@pytest.mark.parametrize("method", ["lora", "adapter", "ssf", "prefix"])
def test_compiled_routes_share_a_graph(method: str) -> None:
    """Whichever rows an adapter serves; and gradients reach all of them."""
    model = pair(method)
    graphs = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    seen = 0
    for names in (["a", "b", None, "a"], ["a", "a", None, "b"], ["b", None, "a", "a"], [None, "a", "b", "b"]):
        route = model.route([*names, *names])
        x = torch.cat([images(), images() + 1])
        found, expected = compiled(x, adapters=route), model(x, adapters=[*names, *names])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(x, adapters=route), expected)
        seen = seen or len(graphs)
    assert model.active == () and model._state.route is None
    assert len(graphs) <= 4
    parameters = list(model.parameters_to_train("a", "b").values())
    grads = [torch.autograd.grad(y.square().sum(), parameters) for y in (found, expected)]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("method", ["bitfit", "vpt", "meft"])
def test_compiled_routes_of_sub_batches(method: str) -> None:
    """What cannot serve its rows in one pass has a pass of its own in the same graph; nothing stays behind, nor in training."""
    model = pair(method).eval()
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    parameters = model.parameters_to_train("a", "b")
    norm: Any = model.backbone.get_submodule("blocks.0.norm1")
    own = norm.weight
    for names in (["a", "b", None, "a"], ["b", None, "a", "b"]):
        route = model.route(names)
        found, expected = compiled(images(), adapters=route), model(images(), adapters=names)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert (expected - model(images())).abs().max() > 1e-3
        assert model.active == () and model._state.swaps == () and norm.weight is own
    grads = [torch.autograd.grad(y.square().sum(), list(parameters.values())) for y in (found, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


def test_routes_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pair("lora")
    route = model.route(NAMES)
    with pytest.raises(ConfigError, match="4 names for a batch of 2"):
        model(images()[:2], adapters=route)
    model.add_adapter("bitfit", activate=False)
    with pytest.raises(ConfigError, match="make the route anew"):
        model(images(), adapters=route)
    model.add_adapter("full", activate=False)
    swapping, whole = (model.route(["a", name, "a", "a"]) for name in ("bitfit", "full"))
    model(images(), adapters=swapping)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(ConfigError, match=r"adapters=model.route"):
        model(images(), adapters=NAMES)
    with pytest.raises(ConfigError, match=r"trains the backbone's own parameters.*Call the model itself"):
        model(images(), adapters=whole)
    with pytest.raises(ConfigError, match="needs more than features"):
        model.eval()(images(), adapters=swapping, targets=torch.zeros(4, dtype=torch.long))
