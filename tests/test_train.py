"""`zoo.fit` and `zoo.evaluate`: against a loop written by hand, hooks, choice of the best, settings, errors."""

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
from test_data import encoded, write_parquet
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from train_parts import CLASSES, difference, easy_data, tiny_model, weights

import zoo
from zoo.data import open_dataset
from zoo.errors import ConfigError, DataError, MismatchError
from zoo.tasks import Classify
from zoo.train import Report, TrainingError, evaluation, training_hooks
from zoo.train.batches import BatchPlan, make_loader
from zoo.train.schedule import factor, layer_scales

QUIET = {"progress": False}


def fit(model: zoo.Model, train: Any, val: Any = None, **options: Any) -> Report:
    return zoo.fit(model, train, val, **{"epochs": 2, "batch_size": 16, "lr": 3e-3, **QUIET, **options})


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
    assert report.settings["optimizer"] == "<lambda>"


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


# -- hooks ----------------------------------------------------------------------------------------------------------------


class Recorder:
    """Notes the hooks in their order, and looks at gradients and weights on the way."""

    needs_calibration = True

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.weight: Tensor | None = None

    def calibrate(self, model: zoo.Model, batches: Any) -> None:
        self.calls.append("calibrate")
        first, again = next(iter(batches)), next(iter(batches))
        assert torch.equal(first[0], again[0]) and first[0].shape[1:] == (3, 8, 8)

    def fit_start(self, model: zoo.Model, optimizer: Any, total_steps: int) -> None:
        self.calls.append(("fit_start", total_steps))
        self.optimizer = optimizer

    def epoch_start(self, model: zoo.Model, epoch: int) -> None:
        self.calls.append(("epoch_start", epoch))

    def step_start(self, model: zoo.Model, step: int) -> None:
        self.calls.append(("step_start", step))
        assert model.training and not model.backbone.training
        assert all(p.grad is None for p in model.parameters_to_train().values())
        assert sum(len(targets) for _, targets in self.optimizer.batches) in (16, 8)

    def extra_loss(self, model: zoo.Model, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls.append(("extra_loss", len(outputs)))
        return 100 * model.head.weight.sum()

    def after_backward(self, model: zoo.Model, step: int) -> None:
        self.calls.append(("after_backward", step))
        assert float(model.head.weight.grad.mean()) == pytest.approx(100, abs=1)  # not clipped; counted once over parts
        self.weight = model.head.weight.detach().clone()

    def after_step(self, model: zoo.Model, step: int) -> None:
        self.calls.append(("after_step", step))
        assert model.head.weight.grad is not None and self.weight is not None
        assert not torch.equal(model.head.weight, self.weight)

    def step_end(self, model: zoo.Model, step: int) -> None:
        self.calls.append(("step_end", step))
        assert model.head.weight.grad is None

    def epoch_end(self, model: zoo.Model, epoch: int) -> None:
        self.calls.append(("epoch_end", epoch))

    def eval_start(self, model: zoo.Model) -> None:
        self.calls.append("eval_start")

    def eval_end(self, model: zoo.Model) -> None:
        self.calls.append("eval_end")

    def fit_end(self, model: zoo.Model) -> None:
        self.calls.append("fit_end")


def test_hooks_are_called_in_order() -> None:
    recorder, records = Recorder(), []
    fit(tiny_model(), easy_data(24), easy_data(8), epochs=1, accumulate=2, callbacks=[recorder, records.append])

    def one(step: int, parts: list[int]) -> list[Any]:
        extra = [("extra_loss", n) for n in parts]
        return [("step_start", step), *extra, ("after_backward", step), ("after_step", step), ("step_end", step)]

    assert recorder.calls == [
        "calibrate",
        ("fit_start", 2),
        ("epoch_start", 0),
        *one(0, [8, 8]),
        *one(1, [4, 4]),
        ("epoch_end", 0),
        "eval_start",
        "eval_end",
        "fit_end",
    ]
    assert len(records) == 1 and records[0]["extra_loss"] != 0


def test_an_adapters_hooks_are_called_only_while_it_is_active(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(["lora", "bitfit"])
    seen = []
    for name, adapter in model.adapters.items():
        monkeypatch.setattr(adapter, "step_start", lambda model, step, name=name: seen.append(name), raising=False)
    fit(model, easy_data(16), epochs=1)
    assert seen == ["lora", "bitfit"]
    model.set_active("bitfit")
    fit(model, easy_data(16), epochs=1)
    assert seen == ["lora", "bitfit", "bitfit"]


def test_hooks_in_ones_own_loop() -> None:
    model, recorder = tiny_model(), Recorder()
    images, labels = easy_data(16).tensors
    hooks = training_hooks(model, [recorder])
    hooks.calibrate([(images, labels)])
    optimizer = torch.optim.SGD(model.parameters_to_train().values(), lr=0.1)
    hooks.fit_start(optimizer, 1)
    model.train()
    recorder.optimizer.batches = [(images, labels)]
    hooks.step_start(0)
    outputs = model(images)
    (F.cross_entropy(outputs, labels) + hooks.extra_loss(outputs, labels)).backward()
    hooks.after_backward(0)
    optimizer.step()
    hooks.after_step(0)
    optimizer.zero_grad(set_to_none=True)
    hooks.step_end(0)
    hooks.fit_end()
    assert [c if isinstance(c, str) else c[0] for c in recorder.calls] == [
        *("calibrate", "fit_start", "step_start", "extra_loss", "after_backward", "after_step", "step_end", "fit_end")
    ]


def test_eval_end_is_called_after_an_error() -> None:
    model, recorder = tiny_model(), Recorder()
    with pytest.raises(RuntimeError, match="inside"), training_hooks(model, [recorder]).evaluation():
        raise RuntimeError("inside")
    assert recorder.calls == ["eval_start", "eval_end"]


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


# -- bad input --------------------------------------------------------------------------------------------------------------


def test_nan_stops_before_the_weights_are_touched() -> None:
    images, labels = easy_data(48).tensors
    images[int(BatchPlan(48, 16).order(0)[20])] = math.nan
    model, after = tiny_model(), []
    with pytest.raises(TrainingError, match=r"The loss became NaN or infinite at step 1 .*Lower lr"):

        class Copy:
            def step_end(self, model: zoo.Model, step: int) -> None:
                after.append(weights(model))

        fit(model, TensorDataset(images, labels), callbacks=[Copy()])
    assert len(after) == 1 and difference(weights(model), after[0]) == 0


def test_corrupt_images_are_counted(tmp_path: Path) -> None:
    images = [encoded(60 * (i % 4)) if i not in (3, 8) else b"" for i in range(12)]
    file = write_parquet(tmp_path / "x.parquet", [i % 4 for i in range(12)], images)
    with pytest.raises(DataError, match=r"row [38]: the image is empty"):
        fit(tiny_model(), file)
    data = open_dataset(file, on_error="skip")
    report = fit(tiny_model(), data, batch_size=4)
    assert sorted(place.rpartition(" ")[2] for place in report.skipped) == ["3", "8"]
    assert zoo.evaluate(tiny_model(), data, **QUIET)["skipped"] == 2


def test_unreadable_images_do_not_thin_the_mean(tmp_path: Path) -> None:
    """A batch of 8 of which 4 cannot be read gives the step of a batch of 4."""
    good = [encoded(60 * i) for i in range(4)]
    lenient = open_dataset(
        write_parquet(tmp_path / "a.parquet", [0, 1, 2, 3] * 2, [*good, *[b""] * 4]), on_error="skip"
    )
    models = tiny_model(), tiny_model()
    for model, data, size in (
        (models[0], lenient, 8),
        (models[1], write_parquet(tmp_path / "b.parquet", [0, 1, 2, 3], good), 4),
    ):
        fit(model, data, batch_size=size, epochs=1, optimizer="sgd", clip=None, augment="none")
    assert difference(weights(models[0]), weights(models[1])) < 1e-6


def test_classes_that_do_not_fit() -> None:
    model = tiny_model(num_classes=4)
    with pytest.raises(MismatchError, match=r"has 3 classes, the model's head 4\. Load the model with num_classes=3"):
        fit(model, easy_data(12, classes=3))

    class Silent(Dataset[Any]):
        """Does not tell its labels beforehand."""

        def __len__(self) -> int:
            return 4

        def __getitem__(self, i: int) -> Any:
            return torch.zeros(3, 8, 8), i + 2

    with pytest.raises(DataError, match=r"a label 5 is outside the model's 4 classes \(0..3\)"):
        fit(model, Silent())
    with pytest.raises(DataError, match="a label 5 is outside"):
        zoo.evaluate(model, Silent(), **QUIET)
    with pytest.raises(ConfigError, match="no classification head"):
        fit(tiny_model(num_classes=0), easy_data(8))


def test_classes_in_another_order(image_folder: Path) -> None:
    model = tiny_model(num_classes=2)
    train = open_dataset(image_folder, split="train", classes=["red", "blue"])
    fit(model, train, epochs=1)
    assert model.classes == ["red", "blue"]
    with pytest.raises(MismatchError, match="Class 0 is 'red' for the model, 'blue' in the data set"):
        zoo.evaluate(model, image_folder / "test", **QUIET)
    with pytest.raises(MismatchError, match="Class 0 is 'red'"):
        fit(model, train, image_folder / "test")


def test_nothing_to_train() -> None:
    with pytest.raises(ConfigError, match="nothing to train"):
        fit(tiny_model(None, num_classes=0), easy_data(8), loss=lambda o, t: o.sum())
    with pytest.raises(ConfigError, match=r"float16, too coarse"):
        fit(tiny_model().to(torch.float16), easy_data(8))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"epochs": 0}, "epochs is 0; expected a whole number >= 1"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"lr": -1.0}, "lr is -1.0; expected numbers above 0"),
        ({"lr": {"lorra": 1e-3}}, "lr has an entry 'lorra' that fits no trained parameter. Did you mean 'lora'"),
        ({"precision": "fp8"}, "precision is 'fp8'; expected one of fp32, bf16, fp16"),
        ({"optimizer": "adamm"}, "optimizer is 'adamm'"),
        ({"optimizer_options": {"beta": 1}}, "does not take these options"),
        ({"schedule": "cosin"}, "Unknown schedule 'cosin'. Did you mean 'cosine'"),
        ({"keep": "first"}, "keep is 'first'"),
        ({"accumulate": 17}, r"accumulate is 17; expected at most batch_size \(16\)"),
        ({"layer_decay": 2.0}, "layer_decay is 2.0"),
        ({"warmup": -1}, "warmup is -1"),
        ({"device": "cuda"}, "torch sees no CUDA GPU"),
    ],
)
def test_settings_out_of_range(setting: dict[str, Any], words: str) -> None:
    if setting.get("device") and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=words):
        fit(tiny_model(), easy_data(16), **setting)


# -- learning rates, batches ------------------------------------------------------------------------------------------------


def test_schedules() -> None:
    assert [factor("constant", s, 10, 3) for s in (0, 2, 3, 9)] == [0.25, 0.75, 1, 1]
    assert [factor("linear", s, 10) for s in (0, 5, 10)] == [1, 0.5, 0]
    assert [factor("cosine", s, 12, 2) for s in (2, 7, 12)] == pytest.approx([1, 0.5, 0])


def test_layer_decay_by_block_and_stage() -> None:
    names = [
        "bitfit/patch_embed.bias",
        "lora/stages.0.blocks.0.attn.q.lora_a",
        "lora/stages.1.blocks.0.attn.q.lora_a",
        "lora/stages.1.blocks.10.mlp.up.lora_a",
        "lora/stages.1.blocks.2.mlp.up.lora_a",
        "bitfit/norm.bias",
        "head/weight",
    ]
    scales = layer_scales(names, 0.5)
    assert [scales[n] for n in names] == [0.5**5, 0.5**4, 0.5**3, 0.5**1, 0.5**2, 1, 1]


def test_learning_rates_of_groups() -> None:
    seen = {}

    class Look:
        def fit_start(self, model: zoo.Model, optimizer: Any, total_steps: int) -> None:
            optimizer.set_lr()
            seen.update({name: optimizer.current_lr(name) for name in optimizer.parameters})

    fit(
        tiny_model(),
        easy_data(16),
        epochs=1,
        warmup=0,
        lr={"lora": 1e-2, "head": 1e-3, "lora/*.1.*": 1e-4},
        callbacks=[Look()],
    )
    for name, lr in seen.items():
        assert lr == pytest.approx(1e-3 if name.startswith("head/") else 1e-4 if "blocks.1" in name else 1e-2)
    fit(
        tiny_model(["bitfit", "full"][:1]),
        easy_data(16),
        epochs=1,
        warmup=0,
        lr=None,
        layer_decay=0.5,
        callbacks=[Look()],
    )
    blocks = {n: lr for n, lr in seen.items() if n.startswith("bitfit/blocks")}
    assert all(lr == pytest.approx(1e-3 * (0.5 if ".1." in n else 0.25)) for n, lr in blocks.items()) and blocks


def test_batches_are_the_same_for_any_number_of_processes_and_workers(image_folder: Path) -> None:
    model = tiny_model(num_classes=2)
    data = Classify().open(model, image_folder / "train", train=True)  # random crops and flips
    cpu = torch.device("cpu")

    def epoch(world: int, parts: int, workers: int) -> dict[int, Tensor]:
        plans = [BatchPlan(24, 9, parts=parts, rank=r, world=world) for r in range(world)]
        for plan in plans:
            plan.epoch = 3
        loaders = [iter(make_loader(data, plan, workers=workers, device=cpu)) for plan in plans]
        collected = []
        for _ in range(3):
            pieces: dict[int, Any] = {}
            for part in range(parts):
                for rank, loader in enumerate(loaders):
                    pieces[part * world + rank] = next(loader)
            collected.append(torch.cat([pieces[i].inputs for i in sorted(pieces) if pieces[i].count]))
        return dict(enumerate(collected))

    alone = epoch(1, 1, 0)
    assert [len(x) for x in alone.values()] == [9, 9, 6]
    for arrangement in ((2, 1, 0), (1, 3, 0), (2, 2, 0), (7, 1, 0), (1, 2, 2)):
        assert all(torch.equal(a, b) for a, b in zip(alone.values(), epoch(*arrangement).values(), strict=True))


def test_the_middle_of_an_epoch() -> None:
    whole, rest = BatchPlan(20, 4, seed=5), BatchPlan(20, 4, seed=5)
    whole.epoch = rest.epoch = 2
    rest.start = 3
    assert list(whole)[3:] == list(rest) and sorted(i for batch in whole for _, i in batch) == list(range(20))
