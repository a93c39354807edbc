"""`zoo.fit` and `zoo.evaluate`: against a loop written by hand, choice of the best.

See also test_train_hooks.py and test_train_input.py.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from train_parts import CLASSES, difference, easy_data, fit, tiny_model, weights

import zoo
from zoo.data import open_dataset
from zoo.errors import ConfigError
from zoo.train import TrainingError, evaluation
from zoo.train.batches import BatchPlan

QUIET = {"progress": False}

# -- what is learnt -------------------------------------------------------------------------------------------------------


def test_learns_and_leaves_the_backbone_alone(tmp_path: Path) -> None:
    model = tiny_model()
    before = {name: t.clone() for name, t in model.backbone.state_dict().items()}
    report = fit(model, easy_data(120), easy_data(40, seed=1), epochs=8, out=tmp_path)
    assert report.history[0]["val_loss"] > 2 * report.history[-1]["val_loss"]
    assert zoo.evaluate(model, easy_data(200, seed=2), progress=False)["accuracy"] > 0.95
    assert all(torch.equal(t, before[name]) for name, t in model.backbone.state_dict().items())
    assert not model.training
    saved = json.loads((tmp_path / "report.json").read_text())
    assert len(saved["history"]) == 8 and saved["steps"] == 8 * 8 and saved["images"] == 8 * 120
    assert saved["best"]["chosen"] == "best" and saved["settings"]["batch_size"] == 16
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.format == "PNG" and picture.width > 800
    assert saved["parameters"] == model.num_parameters(trainable=True)


def test_equals_a_loop_written_by_hand() -> None:
    data, model, twin = easy_data(40), tiny_model(), tiny_model()
    report = fit(model, data, epochs=3, warmup=2, weight_decay=0.1, clip=0.5)
    plan = BatchPlan(40, 16)
    parameters = twin.parameters_to_train()
    groups = [
        {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    step = 0
    twin.train()
    for epoch in range(3):
        total = 0.0
        for indices in np.split(plan.order(epoch), [16, 32]):
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * ((step + 1) / 3 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 7)))
            images, labels = data[torch.as_tensor(indices)]
            loss = F.cross_entropy(twin(images), labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(list(parameters.values()), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item() * len(indices)
            step += 1
        assert report.history[epoch]["loss"] == pytest.approx(total / 40, rel=1e-6)
    assert difference(weights(model), weights(twin)) < 1e-6


@pytest.mark.parametrize("accumulate", [3, 5])
def test_parts_of_a_batch_give_the_batch(accumulate: int) -> None:
    """Also with a last batch of 8 images, cut into parts of different size."""
    whole, parts = tiny_model(), tiny_model()
    a = fit(whole, easy_data(40), optimizer="sgd")
    b = fit(parts, easy_data(40), optimizer="sgd", accumulate=accumulate)
    assert difference(weights(whole), weights(parts)) < 1e-6
    assert a.history[-1]["loss"] == pytest.approx(b.history[-1]["loss"], rel=1e-6)
    assert a.history[-1]["accuracy"] == b.history[-1]["accuracy"]


def test_drop_last_and_steps() -> None:
    assert fit(tiny_model(), easy_data(40), drop_last=True).images == 2 * 32
    report = fit(tiny_model(), easy_data(40), steps=4)
    assert (report.steps, len(report.history), report.images) == (4, 2, 40 + 16)
    with pytest.raises(ConfigError, match="drop_last=True leaves nothing"):
        fit(tiny_model(), easy_data(10), drop_last=True)


def test_callers_random_numbers_are_left_alone() -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    expected = (torch.rand(1).item(), random.random(), np.random.rand())
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    fit(tiny_model(), easy_data(16), epochs=1)
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected


def test_the_seed_decides() -> None:
    models = [tiny_model(zoo.adapter("lora", dropout=0.3)) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        torch.rand(3)  # the state of the global generator does not matter
        fit(model, easy_data(40), epochs=1, seed=seed)
    assert difference(weights(models[0]), weights(models[1])) == 0
    assert difference(weights(models[0]), weights(models[2])) > 1e-4


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"precision": "fp16"}, {"mixup": 0.8, "cutmix": 1.0}])
def test_precisions_and_mixing(options: dict[str, Any]) -> None:
    model = tiny_model()
    report = fit(model, easy_data(64), easy_data(32, seed=1), epochs=6, label_smoothing=0.1, **options)
    assert report.history[-1]["val_accuracy"] > 0.8
    assert ("accuracy" in report.history[0]) == ("mixup" not in options)
    assert {p.dtype for p in model.parameters_to_train().values()} == {torch.float32}


def test_fp16_overflow_skips_the_step_and_halves_the_scale() -> None:
    scales = []

    class Overflow:
        """An adapter's loss term whose scaled gradient overflows while the scale is above 2^14."""

        def extra_loss(self, model: zoo.Model, outputs: Tensor, targets: Tensor) -> Tensor:
            weight = model.head.weight
            return 0 * weight.sum() + _Overflowing.apply(weight.sum())

        def after_backward(self, model: zoo.Model, step: int) -> None:
            scales.append(step)
            assert all(
                bool(p.grad.isfinite().all()) for p in model.parameters_to_train().values() if p.grad is not None
            )

    fit(tiny_model(), easy_data(64), precision="fp16", epochs=1, callbacks=[Overflow()])
    assert scales == [2, 3]  # steps 0 and 1 were skipped: 2^16 and 2^15 are too large


class _Overflowing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x * 0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * (math.inf if float(gradient) > 2.0**14 else 0.0)


def test_own_loss_and_optimizer() -> None:
    images, labels = easy_data(32).tensors
    soft = TensorDataset(images, F.one_hot(labels, CLASSES).float())
    model = tiny_model()
    report = fit(
        model,
        soft,
        epochs=4,
        loss=lambda outputs, targets: ((outputs.softmax(1) - targets) ** 2).sum(1).mean(),
        lr=3e-2,
        optimizer=lambda groups: torch.optim.Adagrad(groups),
    )
    assert report.history[-1]["loss"] < 0.9 * report.history[0]["loss"] and "accuracy" not in report.history[0]
    assert "<lambda>" in report.settings["optimizer"]


def test_torch_data_of_pictures_gets_the_backbones_preprocessing() -> None:
    images, labels = easy_data(16).tensors

    class Pictures(Dataset[Any]):
        def __len__(self) -> int:
            return 16

        def __getitem__(self, i: int) -> tuple[Image.Image, int]:
            pixels = (40 * images[i] + 128).clamp(0, 255).byte().permute(1, 2, 0).numpy()
            return Image.fromarray(pixels), int(labels[i])

    assert fit(tiny_model(), Pictures(), Pictures(), epochs=1).history[0]["val_loss"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_a_gpu(precision: str) -> None:
    cpu, gpu = tiny_model(), tiny_model()
    a = fit(cpu, easy_data(64), easy_data(16, seed=1), device="cpu")
    b = fit(gpu, easy_data(64), easy_data(16, seed=1), device="cuda", precision=precision, workers=2)
    assert gpu.device.type == "cuda"
    assert b.history[-1]["val_loss"] == pytest.approx(
        a.history[-1]["val_loss"], rel=1e-3 if precision == "fp32" else 5e-2
    )
    images, labels = easy_data(48).tensors
    with pytest.raises(TrainingError):
        fit(tiny_model(), TensorDataset(images * math.nan, labels), device="cuda", precision=precision)


# -- the best, and stopping -------------------------------------------------------------------------------------------------


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """(accuracy, loss) that the evaluations will give, one after the other."""
    given: list[tuple[float, float]] = []
    left: list[Iterator[tuple[float, float]]] = []

    def run(*_: Any, **__: Any) -> dict[str, float]:
        left[:] = left or [iter(given)]
        accuracy, loss = next(left[0])
        return {"accuracy": accuracy, "loss": loss, "images": 1}

    monkeypatch.setattr(evaluation, "run", run)
    return given


def test_best_weights_are_kept_and_training_stops(scores: list[tuple[float, float]]) -> None:
    scores += [(0.2, 3.0), (0.6, 2.0), (0.6, 1.5), (0.5, 1.0), (0.1, 1.0)]
    model, after = tiny_model(), []
    report = fit(
        model, easy_data(32), easy_data(8), epochs=9, patience=3, callbacks=[lambda _: after.append(weights(model))]
    )
    assert report.stopped == "early" and len(report.history) == 5
    assert report.best["epoch"] == 3 and report.best["chosen"] == "best"  # equal accuracy, lower loss
    assert difference(weights(model), after[2]) == 0 and difference(after[2], after[4]) > 0


def test_monitoring_the_loss_or_keeping_the_last(scores: list[tuple[float, float]]) -> None:
    scores += [(0.9, 3.0), (0.1, 1.0), (0.5, 2.0)] * 3
    assert fit(tiny_model(), easy_data(32), easy_data(8), epochs=3, monitor="loss").best["epoch"] == 2
    last = fit(tiny_model(), easy_data(32), easy_data(8), epochs=3, keep="last").best
    assert last["epoch"] == 3 and last["chosen"] == "last"
    with pytest.raises(
        ConfigError, match="monitor is 'f1', which the evaluation does not give; it gives accuracy, loss"
    ):
        fit(tiny_model(), easy_data(32), easy_data(8), monitor="f1")


def test_a_validation_split_is_set_aside_only_when_asked_for() -> None:
    report = fit(tiny_model(), easy_data(40), epochs=1)
    assert report.data["train_images"] == 40 and "val" not in report.data and report.best["chosen"] == "last"
    report = fit(tiny_model(), easy_data(40), epochs=1, keep="best", val_fraction=0.2)
    assert report.data["train_images"] == 32 and report.data["val_images"] == 8


def test_the_set_aside_images_are_not_augmented(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = evaluation.run
    monkeypatch.setattr(evaluation, "run", lambda m, data, *a, **k: (seen.append(data), original(m, data, *a, **k))[1])
    report = fit(
        tiny_model(num_classes=2), open_dataset(image_folder, split="train"), epochs=1, patience=1, augment="crop"
    )
    assert not seen[0].transform.train and report.settings["augment"] == "crop"


# -- evaluation -------------------------------------------------------------------------------------------------------------


def test_evaluate_against_a_direct_computation() -> None:
    model, data = tiny_model(num_classes=7), easy_data(50, classes=7, noise=2)
    images, labels = data.tensors
    with torch.no_grad():
        logits = model(images)
    order = logits.argsort(1, descending=True)
    result = zoo.evaluate(model, data, batch_size=16, per_class=True, record="", **QUIET)
    assert result["accuracy"] == pytest.approx((order[:, 0] == labels).float().mean().item())
    assert result["top5"] == pytest.approx((order[:, :5] == labels[:, None]).any(1).float().mean().item())
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert result["images"] == 50 and model.record == {}
    for c in range(7):
        assert result["per_class"][str(c)] == pytest.approx((order[labels == c, 0] == c).float().mean().item())


def test_evaluate_with_further_metrics_and_no_change_of_mode() -> None:
    class Share:
        """The interface of torchmetrics."""

        def reset(self) -> None:
            self.ones = self.count = 0

        def update(self, outputs: Tensor, targets: Tensor) -> None:
            self.ones += int((outputs.argmax(1) == 1).sum())
            self.count += len(targets)

        def compute(self) -> Tensor:
            return torch.tensor(self.ones / self.count)

    model, data = tiny_model().train(), easy_data(20)
    result = zoo.evaluate(model, data, metrics={"share": Share()}, **QUIET)
    with torch.no_grad():
        assert result["share"] == pytest.approx((model.eval()(data.tensors[0]).argmax(1) == 1).float().mean().item())
    assert model.train().training and "top5" not in result


def test_the_record_of_a_run(image_folder: Path) -> None:
    """What cards are made from; no folder of this machine in it."""
    model = tiny_model(num_classes=2)
    fit(model, image_folder / "train", epochs=6, patience=6)
    result = zoo.evaluate(model, image_folder, split="test", **QUIET)
    name, record = image_folder.name, model.record
    assert record["task"] == "image-classification"
    assert record["data"] == {"name": name, "train": 22, "val": 2, "test": 12}
    assert record["metrics"]["test"] == {"accuracy": result["accuracy"], "loss": result["loss"]}
    assert set(record["metrics"]["val"]) == {"accuracy", "loss"}
    assert record["hyperparameters"]["lr"] == 3e-3 and record["hyperparameters"]["batch_size"] == 16
    assert record["saved_bytes"] == {"default": model.saved_bytes(torch.zeros(16, 3, 8, 8))}
    assert model.classes == ["blue", "red"] and str(image_folder.parent) not in json.dumps(record)
    assert result["accuracy"] > 0.9
