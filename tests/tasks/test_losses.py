"""Losses by name, weights of classes, regression: against sums written out by hand, and in a fit."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset
from torchvision.ops import sigmoid_focal_loss
from train_parts import difference, easy_data, fit, tiny_model, weights

import zoo
from zoo.data.dataset import ImageDataset
from zoo.data.sources import TorchRows
from zoo.errors import ConfigError, DataError
from zoo.tasks import Classify
from zoo.tasks.losses import cross_entropy, focal, one_versus_all
from zoo.tasks.multilabel import MultiLabel, focal_yes_or_no, yes_or_no
from zoo.tasks.regress import Regress

QUIET = {"progress": False}
LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 3, 0])


def unequal(counts: tuple[int, ...] = (20, 4, 4, 4)) -> TensorDataset:
    """Easy data in which classes differ in size."""
    images, labels = easy_data(4 * max(counts)).tensors
    chosen = torch.cat([(labels == c).nonzero()[:n, 0] for c, n in enumerate(counts)])
    return TensorDataset(images[chosen], labels[chosen])


# -- the formulas -----------------------------------------------------------------------------------------------------------


def test_focal_loss() -> None:
    p = LOGITS.softmax(1)[range(6), LABELS]
    torch.testing.assert_close(focal(LOGITS, LABELS), -((1 - p) ** 2) * p.log())
    torch.testing.assert_close(focal(LOGITS, LABELS, gamma=0.0), cross_entropy(LOGITS, LABELS))
    torch.testing.assert_close(
        focal(LOGITS, LABELS, 0.1, gamma=0.0), F.cross_entropy(LOGITS, LABELS, label_smoothing=0.1, reduction="none")
    )
    soft = F.one_hot(LABELS, 4).float()
    torch.testing.assert_close(focal(LOGITS, soft), focal(LOGITS, LABELS))


def test_yes_or_no() -> None:
    tags = (torch.rand(6, 4, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    expected = F.binary_cross_entropy_with_logits(LOGITS, tags, reduction="none")
    torch.testing.assert_close(yes_or_no(LOGITS, tags), expected)
    torch.testing.assert_close(focal_yes_or_no(LOGITS, tags), sigmoid_focal_loss(LOGITS, tags, alpha=-1))
    single = F.one_hot(LABELS, 4).float()
    torch.testing.assert_close(
        one_versus_all(LOGITS, LABELS), F.binary_cross_entropy_with_logits(LOGITS, single, reduction="none").sum(1)
    )


def test_weights_are_those_of_scikit_learn() -> None:
    data, model = unequal(), tiny_model().train()
    labels = data.tensors[1]
    task = Classify().with_loss(None, "balanced")
    task.weigh(model, ImageDataset(TorchRows(data), list("abcd")))
    utils = pytest.importorskip("sklearn.utils.class_weight", reason="scikit-learn is not installed")
    expected = utils.compute_class_weight("balanced", classes=np.arange(4), y=labels.numpy())
    assert task.weights is not None and torch.allclose(task.weights, torch.tensor(expected).float())
    assert float(task.weights[labels].mean()) == pytest.approx(1.0)
    value = task.objective(model, LOGITS, LABELS, 0.0)
    torch.testing.assert_close(value, (task.weights[LABELS] * F.cross_entropy(LOGITS, LABELS, reduction="none")).mean())
    soft = LOGITS.softmax(1)
    torch.testing.assert_close(
        task.objective(model, LOGITS, soft, 0.0),
        ((soft @ task.weights) * F.cross_entropy(LOGITS, soft, reduction="none")).mean(),
    )
    torch.testing.assert_close(task.objective(model.eval(), LOGITS, LABELS, 0.0), F.cross_entropy(LOGITS, LABELS))


def test_weights_of_several_classes_are_those_of_a_yes() -> None:
    images, _ = easy_data(8).tensors
    tags = torch.zeros(8, 4)
    tags[:2, 0] = tags[:4, 1] = tags[:, 3] = 1
    model = tiny_model().train()
    task = MultiLabel().with_loss(None, "balanced")
    task.weigh(model, ImageDataset(TorchRows(TensorDataset(images, tags)), None))
    assert task.weights is not None and task.weights.tolist() == [3.0, 1.0, 1.0, 1.0]
    expected = F.binary_cross_entropy_with_logits(LOGITS, tags[:6], pos_weight=task.weights)
    torch.testing.assert_close(task.objective(model, LOGITS, tags[:6], 0.0), expected)


# -- in a fit ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "focal"},
        {"loss": "bce"},
        {"class_weights": "balanced"},
        {"class_weights": {"3": 5.0}, "loss": "focal", "label_smoothing": 0.1},
        {"loss": lambda outputs, targets: F.cross_entropy(outputs, targets)},
        {"loss": torch.nn.CrossEntropyLoss(weight=torch.ones(4))},
        {"loss": partial(focal, gamma=1.0), "class_weights": [1, 2, 3, 4]},
        {"loss": "focal", "mixup": 0.2},
    ],
    ids=["focal", "bce", "balanced", "by name", "function", "module", "weighted function", "mixup"],
)
def test_a_loss_keeps_accuracy_classes_and_monitor(options: dict[str, Any]) -> None:
    """`loss=` took the accuracy, the names of the classes and `monitor="accuracy"` away."""
    model = tiny_model()
    report = fit(model, unequal(), easy_data(16, seed=1), epochs=2, lr=1e-2, **options)
    assert 0 < report.metrics["val_accuracy"] <= 1 and report.settings["monitor"] == "accuracy"
    assert model.classes == ["0", "1", "2", "3"]
    if "mixup" not in options:
        assert "accuracy" in report.history[0]
    loss = options.get("loss")
    assert "accuracy" in zoo.evaluate(model, easy_data(16, seed=1), loss=loss, **QUIET)


def test_weights_move_what_is_learnt() -> None:
    heavy, plain = tiny_model(), tiny_model()
    data = unequal((20, 3, 3, 3))
    for model, given in ((heavy, [0.0, 1.0, 1.0, 1.0]), (plain, None)):
        fit(model, data, epochs=3, lr=1e-2, class_weights=given)
    rest = zoo.evaluate(heavy, easy_data(40, seed=2), per_class=True, **QUIET)["per_class"]
    assert rest["0"] == 0.0 and difference(weights(heavy), weights(plain)) > 1e-3


def test_parts_and_skipped_items_change_nothing() -> None:
    """torch's own weighted mean divides by the weights of a batch, which differ from part to part."""
    models = tiny_model(), tiny_model()
    for model, parts in zip(models, (1, 4), strict=True):
        fit(
            model,
            unequal(),
            epochs=1,
            class_weights="balanced",
            loss="focal",
            accumulate=parts,
            optimizer="sgd",
            clip=None,
        )
    assert difference(weights(models[0]), weights(models[1])) < 1e-6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "focall"}, r"loss is 'focall', which 'classify' does not have\. Did you mean 'focal'"),
        ({"class_weights": "balancd"}, "class_weights is 'balancd'; expected 'balanced'"),
        ({"class_weights": [1, 2]}, r"class_weights has 2 numbers, .*expected one of at least 0 for each of 4 classes"),
        ({"class_weights": {"cat": 2}}, "class_weights has an entry 'cat'"),
        ({"class_weights": [1, -1, 1, 1]}, "class_weights is "),
        ({"class_weights": [1, 1, 1, 2], "loss": lambda o, t: F.cross_entropy(o, t)}, "one number for each item"),
        ({"loss": lambda o, t: F.cross_entropy(o, t), "label_smoothing": 0.1}, "smooth inside your own"),
        ({"task": "regress", "class_weights": "balanced"}, "numbers have none"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], words: str) -> None:
    model = tiny_model()
    before = weights(model)
    with pytest.raises(ConfigError, match=words):
        fit(model, easy_data(16), epochs=1, **options)
    assert difference(weights(model), before) == 0


# -- numbers ----------------------------------------------------------------------------------------------------------------


def numbers(count: int, outputs: int, seed: int = 0) -> TensorDataset:
    images, _ = easy_data(count, seed=seed).tensors
    targets = images.mean((2, 3))[:, :outputs] * 3
    return TensorDataset(images, targets[:, 0] if outputs == 1 else targets)


@pytest.mark.parametrize("outputs", [1, 2])
def test_regression(outputs: int) -> None:
    """One output with float targets trained cross-entropy over one class: loss 0.0, and nothing was learnt."""
    model = tiny_model(num_classes=outputs)
    report = fit(model, numbers(64, outputs), numbers(32, outputs, 1), task="regress", epochs=12, lr=1e-2)
    assert report.history[-1]["loss"] < 0.7 * report.history[0]["loss"]
    assert report.best["val_rmse"] == min(h["val_rmse"] for h in report.history)
    result = zoo.evaluate(
        model, numbers(32, outputs, 1), task="regress", metrics=["pearson", "spearman", "mse"], **QUIET
    )
    with torch.no_grad():
        images, targets = numbers(32, outputs, 1).tensors
        error = model(images).reshape(targets.shape) - targets
    assert result["mae"] == pytest.approx(float(error.abs().mean()), rel=1e-4)
    assert result["rmse"] == pytest.approx(float(error.square().mean().sqrt()), rel=1e-4)
    assert result["loss"] == pytest.approx(result["mse"], rel=1e-4)
    variance = (targets - targets.mean(0)).square().reshape(32, -1).sum(0)
    explained = 1 - error.square().reshape(32, -1).sum(0) / variance
    assert result["r2"] == pytest.approx(float(explained.mean()), abs=1e-4) and -1 <= result["pearson"] <= 1


def test_regression_refuses_what_does_not_fit() -> None:
    with pytest.raises(
        DataError, match=r"targets \(16, 2\); the model has 1 outputs, so expected \(B,\) or \(B, 1\) numbers"
    ):
        fit(tiny_model(num_classes=1), numbers(16, 2), task="regress")
    with pytest.raises(ConfigError, match="The model has no head"):
        fit(tiny_model(num_classes=0), numbers(16, 1), task="regress")
    assert Regress().with_loss("huber").chosen == "huber"
    report = fit(tiny_model(num_classes=1), numbers(16, 1), task="regress", loss="mae", epochs=1)
    assert report.history[0]["loss"] > 0
    assert np.isnan(zoo.evaluate(tiny_model(num_classes=1), numbers(1, 1), task="regress", **QUIET)["r2"])


def test_metrics_of_several_classes() -> None:
    images, _ = easy_data(16).tensors
    tags = (torch.rand(16, 4, generator=torch.Generator().manual_seed(3)) > 0.5).float()
    model = tiny_model().eval()
    result = zoo.evaluate(
        model,
        TensorDataset(images, tags),
        task="multilabel",
        metrics=["multilabel_f1", "multilabel_auroc", "hamming"],
        **QUIET,
    )
    with torch.no_grad():
        wrong = ((model(images) > 0) != tags.bool()).float().mean()
    assert result["hamming"] == pytest.approx(float(wrong), abs=1e-6) and 0 <= result["multilabel_auroc"] <= 1
    assert "auroc" in zoo.evaluate(model, easy_data(16), metrics=["auroc"], **QUIET)
