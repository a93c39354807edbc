"""Adapters mixed by a module at the points where all of them act."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from train_parts import easy_data, fit, tiny_model

import zoo
from zoo import registry
from zoo.engine.mixing import WeightedSum
from zoo.errors import AttachError, CombinationError, UnknownNameError


@dataclass(eq=False)
class Sum(zoo.Adapter):
    """A learned sum of other adapters, as the methods that mix are."""

    names: tuple[str, ...] = ()
    weights: tuple[float, ...] | None = None
    per_sample: bool = False

    def attach(self, points: zoo.Points) -> None:
        given = points.context("weights") if self.per_sample else None
        points.mix(self.names, lambda point: WeightedSum(len(self.names), self.weights, given))


Sum.method = "test-sum"
FORMS: dict[str, dict[str, Any]] = {
    "lora": {},
    "adapter": {"rank": 2, "form": "houlsby"},
    "parallel": {"rank": 2, "form": "parallel"},
    "ssf": {},
}


def build(form: str, names: Sequence[str] = ("a", "b"), **options: Any) -> zoo.Model:
    model = tiny_model(None, **options)
    torch.manual_seed(4)
    for name in names:
        model.add_adapter(zoo.adapter("adapter" if form == "parallel" else form, **FORMS[form]), name)
        with torch.no_grad():
            for p in model.adapters[name].parameters():
                p.add_(0.2 * torch.randn_like(p))
    model.set_active()
    return model.eval()


def used(model: zoo.Model, images: torch.Tensor, *names: str) -> torch.Tensor:
    model.set_active(*names)
    return model(images)


@pytest.mark.parametrize("form", list(FORMS))
def test_weights_one_and_zero_choose(form: str) -> None:
    model, images = build(form), torch.randn(3, 3, 8, 8)
    alone = {name: used(model, images, name) for name in ("a", "b")}
    bare = used(model, images)
    for weights, expected in (((1.0, 0.0), alone["a"]), ((0.0, 1.0), alone["b"]), ((0.0, 0.0), bare)):
        model.add_adapter(Sum(names=("a", "b"), weights=weights), "sum")
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
        model.remove_adapter("sum")
    torch.testing.assert_close(used(model, images, "a"), alone["a"])


def test_half_of_two_lora_is_their_average() -> None:
    """Linear in what is added: the mixture is one LoRA with both deltas, halved."""
    model, images = build("lora"), torch.randn(3, 3, 8, 8)
    model.add_adapter(Sum(names=("a", "b")), "sum")
    mixed = model(images)
    weights = {}
    for i in (0, 1):
        qkv = model.backbone.blocks[i].attn.qkv  # type: ignore[index,union-attr]
        weights[i] = qkv.weight.detach().clone()
        for slot, role in ((0, "q"), (2, "v")):
            for name in ("a", "b"):
                part: Any = model.adapters[name].module_at(f"blocks.{i}.attn.{role}")  # type: ignore[operator]
                weights[i][slot * 24 : slot * 24 + 24] += 0.5 * part.delta()
    model.set_active()
    with torch.no_grad():
        for i, weight in weights.items():
            model.backbone.blocks[i].attn.qkv.weight.copy_(weight)  # type: ignore[index,union-attr]
    torch.testing.assert_close(model(images), mixed, rtol=1e-4, atol=1e-5)


def test_weights_of_each_sample_and_rows_of_a_batch() -> None:
    model, images = build("lora"), torch.randn(3, 3, 8, 8)
    alone = {name: used(model, images, name) for name in ("a", "b")}
    model.set_active()
    model.add_adapter(Sum(names=("a", "b"), per_sample=True), "sum")
    given = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    mixed = model(images, context={"weights": given})
    torch.testing.assert_close(mixed[[0, 2]], alone["a"][[0, 2]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1], alone["b"][1], rtol=1e-4, atol=1e-5)
    model.remove_adapter("sum")
    model.add_adapter(Sum(names=("a", "b"), weights=(0.0, 1.0)), "sum")
    routed = model(images, adapters=["sum", None, "a"])
    torch.testing.assert_close(routed[0], alone["b"][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(routed[2], alone["a"][2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory", ["default", "low", "min"])
def test_only_the_mixture_learns(memory: str) -> None:
    model = build("adapter", memory=memory)
    model.add_adapter(Sum(names=("a", "b")), "sum")
    before = model.adapter_state("a")
    assert model.probe(torch.randn(2, 3, 8, 8)) == []
    assert model.num_parameters(trainable=True, head=False) == 2 * 4  # two sublayers in each of two blocks
    fit(model, easy_data(32), lr=0.1)
    assert (model.adapter_state("a") - before).norm() == 0
    assert any(float((p.detach() - 0.5).abs().max()) > 1e-3 for p in model.adapters["sum"].parameters())


def test_a_mixture_is_saved_with_what_it_mixes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, known = zoo.load("vit-micro", num_classes=3), registry.adapter_class
    for name in "ab":
        model.add_adapter("lora", name)
        with torch.no_grad():
            for p in model.adapters[name].parameters():
                p.add_(0.2 * torch.randn_like(p))
    model.add_adapter(Sum(names=("a", "b"), weights=(0.7, 0.4)), "sum")
    assert model.active == ("sum",)  # which runs the others itself
    model.save_adapter(tmp_path, adapters=["a", "b", "sum"])
    monkeypatch.setattr(registry, "adapter_class", lambda method: Sum if method == Sum.method else known(method))
    again, images = zoo.load(adapter=tmp_path).eval(), torch.randn(2, 3, 32, 32)
    assert again.active == ("sum",) and torch.equal(again(images), model.eval()(images))


def test_refusals() -> None:
    model = build("lora")
    model.add_adapter(zoo.adapter("hyperformer", tasks=("x",)), "made", activate=False)
    model.add_adapter("prefix", "pre", activate=False)
    model.add_adapter(zoo.adapter("lora", targets="q,k,v"), "more", activate=False)
    model.add_adapter(zoo.adapter("adapter", rank=2), "other", activate=False)
    for names, error, message in (
        (("a", "c"), UnknownNameError, "no adapter 'c' to mix"),
        (("a",), AttachError, "two adapters or more"),
        (("a", "made"), AttachError, "'made' cannot be mixed: it reads values"),
        (("a", "pre"), AttachError, "'pre' cannot be mixed: 'extend'"),
        (("a", "other"), AttachError, "no point at which all of a, other act"),
    ):
        with pytest.raises(error, match=message):
            model.add_adapter(Sum(names=names), "sum")
        assert "sum" not in model.adapters
    model.add_adapter(Sum(names=("a", "b")), "sum")
    with pytest.raises(CombinationError, match="'sum' runs 'a' itself"):
        model.set_active("sum", "a")
    assert model.active == ("sum",)
    with pytest.raises(CombinationError, match="'sum' mixes 'a'; remove 'sum' first"):
        model.remove_adapter("a")
    model.remove_adapter("sum")
    model.remove_adapter("a")
