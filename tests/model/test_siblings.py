"""What others do to a model: their checkpointing, parametrisations, parameters that they unfreeze, selectors over two towers."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from method_models import attach, bare, both, each, loss_of, shake
from torch import nn
from torch.nn.utils import parametrizations
from train_parts import easy_data, fit, tiny_model

import zoo
from zoo.points import Points


@both
@each
def test_the_librarys_own_checkpointing(family: str, method: str, caplog: pytest.LogCaptureFixture) -> None:
    """timm's `set_grad_checkpointing(True)`, adapters switched before backward: CheckpointError, or gradients off by 0.07."""
    model = bare(family).train()
    attach(model, method)
    attach(model, "adapter" if method == "lora" else "lora", "other", activate=False)
    shake(model, method)
    shake(model, "other")
    named = model.parameters_to_train()
    torch.manual_seed(6)
    expected = dict(zip(named, torch.autograd.grad(loss_of(model), list(named.values()), allow_unused=True)))
    model.backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    torch.manual_seed(6)
    with caplog.at_level(logging.WARNING, logger="zoo"):
        loss = loss_of(model)
    assert model.memory == "min" and "memory='min' is on instead" in caplog.text
    model.set_active("other")
    for p in named.values():
        p.requires_grad_(True)
    found = dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True)))
    for key, value in expected.items():
        assert (value is None) == (found[key] is None), key
        if value is not None:
            assert torch.equal(found[key], value), key


def test_without_adapters_the_librarys_checkpointing_stays() -> None:
    model = bare("vit").train()
    model.backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    loss_of(model).backward()
    assert model.backbone.grad_checkpointing and model.memory == "default"  # type: ignore[union-attr]


def test_where_no_blocks_are_known_it_is_refused() -> None:
    model = bare("vit").train()
    attach(model, "lora")
    model.points._points = [p for p in model.points if p.kind != "block"]
    model.backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    with pytest.raises(zoo.ZooError, match="memory='min'"):
        loss_of(model)


def test_a_part_of_the_backbone_that_somebody_unfroze() -> None:
    """`requires_grad_(True)` on a block: zoo.fit did not train it, without a word."""
    model = tiny_model()
    model.backbone.blocks[1].requires_grad_(True)  # type: ignore[index]
    with pytest.raises(
        zoo.ZooError,
        match=r"'blocks\.1\.norm1\.weight' and 11 more.*requires_grad_\(False\)",
    ):
        fit(model, easy_data(8))
    model.backbone.requires_grad_(False)
    fit(model, easy_data(8), epochs=1)


def test_one_output_and_cross_entropy() -> None:
    """Float targets on a head of one output: the loss was 0.0, and nothing was trained."""
    model = tiny_model(num_classes=1)
    data = torch.utils.data.TensorDataset(torch.randn(8, 3, 8, 8), torch.zeros(8, dtype=torch.long))
    for run in (lambda: fit(model, data, epochs=1), lambda: zoo.evaluate(model, data, progress=False, device="cpu")):
        with pytest.raises(zoo.ZooError, match="one output"):
            run()
    floats = torch.utils.data.TensorDataset(torch.randn(8, 3, 8, 8), torch.randn(8))
    with pytest.raises(zoo.ZooError):
        fit(model, floats, epochs=1)


@pytest.mark.parametrize("how", ["orthogonal", "weight_norm", "spectral_norm", "old weight_norm", "old spectral_norm"])
def test_a_parametrised_head_is_folded(how: str, tmp_path: Path) -> None:
    """It was saved under torch's names, and could not be loaded."""
    model = tiny_model()
    head: Any = model.head
    old = {"old weight_norm": nn.utils.weight_norm, "old spectral_norm": nn.utils.spectral_norm}
    (old[how] if how in old else getattr(parametrizations, how))(head)
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.1)
    x = torch.randn(2, 3, 8, 8)
    expected = model.eval()(x)
    model.save_adapter(tmp_path)
    other = tiny_model()
    from zoo.disk import attach as put
    from zoo.disk import read

    other.remove_adapter("lora")
    put(other, read(tmp_path))
    torch.testing.assert_close(other.eval()(x), expected, rtol=1e-5, atol=1e-6)
    plain = model.merge()
    torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-5)
    assert not any("parametrizations" in k or k.endswith(("_g", "_u", "_orig")) for k in plain.state_dict())
    assert torch.equal(model(x), expected)  # the model itself keeps what its user made of it


def test_a_parametrised_adapter_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    parametrizations.weight_norm(model.adapters["lora"].module_at("blocks.0.attn.q"), "lora_a")  # type: ignore[operator]
    with pytest.raises(zoo.ZooError, match="remove_parametrizations"):
        model.save_adapter(tmp_path / "x")
    assert not (tmp_path / "x").exists()


# -- two towers -----------------------------------------------------------------------------------------------------------


def towers(*left_out: str) -> Points:
    """A CLIP in which points of these kinds or roles of the image tower are not described."""
    model = zoo.load("clip-micro", num_classes=0, tower="both", pretrained=False)
    kept = [p for p in model.points if not (p.tower == "image" and (p.kind in left_out or p.role in left_out))]
    return Points([copy.copy(p) for p in kept], model.backbone_name)


def test_what_is_asked_of_two_towers_matches_in_both() -> None:
    """LoRA's default and VPT left one tower out where its blocks were described otherwise, without a word."""
    whole = towers()
    assert {p.tower for p in whole.select("q,v")} == {p.tower for p in whole.select(kind="tokens")} == {"image", "text"}
    lacking = towers("q", "tokens")
    for ask in (
        lambda: lacking.select("q,v"),
        lambda: lacking.select("*.blocks.0.attn.q"),
        lambda: lacking.select("**.attn.q"),
        lambda: lacking.linears(("q", "v"), ("q", "v")),
        lambda: lacking.select(None, kind="tokens"),
        lambda: lacking.select(None, kind=["linear", "tokens"]),
    ):
        with pytest.raises(zoo.ZooError, match=r"the image tower of clip-micro has no .*tower='text'"):
            ask()
    assert {p.tower for p in lacking.select("text.**.q")} == {"text"}
    assert {p.tower for p in lacking.select(kind="tokens", tower="text")} == {"text"}
    assert {p.tower for p in lacking.select("k")} == {"image", "text"}


def test_one_network_of_two_towers() -> None:
    """An encoder and the decoder that reads it are one: what only the decoder has (cross-attention) can be chosen."""
    name, options = zoo.registry.family("vl-t5").tiny  # type: ignore[misc]
    points = zoo.load(name, **options, pretrained=False, device="meta").points
    assert points.select(kind="sublayer", role="cross") and points.select(None, kind="tokens")
