"""Second derivatives: exact inside `zoo.second_order`, refused or exact outside, never wrong. Against finite differences."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from method_models import METHODS as METHODS_OF_ALL
from method_models import both, each
from method_models import build as method_model
from torch import Tensor
from torch.func import functional_call

import zoo
from zoo.engine.second_order import exact

ROOT = Path(__file__).resolve().parents[2]
TINY = {"embed_dim": 24, "depth": 2, "num_heads": 2}
METHODS = ("lora", "bitfit", "vpt", "vqt", "adapter", "ssf", "prefix", "full")


def small(method: Any, **options: Any) -> zoo.Model:
    torch.manual_seed(0)
    options = {"num_classes": 3, "pretrained": False, **TINY, **options}
    return shaken(zoo.load("vit-micro", method, **options))


def shaken(model: zoo.Model) -> zoo.Model:
    generator = torch.Generator().manual_seed(4)
    model = model.double().eval()
    with torch.no_grad():
        for p in model.adapters.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def loss_of(model: zoo.Model, **options: Any) -> Tensor:
    return F.cross_entropy(model(images(), **options), torch.tensor([0, 2]))


def directions(model: zoo.Model) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {k: torch.randn(p.shape, dtype=p.dtype, generator=generator) for k, p in model.parameters_to_train().items()}


def product(model: zoo.Model, loss: Tensor) -> list[Tensor]:
    """H v by differentiating the gradient."""
    weights, v = list(model.parameters_to_train().values()), list(directions(model).values())
    gradients = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
    along = sum((g * d).sum() for g, d in zip(gradients, v) if g is not None)
    found = torch.autograd.grad(along, weights, allow_unused=True)  # type: ignore[arg-type]
    return [torch.zeros_like(w) if h is None else h for h, w in zip(found, weights)]


def by_differences(model: zoo.Model, loss: Callable[[], Tensor]) -> list[Tensor]:
    """H v from two ordinary gradients."""
    weights, v = list(model.parameters_to_train().values()), list(directions(model).values())
    step, found = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            for w, d in zip(weights, v):
                w.add_(d, alpha=sign * step)
        found.append(torch.autograd.grad(loss(), weights, allow_unused=True))
        with torch.no_grad():
            for w, d in zip(weights, v):
                w.sub_(d, alpha=sign * step)
    pairs = zip(*found, weights)
    return [torch.zeros_like(w) if one is None else (one - other) / (2 * step) for one, other, w in pairs]


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    scale = max(float(e.abs().max()) for e in expected)
    assert scale > 1e-6
    for f, e in zip(found, expected, strict=True):
        assert float((f - e).detach().abs().max()) < tolerance * max(1.0, scale)


def refuses_second_derivatives(model: zoo.Model) -> None:
    """What is trained straight through has no second derivative: inside, and in torch's transforms, there is no pass at all."""
    with zoo.second_order(model), pytest.raises(zoo.ZooError, match="trained by a gradient that is handed straight"):
        loss_of(model)
    names = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(zoo.ZooError, match="trained by a gradient that is handed straight"):
        torch.func.grad(lambda w: F.cross_entropy(functional_call(model, w, (images(),)), torch.tensor([0, 2])))(names)
    with zoo.second_order(model), torch.no_grad():
        torch.testing.assert_close(model(images()), model(images()))
    loss_of(model).backward()  # first derivatives as ever
    assert all(p.grad is not None for p in model.parameters_to_train().values())


@both
@each
def test_every_method_is_exact_inside(family: str, method: str) -> None:
    model = shaken(method_model(family, method))
    if METHODS_OF_ALL[method].straight_through:
        refuses_second_derivatives(model)
        return
    with zoo.second_order(model):
        loss = loss_of(model)
    assert_same(product(model, loss), by_differences(model, lambda: loss_of(model)), 1e-4)


@both
@each
def test_every_method_is_exact_or_refused_outside(family: str, method: str) -> None:
    """Inside is the truth (see above); outside a product equals it, or there is none."""
    model = shaken(method_model(family, method))
    if METHODS_OF_ALL[method].straight_through:
        with pytest.raises(zoo.ZooError, match="handed straight through its step: it is the gradient of no function"):
            product(model, loss_of(model))
        return
    with zoo.second_order(model):
        expected = product(model, loss_of(model))
    try:
        found = product(model, loss_of(model))
    except zoo.ZooError as error:
        assert "zoo.second_order" in str(error)
    except RuntimeError as error:  # torch's own refusal, of its fused attention
        assert "derivative for aten::_scaled_dot_product" in str(error)
    else:
        assert_same(found, expected)


@pytest.mark.parametrize("memory", ["default", "low", "min", "off"])
@pytest.mark.parametrize("method", METHODS)
def test_memory_settings(method: str, memory: str) -> None:
    model = small(method, memory=memory)
    with zoo.second_order(model):
        loss = loss_of(model)
    assert_same(product(model, loss), by_differences(model, lambda: loss_of(model)))


@pytest.mark.parametrize("memory", ["default", "low", "min", "off"])
@pytest.mark.parametrize("method", ["bitfit", "adapter", "ssf", "ia3"])
def test_recipes_and_checkpoints_keep_the_graph(method: str, memory: str) -> None:
    """Without fused attention these have no op of one derivative: outside of the context they are exact too."""
    model = small(method, memory=memory)
    for module in model.backbone.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    assert_same(product(model, loss_of(model)), by_differences(model, lambda: loss_of(model)))


def test_the_wrong_number_of_before_is_refused() -> None:
    """A loss that is linear in the op's output: its gradient depends on nothing, where torch's own check looks away."""
    model = small("lora", num_classes=0)
    weights = list(model.parameters_to_train().values())
    with pytest.raises(zoo.ZooError, match=r"'LowRankAdd'.*zoo\.second_order\(model\)"):
        torch.autograd.grad(model(images()).sum(), weights, create_graph=True)
    with pytest.raises(zoo.ZooError, match="LowRankAdd"):
        model(images()).sum().backward(create_graph=True)
    model(images()).sum().backward()  # first derivatives as ever
    assert all(w.grad is not None for w in weights)


@pytest.mark.parametrize(
    "file", sorted({p for d in ("zoo", "vision", "multimodal", "audio") for p in (ROOT / d).rglob("*.py")})
)
def test_every_backward_written_by_hand_refuses_a_graph(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ClassDef) and any(
            ast.unparse(base).endswith("autograd.Function") for base in node.bases
        ):
            backward = next(f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "backward")
            assert "first_order" in [ast.unparse(d) for d in backward.decorator_list], f"{file.name}: {node.name}"


def test_dora_differentiates_its_norm_inside_only() -> None:
    model = small(zoo.adapter("lora", dora=True))
    with pytest.raises(zoo.ZooError, match=r"zoo\.second_order"):
        product(model, loss_of(model))
    names = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(zoo.ZooError, match="row norm of DoRA"):
        torch.func.grad(lambda w: F.cross_entropy(functional_call(model, w, (images(),)), torch.tensor([0, 2])))(names)

    def loss() -> Tensor:
        with zoo.second_order(model):
            return loss_of(model)

    assert_same(product(model, loss()), by_differences(model, loss))


@pytest.mark.parametrize("method", [*METHODS, "norm", "ia3"])
def test_function_transforms(method: str) -> None:
    """`torch.func.grad`, per-sample gradients, and forward over reverse: the whole gradient, of every tensor."""
    model = small(method)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    y = torch.tensor([0, 2])

    def loss(weights: dict[str, Tensor], x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, weights, (x,)), labels)

    expected = torch.autograd.grad(loss_of(model), list(named.values()), allow_unused=True)
    found = torch.func.grad(loss)(named, images(), y)
    each_one = torch.vmap(torch.func.grad(lambda w, x, label: loss(w, x[None], label[None])), in_dims=(None, 0, 0))(
        named, images(), y
    )
    for name, gradient in zip(named, expected, strict=True):
        gradient = torch.zeros_like(named[name]) if gradient is None else gradient
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(each_one[name].mean(0), gradient, rtol=1e-9, atol=1e-12)
    outputs = torch.vmap(lambda x: model(x[None])[0])(images())
    torch.testing.assert_close(outputs, model(images()), rtol=1e-9, atol=1e-12)

    names = {id(p): n for n, p in named.items()}
    v = {names[id(p)]: directions(model)[k] for k, p in model.parameters_to_train().items()}
    with zoo.second_order(model):
        _, along = torch.func.jvp(lambda w: torch.func.grad(loss)(w, images(), y), (named,), (v,))
        plain = product(model, loss_of(model))
    assert_same([along[names[id(p)]] for p in model.parameters_to_train().values()], plain)


def test_groupmamba_scan() -> None:
    from vision.families.groupmamba.selective_scan import selective_scan, sequential_scan

    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 7, 4)] * 2 + [(4, 2)] + [(2, 7, 2, 2)] * 2 + [(4,)] * 2
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    tensors[2] = -tensors[2].exp()
    leaves = [t.requires_grad_() for t in tensors]

    def second(function: Any) -> list[Tensor]:
        gradients = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves))  # type: ignore[arg-type]

    with pytest.raises(zoo.ZooError, match="'Scan'"):
        second(selective_scan)
    with zoo.second_order(torch.nn.Module()):
        found = second(selective_scan)
    for one, other in zip(found, second(sequential_scan), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    with zoo.second_order(torch.nn.Module()):
        assert torch.autograd.gradgradcheck(selective_scan, tuple(leaves))


def test_samples_with_adapters_of_their_own() -> None:
    model = small("lora")
    model.add_adapter(zoo.adapter("adapter", rank=2), "other", activate=False)
    shaken(model)
    with zoo.second_order(model):
        loss = loss_of(model, adapters=["lora", None])
    assert_same(product(model, loss), by_differences(model, lambda: loss_of(model, adapters=["lora", None])))


def test_off_installs_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    model, other = small("lora", memory="off"), small("lora")
    for each_model in (model, other):
        saver = each_model._state.saver
        monkeypatch.setattr(saver, "_pack", lambda t: calls.append(1) or t)
        monkeypatch.setattr(saver, "_unpack", lambda t: t)
    loss_of(model).backward()
    assert calls == []
    loss_of(other).backward()
    assert calls != []
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(*(list(m.adapters.parameters()) for m in (model, other))))  # type: ignore[arg-type]
    calls.clear()
    with zoo.second_order(other):
        loss_of(other).backward()
    assert calls == []
    model.memory = "default"
    assert model.saved_bytes(images()) < small("lora", memory="off").saved_bytes(images())


def test_context_ends_whatever_happens() -> None:
    model = small("lora")
    with pytest.raises(ZeroDivisionError), zoo.second_order(model):
        assert exact()
        raise ZeroDivisionError
    assert not exact()
    with zoo.second_order(model), zoo.second_order(copy.deepcopy(model)):
        pass
    assert not exact()


def test_what_is_refused() -> None:
    with pytest.raises(zoo.ZooError, match="takes a model, not a str"), zoo.second_order("lora"):  # type: ignore[arg-type]
        pass
    model = small("lora")
    compiled = torch.compile(model)
    with pytest.raises(zoo.ZooError, match="compiled"), zoo.second_order(compiled):  # type: ignore[arg-type]
        pass
    model.compile()
    with pytest.raises(zoo.ZooError, match="compiled"), zoo.second_order(model):
        pass
    assert not exact()
