"""GRAM: the gradient through the inner step against its closed forms and finite differences, and the regulator afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

import zoo

pytest.importorskip("open_clip")
from clip_models import IMAGE, TEXT, make

from multimodal.adapters.gram import regulate
from multimodal.tasks.gram import Episodes, Meta, clusters
from zoo.errors import AttachError, ConfigError, DataError, UnknownNameError
from zoo.tasks import Classify

NAMES = ["cat", "dog", "truck"]
RATE = 0.3


class Wide(Classify):
    """Cross-entropy in float64."""

    def loss(self, model: Any, inputs: Any, targets: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        logits = model(inputs)
        return F.cross_entropy(logits, targets), logits


def build(each_entry: bool = False) -> zoo.Model:
    text = {**TEXT, "context_length": 24}
    model = make("plain", zoo.adapter("coop", num_tokens=2), text_cfg=text, tower="both", classes=NAMES)
    regulate(model, "coop", each_entry=each_entry)
    return model.double().train()


def parts(model: zoo.Model) -> tuple[Any, Any]:
    """theta (M, d) and s (d,)."""
    named = model.parameters_to_train()
    return named["coop/text.blocks.0.tokens.context"], named["gram/coop.text.blocks.0.tokens.context.scale"]


def batch() -> tuple[Tensor, Tensor]:
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(5), dtype=torch.double)
    return x, torch.tensor([0, 1, 2, 1])


def gradients(model: zoo.Model, task: Meta) -> list[Tensor]:
    loss, _ = task.loss(model, *batch())
    found = torch.autograd.grad(loss, parts(model), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parts(model), found)]


def plain(model: zoo.Model, rows: slice) -> Tensor:
    """The gradient of theta of some rows' loss, without any inner step."""
    x, y = batch()
    (found,) = torch.autograd.grad(F.cross_entropy(model(x[rows]), y[rows]), [parts(model)[0]])
    return found


@pytest.mark.parametrize("each_entry", [False, True])
def test_the_gradient_through_the_inner_step(each_entry: bool) -> None:
    model = build(each_entry)
    theta, scale = parts(model)
    assert scale.shape == (theta.shape if each_entry else theta.shape[-1:]) and not scale.any()
    with torch.no_grad():
        scale.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(2))
    exact = gradients(model, Meta(Wide(), inner_lr=RATE))
    support = plain(model, slice(0, 2))
    start = theta.detach().clone()
    with torch.no_grad():
        theta.copy_(start - RATE * (1 + scale) * support)
    query = plain(model, slice(2, 4))
    with torch.no_grad():
        theta.copy_(start)
    closed = -RATE * query * support
    torch.testing.assert_close(exact[1], closed if each_entry else closed.sum(0), rtol=1e-8, atol=1e-12)
    first = gradients(model, Meta(Wide(), inner_lr=RATE, first_order=True))
    torch.testing.assert_close(first[0], query, rtol=1e-8, atol=1e-12)  # theta' moves as theta does
    torch.testing.assert_close(first[1], exact[1], rtol=1e-8, atol=1e-12)
    assert not torch.allclose(exact[0], first[0], rtol=1e-3)
    for place in ((0, 3), (1, 17)):  # of theta, against finite differences
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                theta.copy_(start)
                theta[place] += sign * 1e-5
            values.append(float(Meta(Wide(), inner_lr=RATE).loss(model, *batch())[0].detach()))
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(float(exact[0][place]), rel=1e-4, abs=1e-8)


def test_no_step_is_plain_training() -> None:
    """a = 0, and s = -1, leave the gradient of Q alone."""
    model = build()
    expected = plain(model, slice(2, 4))
    torch.testing.assert_close(gradients(model, Meta(Wide(), inner_lr=0.0))[0], expected, rtol=1e-8, atol=1e-12)
    with torch.no_grad():
        parts(model)[1].fill_(-1.0)
    torch.testing.assert_close(gradients(model, Meta(Wide(), inner_lr=RATE))[0], expected, rtol=1e-8, atol=1e-12)
    x, y = batch()
    model.eval()
    loss, logits = Meta(Wide(), inner_lr=RATE).loss(model, x, y)
    assert logits.shape == (4, 3) and torch.equal(loss, F.cross_entropy(model(x), y))


def fresh() -> zoo.Model:
    options: dict[str, Any] = {"embed_dim": 24, "vision_cfg": IMAGE, "text_cfg": {**TEXT, "context_length": 24}}
    return zoo.load("clip-micro", zoo.adapter("coop", num_tokens=2), classes=NAMES, pretrained=False, seed=0, **options)


def test_meta_training_is_a_fit_and_the_regulator_acts_afterwards(tmp_path: Path) -> None:
    model = fresh()
    regulate(model, "coop")
    x = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    data = zoo.open_dataset(TensorDataset(x, torch.arange(12) % 3), classes=NAMES)
    episodes = Episodes((0,) * 12, tuple(i // 6 for i in range(12)), 4)
    theta, scale = parts(model)
    before = theta.detach().clone()
    with torch.no_grad():
        logits = model.eval()(x)
    task = Meta("classify", inner_lr=0.1)
    report = zoo.fit(
        model, data, task=task, sampler=episodes, epochs=2, batch_size=8, accumulate=2, augment="none", progress=False
    )
    assert report.history and scale.any() and not torch.equal(theta, before)
    assert not scale.requires_grad and not torch.equal(model.eval()(x), logits)
    with pytest.raises(ConfigError, match=r"another one would leave it as it is.*learn_again"):
        zoo.fit(model, data, task=task, sampler=episodes, epochs=1, batch_size=8, augment="none", progress=False)
    model.save_adapter(tmp_path / "out")
    again = zoo.load(adapter=tmp_path / "out", pretrained=False, seed=0)
    assert set(again.active) == {"coop", "gram"} and torch.equal(again.eval()(x), model(x))
    assert list(again.parameters_to_train()) == ["coop/text.blocks.0.tokens.context"]
    (own,) = again.adapters["gram"].parameters()  # type: ignore[union-attr]
    (moved,) = again.adapters["coop"].parameters()  # type: ignore[union-attr]
    assert torch.equal(own, scale)
    with torch.no_grad():
        own.fill_(-1.0)
        own[:5] = 0.0
    start = moved.detach().clone()
    zoo.fit(again, data, epochs=1, batch_size=6, weight_decay=0.0, augment="none", progress=False)
    changed = (moved != start).any(dim=0)
    assert changed[:5].all() and not changed[5:].any()  # where s is -1 nothing is learned
    learned = scale.detach().clone()
    model.adapters["gram"].learn_again()  # type: ignore[operator,union-attr]
    zoo.fit(model, data, task=task, sampler=episodes, epochs=1, batch_size=8, augment="none", progress=False)
    assert not torch.equal(scale, learned) and model.adapters["gram"].learned  # type: ignore[union-attr]
    assert not scale.requires_grad


def test_support_and_query_are_of_different_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(2, 8, generator=generator).repeat_interleave(20, 0) + 0.01 * torch.randn(
        40, 8, generator=generator
    )
    kinds = torch.randn(2, 8, generator=generator).repeat(20, 1)
    groups, inside = clusters(kinds + 0.01 * torch.randn(40, 8, generator=generator), texts, 2, 2)
    assert len(set(groups[:20])) == len(set(groups[20:])) == 1 and groups[0] != groups[20]
    assert len(set(inside[:20:2])) == 1 and inside[0] != inside[1]
    data = zoo.open_dataset(TensorDataset(torch.zeros(40, 1), torch.zeros(40).long()), classes=["a"])
    sampled = Episodes(groups, inside, 4).over(data, 8, 0)
    order = sampled.order(0)
    assert len(order) == sampled.size == 40
    assert not np.array_equal(order, sampled.order(1)) and np.array_equal(order, sampled.order(0))
    for task in order.reshape(-1, 4):
        support, query = task[:2], task[2:]
        assert not set(support) & set(query)
        assert len({groups[i] for i in task}) == 1
        assert {inside[i] for i in support}.isdisjoint({inside[i] for i in query})
    with pytest.raises(DataError, match="No group has two clusters"):
        Episodes((0,) * 40, (0,) * 40, 4).over(data, 8, 0)
    with pytest.raises(ConfigError, match="even number that divides"):
        Episodes(groups, inside, 3).over(data, 8, 0)
    with pytest.raises(ConfigError, match="are of 1 items"):
        Episodes((0,), (0,), 4).over(data, 8, 0)


def test_counts_and_refusals() -> None:
    model = zoo.load("clip-vit-b16", zoo.adapter("coop", num_tokens=4), num_classes=10, device="meta")
    assert model.num_parameters(trainable=True, head=False) == 2_048
    regulate(model, "coop")
    assert model.num_parameters(trainable=True, head=False) == 2_048 + 512
    regulate(model, "coop", each_entry=True, name="other")
    assert sum(p.numel() for p in model.adapters["other"].parameters()) == 2_048  # type: ignore[union-attr]
    model = fresh()
    with pytest.raises(ConfigError, match="0 are in use"):
        Meta().check(model, zoo.open_dataset(TensorDataset(torch.zeros(3, 3, 16, 16), torch.arange(3)), classes=NAMES))
    with pytest.raises(AttachError, match="stands around another adapter"):
        model.add_adapter("gram")
    with pytest.raises(UnknownNameError, match="no adapter 'vpt'"):
        regulate(model, "vpt")
    regulate(model, "coop")
    with pytest.raises(DataError, match="no two halves"):
        Meta().loss(model.train(), torch.zeros(3, 3, 16, 16), torch.arange(3))
    with pytest.raises(ConfigError, match="inner_lr is -1"):
        Meta(inner_lr=-1.0)
    model.remove_adapter("coop")
    with pytest.raises(ConfigError, match="which the model has not"):
        model.adapters["gram"].after_backward(model, 0)  # type: ignore[operator,union-attr]
