"""Heads with margins against their definitions by angles, their gradients, saving, and what they refuse."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from train_parts import easy_data, fit, tiny_model

import zoo
from zoo.errors import ConfigError, MismatchError

KINDS = ("cosface", "arcface", "adaface")
each = pytest.mark.parametrize("kind", KINDS)


def head(kind: str, classes: int = 4, **settings: Any) -> Any:
    model = zoo.load("vit-micro", pretrained=False, num_classes=0, depth=1, dtype=torch.float64)
    torch.manual_seed(0)
    model.reset_head(classes, kind=kind, **settings)
    return model.head.train()


def features(count: int = 6) -> tuple[Tensor, Tensor]:
    z = torch.randn(count, 192, generator=torch.Generator().manual_seed(1)).double()
    return z * torch.linspace(0.3, 4, count).double()[:, None], torch.arange(count) % 4


def angles(z: Tensor, w: Tensor) -> list[list[float]]:
    """Between every feature and every direction, by their coordinates."""
    found = []
    for a in z.tolist():
        row = []
        for b in w.tolist():
            dot = sum(x * y for x, y in zip(a, b))
            row.append(math.acos(dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))))
        found.append(row)
    return found


def by_definition(kind: str, theta: float, m: float, g: float) -> float:
    if kind == "cosface":
        return math.cos(theta) - m
    if kind == "arcface":
        return math.cos(theta + m) if theta + m <= math.pi else math.cos(theta) - m * math.sin(m)
    return math.cos(theta - m * g) - (m + m * g)


@each
@pytest.mark.parametrize("margin", [None, 0.2, 1.7])
def test_against_the_definition(kind: str, margin: float | None) -> None:
    settings: dict[str, Any] = {} if margin is None else {"margin": margin}
    made = head(kind, scale=30.0, **settings)
    z, targets = features()
    m = margin if margin is not None else (0.5 if kind == "arcface" else 0.4)
    found = made({"pooled": z}, targets)
    theta = angles(z, made.weight.detach())
    lengths = [math.sqrt(sum(x * x for x in row)) for row in z.tolist()]
    average = sum(lengths) / len(lengths)
    spread = math.sqrt(sum((x - average) ** 2 for x in lengths) / (len(lengths) - 1))
    mean, std = 0.99 * 20 + 0.01 * average, 0.99 * 100 + 0.01 * spread
    for i, y in enumerate(targets.tolist()):
        g = max(-1.0, min(1.0, (lengths[i] - mean) / (std + 1e-3) / 3))
        expected = [math.cos(t) for t in theta[i]]
        expected[y] = by_definition(kind, theta[i][y], m, g)
        assert found[i].tolist() == pytest.approx([30 * e for e in expected], rel=1e-6), i
    evaluated = made.eval()({"pooled": z})
    assert evaluated.flatten().tolist() == pytest.approx([30 * math.cos(t) for row in theta for t in row], rel=1e-9)
    if kind == "adaface":
        assert [made.mean.item(), made.std.item()] == pytest.approx([mean, std], rel=1e-9)


@each
def test_gradients_are_those_of_the_function(kind: str) -> None:
    """By differences: what insightface computes without a graph has another gradient for arcface."""
    made = head(kind, scale=5.0)
    if kind == "adaface":
        made.momentum.zero_()
        made.mean.fill_(20.0)
        made.slope.zero_()  # through the length of the features no gradient goes, which differences would see
    z, targets = features(3)

    def run(z: Tensor, w: Tensor) -> Tensor:
        return torch.func.functional_call(made, {"weight": w}, ({"pooled": z}, targets))  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(run, (z.requires_grad_(), made.weight.detach().clone().requires_grad_()))


def test_harder_falls_with_the_angle() -> None:
    """arcface goes on falling where the angle with its margin is beyond pi, and edges have finite gradients."""
    made = head("arcface")
    cosine = torch.linspace(-1 + 1e-6, 1 - 1e-6, 1001, dtype=torch.float64, requires_grad=True)
    values = made.harder(cosine, cosine)
    assert (values.diff() > 0).all()
    (gradient,) = torch.autograd.grad(values.sum(), cosine)
    assert gradient.isfinite().all()
    for kind in KINDS:
        made = head(kind)
        z = made.weight.detach()[:2].clone().requires_grad_()  # exactly on its direction
        made({"pooled": z}, torch.tensor([0, 1])).sum().backward()
        assert z.grad is not None and z.grad.isfinite().all()


@each
def test_trains_saves_and_reloads(kind: str, tmp_path: Path) -> None:
    model = tiny_model(zoo.adapter("lora", rank=2))
    model.reset_head(4, kind=kind, scale=16.0, margin=0.1)
    before = model.head.weight.detach().clone()  # type: ignore[union-attr,operator]
    report = fit(model, easy_data(80), easy_data(24, seed=1), epochs=6, lr=1e-2)
    assert report.metrics["val_accuracy"] > 0.9 and not torch.equal(before, model.head.weight)  # type: ignore[arg-type]
    model.save_adapter(tmp_path / "out")
    torch.manual_seed(100)  # the same random backbone
    again = zoo.load(adapter=tmp_path / "out", pretrained=False).eval()
    images, _ = easy_data(8).tensors
    assert torch.equal(again(images), model.eval()(images))
    assert [again.head.scale.item(), again.head.margin.item()] == pytest.approx([16.0, 0.1])  # type: ignore[operator,union-attr]
    if kind == "adaface":
        assert again.head.mean.item() == model.head.mean.item() != 20  # type: ignore[operator,union-attr]


def test_half_precision_and_one_image() -> None:
    made = head("adaface").float()
    z, targets = features()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = made({"pooled": z.bfloat16()}, targets)
    assert narrow.dtype == torch.float32
    before = made.mean.item(), made.std.item()
    made({"pooled": z[:1].float()}, targets[:1])  # a single length has no spread
    assert (made.mean.item(), made.std.item()) == before


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="'cosface' has no setting 'margins'; it has scale, margin"):
        head("cosface", margins=0.2)
    with pytest.raises(ConfigError, match="the head 'linear' has no setting 'margin'; it has none"):
        head("linear", margin=0.2)
    with pytest.raises(ConfigError, match="margin is -1"):
        head("arcface", margin=-1)
    with pytest.raises(ConfigError, match="h is 'big'"):
        head("adaface", h="big")
    with pytest.raises(ConfigError, match="scale is 0; all logits would be 0"):
        head("cosface", scale=0)
    with pytest.raises(ConfigError, match=r"momentum is 2\.0; expected a number from 0 to 1"):
        head("adaface", momentum=2.0)
    with pytest.raises(ConfigError, match="one identity for each image"):
        head("cosface")({"pooled": features()[0]}, torch.rand(6, 4))


@pytest.mark.parametrize("kind", ["cosface", "dense"])
def test_a_head_that_no_library_holds_is_merged_without(kind: str) -> None:
    model, images = tiny_model(num_classes=0), easy_data(2)[:][0]
    model.reset_head(3, kind=kind)
    with pytest.raises(
        MismatchError, match=r"classifier cannot hold it\. Merge the backbone alone .model\.reset_head\(0\)"
    ):
        model.merge()
    model.reset_head(0)
    torch.testing.assert_close(model.merge().eval()(images), model.eval()(images))
