"""VQT beside other adapters: its queries see what these do to the tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vqt_models import (
    SWIN_NAME,
    TARGETS,
    attend,
    gradients,
    images,
    joined,
    kept,
    make,
    named,
)

import zoo


def copy_into(twin: zoo.Model, model: zoo.Model) -> zoo.Model:
    twin.adapters["vqt"].load_state_dict(model.adapters["vqt"].state_dict())
    twin.heads["vqt"].load_state_dict(model.heads["vqt"].state_dict())
    return twin


@pytest.mark.parametrize("order", [("vqt", "lora"), ("lora", "vqt")])
@pytest.mark.parametrize("name", ["vit-micro", SWIN_NAME])
def test_queries_see_the_keys_and_values_of_a_lora(name: str, order: tuple[str, str]) -> None:
    made = {"vqt": zoo.adapter("vqt", dropout=0.0), "lora": zoo.adapter("lora", rank=2, targets="all-linear")}
    model = make(name, [made[n] for n in order])
    for key, parameter in model.adapters["lora"].named_parameters():
        if key.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.1)
    x = images(model)
    logits, found = gradients(model, x)
    assert model.probe(x) == []
    twin = copy_into(make(name), model)
    model.set_active("lora")
    plain = {k: v for k, v in model.merge().state_dict().items() if not k.startswith("head.")}
    twin.backbone.load_state_dict(plain)
    expected_logits, expected = gradients(twin, x)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-5)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-5)


class Sequential(nn.Module):
    """A sublayer with a bottleneck behind it, as a module of the backbone."""

    def __init__(self, sublayer: nn.Module, bottleneck: nn.Module, parallel: bool) -> None:
        super().__init__()
        self.sublayer, self.bottleneck, self.parallel = sublayer, bottleneck, parallel

    def forward(self, x: Tensor) -> Tensor:
        y = self.sublayer(x)
        return y + self.bottleneck(x) if self.parallel else self.bottleneck(y)


@pytest.mark.parametrize("form", ["pfeiffer", "parallel"])
@pytest.mark.parametrize("first", [True, False])
def test_bottlenecks_act_on_the_queries_too(form: str, first: bool) -> None:
    pair = [zoo.adapter("vqt", dropout=0.0), zoo.adapter("adapter", form=form, rank=4)]
    model = make(adapter=pair if first else pair[::-1])
    bottlenecks = model.adapters["adapter"]
    for parameter in bottlenecks.parameters():
        nn.init.normal_(parameter, std=0.2)
    x = images(model)
    twin = make()
    for point in twin.points.select(kind="sublayer", role="mlp"):
        name = point.path.rpartition(".")[0]
        block = twin.backbone.get_submodule(name)
        block.mlp = Sequential(block.mlp, bottlenecks.get_submodule(point.name), form == "parallel")
    copy_into(twin, model)
    torch.testing.assert_close(model(x), twin(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", [("vqt", "vpt"), ("vpt", "vqt")])
@pytest.mark.parametrize("deep", [True, False])
def test_queries_see_prompts(order: tuple[str, str], deep: bool) -> None:
    made = {"vqt": zoo.adapter("vqt", dropout=0.0), "vpt": zoo.adapter("vpt", num_tokens=2, deep=deep)}
    model = make(adapter=[made[n] for n in order])
    x = images(model)
    logits, found = gradients(model, x)
    assert model.probe(x) == []
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), logits, rtol=1e-5, atol=1e-5)

    prompts = [p for k, p in model.adapters["vpt"].named_parameters()]
    tokens = [q.tokens for q in model.adapters["vqt"].queries()]  # type: ignore[operator]
    head, parameters, vit = model.head, named(model), model.backbone
    with model._bare():
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        hidden: Any = vit._pos_embed(vit.patch_embed(x))  # type: ignore[operator]
        answers = []
        for i, block in enumerate(vit.blocks):  # type: ignore[arg-type]
            if deep or i == 0:
                patches = hidden[:, 1:] if i == 0 else hidden[:, 3:]
                hidden = torch.cat([hidden[:, :1], prompts[i].expand(3, -1, -1), patches], dim=1)
            both = torch.cat([tokens[i].expand(3, -1, -1), hidden], dim=1)
            both = both + attend(block.attn, block.norm1(both), 1)
            both = both + block.mlp(block.norm2(both))
            answers.append(both[:, :1])
            hidden = both[:, 1:]
        expected = head(joined(vit.norm(hidden)[:, 0], answers))  # type: ignore[operator]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(F.cross_entropy(expected, TARGETS), list(parameters.values()))
    for key, gradient in zip(parameters, wanted):
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["vpt", "bitfit", "ssf", "norm", "ia3", "lora"])
@pytest.mark.parametrize("name", ["vit-micro", SWIN_NAME])
def test_nothing_is_dead_beside_others(name: str, method: str) -> None:
    for pair in (["vqt", method], [method, "vqt"]):
        model = make(name, pair)
        assert model.probe(images(model)) == []


def test_two_at_once() -> None:
    model = make()
    second = model.add_adapter(zoo.adapter("vqt", dropout=0.0), name="second")
    x = images(model)
    assert model.active == ("vqt", "second") and model.head.in_features == 48 * 3 + 48 * 2
    together = model.features(x)
    model.set_active("vqt")
    first = model.features(x)
    torch.testing.assert_close(together[:, : 3 * 48] * 3**0.5, first)
    model.set_active("second")
    torch.testing.assert_close(together[:, 3 * 48 :], model.features(x)[:, 48:])
    assert second.feature_dim(48) == 3 * 48


@pytest.mark.parametrize("name", ["vit-micro", SWIN_NAME])
def test_per_sample(name: str) -> None:
    model = make(name)
    model.add_adapter(zoo.adapter("vqt", num_tokens=2, dropout=0.0), name="two", activate=False)
    model.add_adapter("lora", name="lora", activate=False)
    for parameter in model.adapters["lora"].parameters():
        nn.init.normal_(parameter, std=0.1)
    names = ["two", "vqt", None, "vqt", "lora", "two"]
    x = images(model, len(names))
    routed = model(x, adapters=names)
    for i, adapter in enumerate(names):
        model.set_active(*([] if adapter is None else [adapter]))
        torch.testing.assert_close(routed[i], model(x[i : i + 1])[0], rtol=1e-5, atol=1e-5)
    assert all(value is None for value in kept(model))
    model.set_active("vqt")
    mixed = model(x[:3], adapters=["vqt", "two", "vqt"])
    mixed.sum().backward()
    parameters = [p for n in ("vqt", "two") for p in model.adapters[n].parameters()]
    assert [p.grad is not None for p in parameters] == [p.requires_grad for p in parameters]
