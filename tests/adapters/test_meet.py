"""MEET's controls: one for each quality, chosen for each sample of a batch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from method_models import CLASSES, VIT, images, loss_of
from torch import Tensor

import zoo
from zoo.errors import ConfigError, ContextError, UnknownNameError

QUALITIES = ("good", "bad")
MIXED = ["good", "bad", "bad", "good"]
forms = pytest.mark.parametrize("form", ["prompt", "lora"])


def made(form: str, **settings: Any) -> zoo.Model:
    """A small ViT with stirred controls."""
    torch.manual_seed(0)
    own = {"qualities": QUALITIES, "form": form, "num_tokens": 3, "rank": 2, **settings}
    model = zoo.load("vit-micro", zoo.adapter("meet", **own), pretrained=False, num_classes=CLASSES, **VIT)
    with torch.no_grad():
        for parameter in model.adapters["meet"].parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


def said(model: zoo.Model, quality: Any) -> Tensor:
    return model(images(), context={"quality": quality})


@forms
@pytest.mark.parametrize("memory", ["default", "min"])
def test_a_mixed_batch_is_the_two_batches_of_one_quality(form: str, memory: str) -> None:
    """Outputs and gradients."""
    model = made(form)
    model.memory = memory
    model.train()
    rows = torch.tensor([quality == "good" for quality in MIXED])[:, None]
    found = []
    for whole in (True, False):
        model.zero_grad(set_to_none=True)
        if whole:
            logits = said(model, MIXED)
        else:
            logits = torch.where(rows, said(model, "good"), said(model, "bad"))
        logits.square().sum().backward()
        found.append((logits.detach(), {k: p.grad for k, p in model.parameters_to_train().items()}))
    assert not torch.allclose(said(model, "good"), said(model, "bad"))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@forms
def test_gradients_are_of_the_quality_that_is_there(form: str) -> None:
    model = made(form).train()
    said(model, "bad").square().sum().backward()
    for parameter in model.adapters["meet"].parameters():
        assert parameter.grad is not None and parameter.grad[1].any() and not parameter.grad[0].any()


@forms
def test_equal_controls_leave_no_difference(form: str) -> None:
    model = made(form)
    with torch.no_grad():
        for parameter in model.adapters["meet"].parameters():
            parameter[1] = parameter[0]
    torch.testing.assert_close(said(model, "good"), said(model, "bad"), rtol=0, atol=0)


def test_lora_controls_start_as_the_pretrained_function() -> None:
    model = zoo.load("vit-micro", num_classes=CLASSES, pretrained=False, **VIT).eval()
    bare = model(images())
    model.add_adapter(zoo.adapter("meet", qualities=QUALITIES, form="lora"))
    assert torch.equal(said(model, MIXED), bare)


@forms
def test_one_control_is_taken_out_as_a_plain_adapter(form: str) -> None:
    model = made(form, alpha=3.0)
    expected = {quality: said(model, quality) for quality in QUALITIES}
    adapter = model.adapters["meet"]
    for quality in QUALITIES:
        name = adapter.extract(model, quality)
        model.set_active(name)
        torch.testing.assert_close(model(images()), expected[quality], rtol=1e-5, atol=1e-6)
        model.set_active("meet")
    if form == "lora":
        model.set_active("bad")
        torch.testing.assert_close(model.merge()(images()), expected["bad"], rtol=1e-5, atol=1e-5)
    with pytest.raises(UnknownNameError, match="no quality 'fine'"):
        adapter.extract(model, "fine")


@forms
def test_it_is_saved_with_its_qualities(form: str, tmp_path: Path) -> None:
    model = made(form)
    again = made(form)
    again.remove_adapter("meet")
    zoo.disk.attach(again, zoo.disk.read(model.save_adapter(tmp_path / "out")))
    assert again.eval().adapters["meet"].config()["qualities"] == list(QUALITIES)
    torch.testing.assert_close(said(again, MIXED), said(model, MIXED))


@forms
def test_it_stands_beside_full_tuning(form: str) -> None:
    model = made(form)
    before = said(model, MIXED)
    frozen = copy.deepcopy(model.backbone.state_dict())
    model.add_adapter("full", "whole")
    torch.testing.assert_close(said(model, MIXED), before)
    with torch.no_grad():
        for parameter in model.adapters["whole"].parameters():
            parameter.mul_(1.1)
    assert not torch.allclose(said(model, MIXED), before)
    model.remove_adapter("whole")
    assert all(torch.equal(value, frozen[key]) for key, value in model.backbone.state_dict().items())


def test_what_is_missing_or_unknown_is_refused() -> None:
    model = made("prompt")
    with pytest.raises(ContextError, match=r"needs 'quality' .*good, bad"):
        loss_of(model)
    with pytest.raises(UnknownNameError, match="fine"):
        said(model, "fine")
    with pytest.raises(ContextError, match="2 values for a batch of 4"):
        said(model, ["good", "bad"])
    for settings, message in (
        ({"qualities": ()}, "empty"),
        ({"qualities": ("a", "a")}, "'a' twice"),
        ({"num_tokens": 0}, "num_tokens is 0"),
        ({"alpha": 0.0}, "alpha is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            zoo.adapter("meet", **settings)


def test_counts() -> None:
    pytest.importorskip("transformers", reason="the extra 'multimodal' is not installed")
    model = zoo.load("vl-t5", zoo.adapter("meet", qualities=QUALITIES), device="meta")
    assert model.num_parameters(trainable=True) == 2 * 10 * 768 == 15_360
    model = zoo.load("vit-b16", zoo.adapter("meet", qualities=QUALITIES, form="lora"), num_classes=0, device="meta")
    assert model.num_parameters(trainable=True) == 2 * 294_912
