"""A fit that fails: what is checked before its first step, and what the model holds afterwards."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset
from train_parts import difference, easy_data, fit, tiny_model, weights

import zoo
from zoo.errors import ConfigError, DataError


@pytest.mark.parametrize("training", [True, False])
def test_a_misspelt_monitor_is_told_before_the_first_step(training: bool) -> None:
    """It was told after the first epoch: half trained, and left in train mode."""
    model = tiny_model().train(training)
    before = weights(model)
    with pytest.raises(
        ConfigError, match=r"monitor is 'acuracy', which the evaluation does not give; it gives accuracy, loss"
    ):
        fit(model, easy_data(32), easy_data(8), monitor="acuracy")
    assert difference(weights(model), before) == 0 and model.training is training


class Broken(Dataset[Any]):
    """Item 11 cannot be read."""

    classes = ("a", "b", "c", "d")

    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> Any:
        if i == 11:
            raise DataError("item 11 is broken")
        return torch.zeros(3, 8, 8), i % 4


@pytest.mark.parametrize("folder", [True, False])
def test_what_is_trained_before_a_failure_is_said(tmp_path: Path, folder: bool) -> None:
    model = tiny_model().eval()
    further = (
        "goes on from the last one that was written" if folder else r"With checkpoint=\.\.\. the same call goes on"
    )
    with pytest.raises(DataError, match=rf"item 11 is broken.* trained up to step \d+ of 16\. .*{further}"):
        fit(model, Broken(), batch_size=1, epochs=1, checkpoint=tmp_path if folder else None)
    assert not model.training and model.adapters["lora"].training_service is None


def test_a_failure_in_the_first_batch_leaves_everything() -> None:
    model = tiny_model()
    before = weights(model)
    with pytest.raises(DataError, match="item 11 is broken"):
        fit(model, Broken(), batch_size=16)
    assert difference(weights(model), before) == 0 and not model.training


def test_a_calibration_is_undone() -> None:
    """The choice of a calibration stayed, although nothing was trained."""
    model = tiny_model(zoo.adapter("spt", budget=0.002, rank=2, num_batches=1))
    images, labels = easy_data(16).tensors

    class Late:
        def fit_start(self, model: Any, optimizer: Any, total_steps: int) -> None:
            assert model.adapters["spt"].plan is not None
            raise DataError("not today")

    with pytest.raises(DataError, match="not today"):
        fit(model, TensorDataset(images, labels), callbacks=[Late()])
    assert model.adapters["spt"].plan is None and list(weights(model)) == ["head/weight", "head/bias"]
    fit(model, TensorDataset(images, labels), epochs=1)
    assert model.adapters["spt"].plan is not None


class Mean:
    """A metric of one's own."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def reset(self) -> None:
        self.values = []

    def update(self, outputs: Any, targets: Any) -> None:
        self.values.append(float((outputs.argmax(1) == targets).float().mean()))

    def compute(self) -> float:
        return sum(self.values) / len(self.values)


def test_metrics_of_ones_own_while_fitting() -> None:
    """`metrics=` was there for an evaluation only."""
    report = fit(
        tiny_model(),
        easy_data(32),
        easy_data(16),
        epochs=3,
        batch_size=16,
        metrics={"mine": Mean(), "f1": "f1"},
        monitor="mine",
    )
    assert all(h["val_mine"] == pytest.approx(h["val_accuracy"]) and 0 <= h["val_f1"] <= 1 for h in report.history)
    assert report.best["val_mine"] == max(h["val_mine"] for h in report.history)
    assert fit(tiny_model(), easy_data(32), easy_data(16), epochs=1, metrics="top3").metrics["val_top3"] >= 0.25


def test_a_metric_that_does_not_fit_is_told_before_the_first_step() -> None:
    class Wrong(Mean):
        def update(self, outputs: Any, targets: Any) -> None:
            raise RuntimeError("shapes")

    model = tiny_model()
    before = weights(model)
    with pytest.raises(
        ConfigError, match=r"the metric 'mine' does not take what the model gives, \(4, 4\), .*RuntimeError: shapes"
    ):
        fit(model, easy_data(32), easy_data(8), metrics={"mine": Wrong()})
    with pytest.raises(ConfigError, match="there is no metric 'f2'"):
        fit(model, easy_data(32), easy_data(8), metrics=["f2"])
    assert difference(weights(model), before) == 0


def test_a_metric_that_needs_more_than_a_few_items() -> None:
    class Many(Mean):
        def compute(self) -> float:
            if len(self.values) < 2:
                raise ValueError("too few")
            return super().compute()

    assert "val_mine" in fit(tiny_model(), easy_data(32), easy_data(32), epochs=1, metrics={"mine": Many()}).history[0]


def test_less_is_better_where_it_is() -> None:
    import torchmetrics

    data = easy_data(32, noise=2)
    for monitor, metrics in (
        ("hamming", {"hamming": torchmetrics.HammingDistance("multiclass", num_classes=4)}),
        ("-mine", {"mine": Mean()}),
    ):
        report = fit(tiny_model(), data, easy_data(16, noise=2), epochs=4, lr=3e-2, monitor=monitor, metrics=metrics)
        name = f"val_{monitor.removeprefix('-')}"
        assert report.best[name] == min(h[name] for h in report.history)


def test_nan_in_the_validation_is_json_and_not_the_best(tmp_path: Path) -> None:
    """report.json held NaN, which is no JSON, and a first epoch of NaN stayed the best one for good."""
    images, labels = easy_data(8).tensors

    class Sometimes(Mean):
        count = 0

        def compute(self) -> float:
            self.count += 1
            return math.nan if self.count in (2, 4) else 0.5 + self.count / 100

    bad = TensorDataset(images * math.nan, labels)
    report = fit(tiny_model(), easy_data(32), bad, epochs=2, out=tmp_path)
    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert found["history"][0]["val_loss"] is None and math.isnan(report.history[0]["val_loss"])
    report = fit(
        tiny_model(), easy_data(32), easy_data(8), epochs=4, metrics={"mine": Sometimes()}, monitor="mine", out=tmp_path
    )
    assert math.isnan(report.history[0]["val_mine"]) and report.best["epoch"] == 4
    json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))
