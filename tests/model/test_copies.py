"""A copy of a model is a model of its own in every respect; a copy of a block is the library's block and nothing else."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable

import pytest
import torch
from method_models import FAMILIES, METHODS, attach, bare, both, each, gradients, images, loss_of, shake
from method_models import build as method_model
from torch import Tensor, nn

import zoo
from zoo import registry
from zoo.table import tiny_model

OTHERS = {"lora": "adapter"}  # what is added to a copy; by default LoRA


def pickled(model: zoo.Model) -> zoo.Model:
    return pickle.loads(pickle.dumps(model))  # in memory, as a process hands a model to another


# every method on ViT; on Swin and by pickle one of each way in which methods reach the backbone
SOME = [m for m in ("bitfit", "lora", "spt", "ssf", "vpt") if m in METHODS]
WAYS = [("vit", m, copy.deepcopy) for m in METHODS]
WAYS += [(family, m, how) for family, how in (("vit", pickled), ("swin", copy.deepcopy)) for m in SOME]


@pytest.fixture(autouse=True)
def only_what_is_new_in_each() -> None:
    """What there is already is left out of collections, which are the longest part of these tests otherwise."""
    gc.collect()
    gc.freeze()


def models() -> int:
    gc.collect()
    return sum(isinstance(o, zoo.Model) for o in gc.get_objects())


@pytest.mark.parametrize(("family", "method", "how"), WAYS)
def test_a_copy_goes_on_as_a_model_built_for_it(
    family: str, method: str, how: Callable[[zoo.Model], zoo.Model]
) -> None:
    """Everything that changes a model, done to a copy and to one that was never copied: the same outputs and gradients."""

    def changed(model: zoo.Model) -> list[dict[str, Tensor]]:
        found = []
        model.set_active()
        model.set_active(method)
        found.append(gradients(model, lambda: loss_of(model)))
        for memory in ("min", "default"):
            model.memory = memory
            found.append(gradients(model, lambda: loss_of(model)))
        other = OTHERS.get(method, "lora")
        try:
            attach(model, other)
        except zoo.ZooError:  # two that cannot be active together
            attach(model, other, activate=False)
            model.set_active(other)
        shake(model, other, 8)
        found.append(gradients(model, lambda: loss_of(model)))
        model.remove_adapter(method)
        found.append(gradients(model, lambda: loss_of(model)))
        model.remove_adapter(other)
        found.append({"outputs": model.eval()(images())})
        return found

    model = method_model(family, method)
    shake(model, method)
    twin, never_copied = how(model), method_model(family, method)
    shake(never_copied, method)
    before = model.eval()(images()), {k: p.clone() for k, p in model.named_parameters()}
    for one, other in zip(changed(twin), changed(never_copied), strict=True):
        assert one.keys() == other.keys() and one
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)
    assert torch.equal(model.eval()(images()), before[0])
    assert all(torch.equal(p, before[1][k]) and p.grad is None for k, p in model.named_parameters())
    assert model.probe(images()) == []


@both
@each
def test_original_and_copy_share_nothing(family: str, method: str) -> None:
    model = method_model(family, method)
    shake(model, method)
    twin = copy.deepcopy(model)
    expected = model.eval()(images())
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.1)
    twin.train()
    gradients(twin, lambda: loss_of(twin))
    assert torch.equal(model.eval()(images()), expected)
    assert all(p.grad is None for p in model.parameters())
    mine = {p.data_ptr() for p in [*model.parameters(), *(s.frozen for s in model._swaps[method])]}
    assert not mine & {p.data_ptr() for p in [*twin.parameters(), *(s.frozen for s in twin._swaps[method])]}
    held = {id(m) for m in twin.modules()}
    assert all(id(s.module) in held for s in twin._sites.values())


@both
@each
def test_parts_are_copied_without_the_model(family: str, method: str) -> None:
    model = method_model(family, method)
    shake(model, method)
    active = model.active
    point = next(p for p in model.points if p.kind == "block")
    there, _ = caught(model, point.module)
    before = models()
    block = copy.deepcopy(point.module)
    parts = [copy.deepcopy(model.backbone), copy.deepcopy(model.adapters[method])]
    assert models() == before, "a copied part brought a model along"
    assert type(block) is type(point.module) and parts
    model.eval()
    expected = bare(family)  # the trained values of a copied block are its own (bitfit, norm, full)
    plain = expected.backbone.get_submodule(point.path)
    plain.load_state_dict(block.state_dict())
    with torch.no_grad():
        assert torch.equal(block.eval()(there), plain.eval()(there))
    assert model.active == active and model.probe(images()) == []


def caught(model: zoo.Model, module: nn.Module) -> tuple[Tensor, Tensor]:
    """Input and output of a block of the bare backbone."""
    found: list[Tensor] = []
    with model.disable(), torch.no_grad():
        handle = module.register_forward_hook(lambda _, args, y: found.extend((args[0], y)))
        model.eval()(images())
        handle.remove()
    return found[0], found[1]


def test_a_block_that_is_copied_before_its_model() -> None:
    """Who holds a block and the model has them copied in this order; the copy's block runs the copy's adapters."""
    model = method_model("vit", "lora")
    shake(model, "lora")
    block, twin = copy.deepcopy((model.backbone.blocks[0], model))  # type: ignore[index]
    assert twin.backbone.blocks[0] is block  # type: ignore[index]
    assert torch.equal(twin.eval()(images()), model.eval()(images()))
    expected = gradients(model, lambda: loss_of(model))
    for name, gradient in gradients(twin, lambda: loss_of(twin)).items():
        assert torch.equal(gradient, expected[name])
    twin.set_active()
    with model.disable():
        assert torch.equal(twin.eval()(images()), model.eval()(images()))


@pytest.mark.parametrize("family", [f for f in registry.families() if registry.family(f).tiny and f not in FAMILIES])
def test_every_family(family: str) -> None:
    """Sites of the families' own kinds: a copied model switches, trains and lets go as the original; a block comes alone."""
    for method in ("lora", "prefix", "vpt", "adapter"):
        model, batch = tiny_model(family)
        try:
            model.add_adapter(method)
        except zoo.ZooError:
            continue
        shake(model, method)
        twin = copy.deepcopy(model)
        expected = model.eval()(*batch)
        twin.set_active()
        twin.set_active(method)
        twin.memory = "min"
        assert torch.equal(twin.eval()(*batch), expected)
        one, other = (_gradients(m, batch) for m in (model, twin))
        assert one.keys() == other.keys()
        assert all(torch.allclose(one[k], other[k], rtol=1e-5, atol=1e-6) for k in one)
        before = models()
        assert [copy.deepcopy(block) for block in model.family.blocks()]
        assert models() == before
        twin.remove_adapter(method)
        with model.disable():
            assert torch.equal(twin.eval()(*batch), model.eval()(*batch))


def _gradients(model: zoo.Model, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    model(*batch).square().mean().backward()
    return {k: p.grad for k, p in model.parameters_to_train().items() if p.grad is not None}


def test_all_methods_are_tried() -> None:
    assert set(METHODS) == set(zoo.list_adapters()) and set(FAMILIES) == {"vit", "swin"}
