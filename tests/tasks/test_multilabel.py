"""Several classes for each item: average precision by its definition, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import zoo
from zoo.errors import DataError, MismatchError
from zoo.tasks.multilabel import MeanAveragePrecision, MultiLabel, average_precision


def by_definition(scores: Tensor, targets: Tensor) -> float:
    """Over the items that have the class: how many of those scored at least as high have it too."""
    values = [targets[scores >= scores[i]].mean().item() for i in range(len(scores)) if targets[i]]
    return sum(values) / len(values)


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision(ties: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(200, 7, generator=generator)
    if ties:
        scores = (scores * 2).round()
    targets = (torch.rand(200, 7, generator=generator) < torch.linspace(0.02, 0.9, 7)).double()
    expected = [by_definition(scores[:, k], targets[:, k]) for k in range(7)]
    torch.testing.assert_close(average_precision(scores, targets), torch.tensor(expected, dtype=torch.double))


def test_average_precision_is_that_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(50, 3, generator=generator).round(decimals=1)
    targets = (torch.rand(50, 3, generator=generator) < 0.3).double()
    expected = metrics.average_precision_score(targets.numpy(), scores.numpy(), average=None)
    torch.testing.assert_close(average_precision(scores, targets), torch.from_numpy(expected))


def test_the_mean_is_over_batches_and_classes_that_occur() -> None:
    metric = MeanAveragePrecision()
    scores, targets = torch.randn(30, 4), (torch.rand(30, 4) < 0.4).float()
    targets[:, 2] = 0
    for part in range(0, 30, 7):
        metric.update(scores[part : part + 7], targets[part : part + 7])
    expected = sum(by_definition(scores[:, k], targets[:, k]) for k in (0, 1, 3)) / 3
    assert metric.compute() == pytest.approx(expected, abs=1e-6)
    metric.reset()
    assert math.isnan(metric.compute())


class Tags(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Each class is a channel that is bright."""

    def __init__(self, classes: int) -> None:
        self.tags = torch.tensor([[i >> k & 1 for k in range(classes)] for i in range(2**classes)]).float()

    def __len__(self) -> int:
        return len(self.tags)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.tags[index][:3, None, None].expand(3, 32, 32) * 1.0, self.tags[index]


def test_on_pictures() -> None:
    tiny = {"embed_dim": 48, "depth": 1, "num_heads": 3}
    model = zoo.load("vit-micro", "lora", pretrained=False, num_classes=3, seed=0, **tiny)
    data = Tags(3)
    report = zoo.fit(model, data, task="multilabel", epochs=40, batch_size=8, lr=1e-2, progress=False)
    assert report.history[-1]["loss"] < report.history[0]["loss"]
    assert zoo.evaluate(model, data, task="multilabel", progress=False)["map"] > 0.9
    images, targets = torch.randn(2, 3, 32, 32), torch.tensor([[1.0, 0, 1], [0, 0, 1]])
    loss, outputs = MultiLabel().loss(model, images, targets, label_smoothing=0.2)
    probability = outputs.sigmoid()
    wanted = targets * 0.8 + 0.1
    expected = -(wanted * probability.log() + (1 - wanted) * (1 - probability).log()).mean()
    torch.testing.assert_close(loss, expected)


def test_refusals() -> None:
    tiny = {"embed_dim": 48, "depth": 1, "num_heads": 3}
    model = zoo.load("vit-micro", pretrained=False, num_classes=2, **tiny)
    with pytest.raises(DataError, match=r"\(8, 3\); expected \(B, 2\)"):
        zoo.evaluate(model, Tags(3), task="multilabel", progress=False)
    labelled = torch.utils.data.TensorDataset(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]))
    with pytest.raises(DataError, match="task='classify'"):
        zoo.evaluate(model, labelled, task="multilabel", progress=False)
    three = torch.utils.data.TensorDataset(torch.zeros(3, 3, 32, 32), torch.tensor([0, 1, 2]))
    with pytest.raises(MismatchError, match="3 classes, the model's head 2"):
        zoo.evaluate(model, three, task="multilabel", progress=False)
