"""Metric learning by proxies: the loss against sums written out, what is trained and measured, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from train_parts import easy_data, tiny_model

import zoo
from zoo import registry
from zoo.errors import ConfigError, DataError
from zoo.tasks.metrics import metric
from zoo.tasks.proxy_anchor import ProxyAnchor, proxy_anchor


def written_out(z: Tensor, proxies: Tensor, labels: list[int], present: bool) -> float:
    positive, negative, there = 0.0, 0.0, 0
    for c, p in enumerate(proxies):
        cosines = [float(F.cosine_similarity(x, p, dim=0)) for x in z]
        near = [s for s, y in zip(cosines, labels) if y == c]
        far = [s for s, y in zip(cosines, labels) if y != c]
        positive += math.log1p(sum(math.exp(-32 * (s - 0.1)) for s in near))
        negative += math.log1p(sum(math.exp(32 * (s + 0.1)) for s in far))
        there += bool(near)
    return positive / (there if present else len(proxies)) + negative / len(proxies)


@pytest.mark.parametrize("present", [True, False])
def test_the_loss_against_sums(present: bool) -> None:
    torch.manual_seed(0)
    z, proxies, labels = torch.randn(5, 6).double(), torch.randn(4, 6).double(), [0, 2, 2, 0, 2]
    found = proxy_anchor(z, proxies, torch.tensor(labels), present=present)
    assert float(found) == pytest.approx(written_out(z, proxies, labels, present), rel=1e-9)
    alone = proxy_anchor(
        z.requires_grad_(), proxies, torch.tensor([1] * 5), present=present
    )  # no item is far from class 1
    assert alone.item() == pytest.approx(written_out(z.detach(), proxies, [1] * 5, present), rel=1e-9)
    alone.backward()
    assert z.grad is not None and bool(z.grad.isfinite().all())


def embedding_model(adapter: Any = "lora") -> zoo.Model:
    model = tiny_model(adapter, num_classes=0)
    torch.manual_seed(0)
    model.reset_head(8, kind="embedding")
    return model


def test_an_embedding_is_trained_and_saved_without_its_proxies(tmp_path: Path) -> None:
    model, others = embedding_model(), easy_data(16, seed=5, noise=1.5)
    z = model(others[:][0])
    torch.testing.assert_close(z.norm(dim=1), torch.ones(16))
    bound = math.sqrt(6 / (24 + 8))
    assert 0.9 * bound < float(model.head.linear.weight.abs().max()) <= bound  # Xavier's, not a classifier's
    sampler = zoo.train.PerClass(classes=4, each=2)
    task = ProxyAnchor()
    options: dict[str, Any] = {"epochs": 3, "batch_size": 8, "sampler": sampler, "lr": 1e-2, "metrics": ["nmi"]}
    report = zoo.fit(model, easy_data(32, noise=1.5), others, task=task, progress=False, **options)
    assert report.history[-1]["loss"] < report.history[0]["loss"]
    assert math.isnan(report.history[-1]["val_loss"])  # classes that are measured need no proxies
    assert 0 <= report.metrics["val_nmi"] <= 1 and report.metrics["val_recall@1"] > 0.5
    saved = zoo.disk.read(model.save_adapter(tmp_path / "out"))
    assert saved.head_kind == "embedding" and saved.num_classes == 8 and saved.classes is None
    assert not [name for name in saved.tensors if "prox" in name]
    again = tiny_model(None, num_classes=0)
    zoo.disk.attach(again, saved)
    assert torch.equal(again.eval()(others[:][0]), model.eval()(others[:][0]))
    found = zoo.evaluate(again, others, task="proxy-anchor", progress=False)
    assert found["recall@1"] == pytest.approx(report.metrics["val_recall@1"])


def test_pooled_features_are_an_embedding_too() -> None:
    model, data = tiny_model("vpt", num_classes=0), easy_data(16)
    bare = zoo.evaluate(tiny_model(None, num_classes=0), data, task="proxy-anchor", progress=False)
    assert 0 <= bare["recall@1"] <= bare["recall@8"] <= 1
    task = ProxyAnchor(present=False)
    zoo.fit(model, data, task=task, steps=2, batch_size=8, progress=False)
    assert task.own is not None and tuple(task.own.proxies.shape) == (4, 24)


def test_what_is_refused() -> None:
    data = easy_data(8)
    options: dict[str, Any] = {"task": "proxy-anchor", "steps": 1, "progress": False}
    cases: list[tuple[zoo.Model, Any, dict[str, Any], type[Exception], str]] = [
        (tiny_model(), data, {}, ConfigError, r"a classifier of 4 outputs.*kind='embedding'"),
        (embedding_model(), data, {"label_smoothing": 0.1}, ConfigError, "label_smoothing is of classifications"),
        (embedding_model(), data, {"mixup": 0.4}, ConfigError, "mixup and cutmix mix the classes"),
        (embedding_model(), easy_data(8, classes=1), {}, DataError, "1 known classes.*wants two or more"),
        (embedding_model(), zoo.open_dataset(easy_data(8), labels="numbers"), {}, DataError, "wants one class"),
    ]
    for model, train, more, kind, words in cases:
        with pytest.raises(kind, match=words):
            zoo.fit(model, train, **options, **more)
    with pytest.raises(ConfigError, match="scale is 0"):
        ProxyAnchor(scale=0)


def test_clusters() -> None:
    """Two clusters that are the identities, and two that know nothing of them."""
    apart = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    for labels, expected in (([0, 0, 1, 1], 1.0), ([0, 1, 0, 1], 0.0), ([7, 7, 7, 7], math.nan)):
        found = metric("nmi")
        found.update(apart, torch.tensor(labels))
        assert float(found.compute()) == pytest.approx(expected, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        ("proxy-anchor", {"margin": "a"}, "margin is 'a' .str.; expected float"),
        ("proxy-anchor", {"margin": math.nan}, "margin is nan; expected a finite number"),
        ("proxy-anchor", {"present": 2}, "present is 2 .int.; expected bool"),
        ("semantic-proxies", {"tokens": "5"}, "tokens is '5' .str.; expected int"),
        ("semantic-proxies", {"depth": 1.5}, "depth is 1.5 .float.; expected int"),
        ("semantic-proxies", {"scale": math.inf}, "scale is inf; expected a finite number"),
        ("contrast", {"captions": None}, "captions is None"),
        ("contrast", {"scale": (0.9, 0.1)}, "the least and the largest share"),
        ("generate", {"beams": "2"}, "beams is '2'"),
        ("transcribe", {"length": 2.5}, "length is 2.5"),
    ],
)
def test_settings_of_tasks_are_of_their_types(task: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        type(registry.task(task))(**settings)


def test_a_search_for_the_rate_compares_what_is_measured() -> None:
    report = zoo.fit(embedding_model(), easy_data(32), epochs=1, task="proxy-anchor", lr="auto", progress=False)
    tried = report.settings["lr_search"]
    assert len(tried) == 4 and all(0 <= t["recall@1"] <= 1 for t in tried)
    assert report.settings["lr"] == max(tried, key=lambda t: t["recall@1"])["lr"]


def test_evaluation_without_a_head_names_a_task_that_measures_features() -> None:
    """Only a head was asked for, of a folder that was trained without one."""
    model, data = tiny_model(None, num_classes=0), easy_data(8)
    with pytest.raises(ConfigError, match=r"task='identify' \(--task identify\)"):
        zoo.evaluate(model, data, progress=False)
    assert "rank@1" in zoo.evaluate(model, data, task="identify", progress=False)
    zoo.fit(model := tiny_model("vpt", num_classes=0), data, task="proxy-anchor", steps=1, progress=False)
    with pytest.raises(ConfigError, match=r"was trained for 'proxy-anchor', and is measured by task='proxy-anchor'"):
        zoo.evaluate(model, data, progress=False)
