"""`state_dict` as others use it: each tensor in one place, and what it gives can be loaded, whatever the method."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from method_models import METHODS, attach, bare, both, each, images, shake, state
from safetensors.torch import load_file, save_file

import zoo


@both
@each
def test_round_trip(family: str, method: str, tmp_path: Path) -> None:
    """Into a model in which the adapter has its initial values and no plan; through safetensors, as trainers save.

    Trained tensors of bitfit, norm, full and spt stood twice under shared storage, so safetensors refused them; spt's plan was
    missing, and its tensors fitted nowhere.
    """
    model = bare(family)
    attach(model, method)
    shake(model, method)
    found = model.state_dict()
    pointers = [t.untyped_storage().data_ptr() for t in found.values() if t.numel()]
    assert len(set(pointers)) == len(pointers)
    save_file({k: v.contiguous() for k, v in found.items()}, tmp_path / "model.safetensors")

    other = bare(family)
    other.add_adapter(zoo.adapter(method, **METHODS[method].trial))
    report = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert not report.missing_keys and not report.unexpected_keys
    assert other.adapters[method].plan == model.adapters[method].plan
    assert torch.equal(other.eval()(images()), model.eval()(images()))
    assert other.probe(images()) == [] or METHODS[method].stateless
    again = other.state_dict()
    assert again.keys() == found.keys() and all(torch.equal(v, found[k]) for k, v in again.items())


@pytest.mark.parametrize("method", ["bitfit", "norm", "full", "spt"])
def test_an_inactive_adapter_leaves_the_frozen_backbone_alone(method: str) -> None:
    """Loading a trained state into a model in which the adapter is off wrote the trained values into the frozen backbone."""
    model = bare("vit")
    frozen, logits = state(model), model(images())
    attach(model, method)
    shake(model, method)
    trained = model.state_dict()
    assert all(torch.equal(trained[f"backbone.{k}"], v) for k, v in frozen.items())
    model.set_active()
    model.load_state_dict(trained)
    assert all(torch.equal(v, frozen[k]) for k, v in state(model).items())
    expected = bare("vit")(images())
    assert torch.equal(model(images()), expected) and torch.equal(logits, expected)
    model.remove_adapter(method)
    assert torch.equal(model(images()), expected)


def test_inside_of_another_module() -> None:
    """A wrapper's state_dict (of a trainer, say) brings the plan along under its own prefix."""
    model = bare("vit")
    attach(model, "spt")
    shake(model, "spt")
    outer, other = torch.nn.ModuleDict({"model": model}), bare("vit")
    other.add_adapter(zoo.adapter("spt", **METHODS["spt"].trial))
    torch.nn.ModuleDict({"model": other}).load_state_dict(outer.state_dict(), strict=True)
    assert torch.equal(other(images()), model(images()))


def test_a_state_without_its_plan_is_named() -> None:
    model = bare("vit")
    attach(model, "spt")
    found = {k: v for k, v in model.state_dict().items() if not k.startswith("plans.")}
    with pytest.raises(RuntimeError, match=r"plans\.spt"):
        model.load_state_dict(found)
    damaged = {**model.state_dict(), "plans.spt": torch.zeros(3, dtype=torch.uint8)}
    with pytest.raises(RuntimeError, match="plan of 'spt' does not fit"):
        model.load_state_dict(damaged)


@pytest.mark.parametrize("method", ["bitfit", "norm", "full", "spt"])
def test_every_parameter_has_one_name(method: str) -> None:
    model = bare("vit")
    attach(model, method)
    names = dict(model.named_parameters(remove_duplicate=False))
    assert len({id(p) for p in names.values()}) == len(names)
    trained = {id(p) for p in model.parameters_to_train().values()}
    assert not [k for k, p in names.items() if k.startswith("backbone.") and (id(p) in trained or p.requires_grad)]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(trained)
    full = sum(p.numel() for p in model.backbone.parameters())
    own = sum(p.numel() for k, p in names.items() if k.startswith(f"adapters.{method}.") and "delta" not in k)
    if method == "full":
        assert own == full and model.num_parameters(head=False) == full


def test_called_by_hand() -> None:
    """Blocks and the backbone itself, called outside of a pass of the model, run with what is trained."""
    model = bare("vit").eval()
    for method in ("norm", "full"):
        attach(model, method)
        shake(model, method)
        backbone, seen = model.backbone, []
        handle = backbone.blocks[0].register_forward_hook(lambda _, args, y, seen=seen: seen.extend((args[0], y)))  # type: ignore[index,misc]
        with torch.no_grad():
            expected = model.features(images())
            x, y = seen
            assert torch.equal(backbone.blocks[0](x), y)  # type: ignore[index]
            assert torch.equal(backbone(images()), expected)
            model.set_active()
            assert not torch.equal(backbone.blocks[0](x), y)  # type: ignore[index]
        handle.remove()
        model.remove_adapter(method)
