"""SPT against the authors' code (ziplab/SPT): what is chosen, outputs and gradients, counts of the masks that they publish.

`spt.json` holds numbers recorded by running their sensitivity pass and their SPT model on a ViT of width 192 with 4 blocks whose
parameters and images are set by `fill` below, and counts read from their masks for CIFAR-100 on ViT-B/16
(`sensitivity_spt_supervised_{lora,adapter}_a10/cifar`). None of their code is here.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import zoo
from vision.adapters.parts.sensitivity import candidates, choose, sensitivity, spend
from vision.adapters.parts.tuned import Tuned
from zoo.adapters.parts.highest import highest

AUTHORS: dict[str, Any] = json.loads((Path(__file__).parent / "spt.json").read_text())
SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 4, "num_heads": 3}
TAUS = [20_000 * k for k in range(1, 41)]  # theirs go on to 1.58 M, farther and farther from these budgets
ROLES = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")
CLS_IN_THEIR_SUM = 768  # a constant there, whatever the width


def fill(name: str, shape: tuple[int, ...], std: float = 0.02, mean: float = 0.0) -> Tensor:
    """Values that belong to a name."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.from_numpy(mean + std * random.standard_normal(shape))


def value(name: str, shape: tuple[int, ...]) -> Tensor:
    leaf = name.rpartition(".")[2]
    if "norm" in name:
        return fill(name, shape, 0.1, 1.0 if leaf == "weight" else 0.0)
    return fill(name, shape, 1 / math.sqrt(math.prod(shape[1:])) if leaf == "weight" else 0.1)


def build() -> zoo.Model:
    model = zoo.load("vit-micro", pretrained=False, num_classes=10, dtype=torch.float64, **SIZE)
    named = [*model.backbone.named_parameters(), *((f"head.{n}", p) for n, p in model.head.named_parameters())]
    with torch.no_grad():
        for name, parameter in named:
            parameter.copy_(value(name, tuple(parameter.shape)))
    return model


def batches() -> list[tuple[Tensor, Tensor]]:
    random = np.random.RandomState(7)
    shape = (8, 3, 32, 32)
    return [
        (torch.from_numpy(random.standard_normal(shape)), torch.from_numpy(random.randint(0, 10, 8))) for _ in range(3)
    ]


@pytest.fixture(scope="module")
def scored() -> tuple[zoo.Model, list[Tensor], Tensor]:
    """The model, the scores of its candidates, and the owners of the highest ones."""
    model = build()
    scores, count, samples = sensitivity(model, candidates(model.points, "lora", 8, 10, 5), batches(), 16)
    assert (count, samples) == (3, 24)
    return model, scores, highest(scores, TAUS[-1])[0]


def matrices(rows: list[list[int]]) -> list[str]:
    return [f"blocks.{i}.{role}" for i, row in enumerate(rows) for role, used in zip(ROLES, row) if used]


@pytest.mark.parametrize("case", AUTHORS["masks"])
def test_the_same_choice(case: str, scored: tuple[zoo.Model, list[Tensor], Tensor]) -> None:
    model, _, owner = scored
    form, alpha, budget = case.split("-")
    expected = AUTHORS["masks"][case]
    found = candidates(model.points, form, 8, float(alpha), 5)
    _, hits = choose(owner, found, round(float(budget) * 1e6), CLS_IN_THEIR_SUM, TAUS)
    whole, total = spend(hits, found, CLS_IN_THEIR_SUM)
    assert total == expected["total"]
    assert {c.key: n for c, n, w in zip(found, hits, whole) if n and not w} == expected["counts"]
    chosen = [c for c, w in zip(found, whole) if w]
    assert {c.key for c in chosen if c.part == "bias" or "norm" in c.key} == set(expected["vectors"])
    assert [c.point.name for c in chosen if c.part == "weight" and "norm" not in c.key] == matrices(
        expected["matrices"]
    )


PIECES = {
    "lora": {"down.weight": "lora_a", "up.weight": "lora_b"},
    "adapter": {f"{n}.{p}": f"adapter_{n}.{p}" for n in ("down", "up") for p in ("weight", "bias")},
}


@dataclass
class Trained:
    """A parameter of the adapter, or the slice of it that is one of theirs."""

    key: str  # name in the recording
    parameter: torch.nn.Parameter
    start: int = 0
    stop: int | None = None
    new: bool = True  # not one that the backbone has

    def check(self, recorded: list[float]) -> None:
        size, norm, along = recorded
        assert self.parameter.grad is not None
        grad = self.parameter.grad[self.start : self.stop]
        assert grad.numel() == size
        assert float(grad.norm()) == pytest.approx(norm, rel=1e-5, abs=1e-9)
        assert float((grad * fill(f"probe/{self.key}", tuple(grad.shape), 1.0)).sum()) == pytest.approx(
            along, rel=1e-5, abs=1e-8
        )


def trained(adapter: zoo.Adapter, form: str) -> Iterator[Trained]:
    for name, module in adapter.named_modules():
        if not isinstance(module, Tuned):
            continue
        if module.weight_delta is not None:
            yield Trained(f"{name}.delta_weight", module.weight_delta)
        if module.bias_delta is not None:  # a slice that is tuned whole is a bias there and a change of it here
            single = module.bias_index is not None
            yield Trained(f"{name}.delta_bias" if single else f"{name}.bias", module.bias_delta, new=single)
        if module.structured is not None:
            yield from (Trained(f"{name}.{k}", module.structured.get_parameter(v)) for k, v in PIECES[form].items())
    for name, parameter in adapter.named_parameters():
        place, _, last = name.rpartition(".")
        if place.endswith("attn.qkv"):
            yield from (
                Trained(f"{place[:-3]}{r}.bias", parameter, 192 * i, 192 * i + 192, new=False)
                for i, r in enumerate("qkv")
            )
        elif last == "cls_token" or (last in ("weight", "bias") and ".structured." not in name):
            yield Trained("cls_token" if last == "cls_token" else name, parameter, new=False)


@pytest.mark.parametrize("form", ["lora", "adapter"])
def test_outputs_and_gradients(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, expected = build(), AUTHORS[form]
    total = AUTHORS["masks"][f"{form}-1-0.05"]["total"] - CLS_IN_THEIR_SUM + 192
    monkeypatch.setattr("vision.adapters.spt.grid", lambda budget, size: TAUS)
    model.add_adapter(zoo.adapter("spt", budget=total / 1e6, form=form, alpha=1))
    adapter = model.adapters["spt"]
    adapter.calibrate(model, batches())
    assert adapter.plan["report"]["total"] == total
    # their sequential adapter of `proj` reads the projection's input instead of its output: left out of the recording
    adapter.plan = {**adapter.plan, "structured": matrices(expected["matrices"])}
    model.reattach("spt")
    parts = list(trained(adapter, form))
    with torch.no_grad():
        for part in parts:
            if part.new:
                part.parameter.copy_(fill(part.key, tuple(part.parameter.shape), 0.1))
    images, targets = batches()[0]
    logits = model(images)
    torch.nn.functional.cross_entropy(logits, targets).backward()
    torch.testing.assert_close(
        logits[:2].detach(), torch.tensor(expected["logits"], dtype=torch.float64), rtol=1e-7, atol=1e-7
    )
    assert {part.key for part in parts} == set(expected["gradients"])
    for part in parts:
        part.check(expected["gradients"][part.key])


@pytest.mark.parametrize("case", AUTHORS["shipped"])
def test_the_published_masks(case: str) -> None:
    """Their hits, as far as the masks tell them, give their sums by our rule; and the model of it trains as many."""
    form, _ = case.split("-")
    expected = AUTHORS["shipped"][case]
    model = zoo.load("vit-b16", pretrained=False, num_classes=0, device="meta")
    found = candidates(model.points, form, 8, 10, 5)
    structured, vectors = matrices(expected["matrices"]), expected["vectors"]
    single = {key: n for key, n in expected["counts"].items() if "norm" not in key}
    least = {*vectors, *(f"{name}.weight" for name in structured)}  # had at least as many hits as it takes
    hits = [math.ceil(c.threshold) if c.key in least else expected["counts"].get(c.key, 0) for c in found]
    whole, total = spend(hits, found, CLS_IN_THEIR_SUM)
    assert {c.key for c, w in zip(found, whole) if w} == least
    assert total == expected["total"] == expected["structured"] + expected["entries"] + CLS_IN_THEIR_SUM

    adapter = zoo.adapter("spt", form=form)
    adapter.plan = {"structured": structured, "vectors": vectors, "entries": single, "tokens": ["blocks.0.tokens"]}
    model.add_adapter(adapter)
    left_out = sum(expected["counts"].values()) - sum(single.values())
    assert model.num_parameters(trainable=True) == total - left_out


def test_sums_of_the_published_masks() -> None:
    assert [AUTHORS["shipped"][f"lora-{b}"]["total"] for b in ("0.4", "1.0")] == [380_909, 999_941]
