"""What goes along with a fit: averages, loggers, the standard logging, the picture of a confusion matrix."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from train_parts import difference, easy_data, fit, tiny_model, weights

import zoo
from zoo.errors import ConfigError, MissingPackageError

QUIET = {"progress": False}


class Follow:
    """The average, worked out beside it."""

    def __init__(self, decay: float) -> None:
        self.decay, self.value, self.count = decay, {}, 0

    def after_step(self, model: Any, step: int) -> None:
        rate = min(self.decay, (1 + self.count) / (10 + self.count))
        self.count += 1
        for name, p in weights(model).items():
            self.value[name] = rate * self.value.get(name, p) + (1 - rate) * p if name in self.value else p


def test_the_model_holds_the_average(tmp_path: Path) -> None:
    follow, plain, model = Follow(0.9), tiny_model(), tiny_model()
    fit(plain, easy_data(32), epochs=4, lr=1e-2)
    fit(model, easy_data(32), epochs=4, lr=1e-2, ema=0.9, callbacks=[follow])
    assert difference(weights(model), follow.value) < 1e-6 < difference(weights(model), weights(plain))


def test_epochs_are_measured_and_chosen_by_the_average() -> None:
    seen: list[dict[str, torch.Tensor]] = []

    class Look:
        def eval_start(self, model: Any) -> None:
            seen.append(weights(model))

    model, val = tiny_model(), easy_data(32, seed=3, noise=3)
    report = fit(model, easy_data(32, noise=3), val, epochs=4, lr=3e-2, ema=0.9, callbacks=[Look()])
    assert difference(weights(model), seen[report.best["epoch"] - 1]) == 0
    measured = zoo.evaluate(model, val, **QUIET)
    assert measured["loss"] == pytest.approx(report.best["val_loss"], rel=1e-5)


def test_averages_survive_a_kill(tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 3, "lr": 1e-2, "ema": 0.9, "checkpoint_every": 1, "batch_size": 8}
    fit(expected := tiny_model(), easy_data(32), **options)

    class Stop:
        def step_end(self, model: Any, step: int) -> None:
            if step == 6:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(tiny_model(), easy_data(32), callbacks=[Stop()], checkpoint=tmp_path, **options)
    fit(model := tiny_model(), easy_data(32), checkpoint=tmp_path, **options)
    assert difference(weights(model), weights(expected)) == 0
    with pytest.raises(ConfigError, match=r"ema was 0\.9, is None"):
        fit(tiny_model(), easy_data(32), checkpoint=tmp_path, **{**options, "ema": None})


@pytest.mark.parametrize("method", ["adalora", "spt", "full"])
def test_averages_of_methods_that_change_on_the_way(method: str) -> None:
    settings: dict[str, Any] = {
        "adalora": {"rank": 3, "target_rank": 2},
        "spt": {"budget": 0.002, "num_batches": 1},
    }.get(method, {})
    model = tiny_model(zoo.adapter(method, **settings))
    report = fit(model, easy_data(32), easy_data(16), epochs=3, batch_size=4, ema=0.9)
    assert zoo.evaluate(model, easy_data(16), **QUIET)["loss"] > 0 and len(report.history) == 3
    if method == "adalora":
        assert sum(model.adapters[method].ranks().values()) <= 2 * len(model.adapters[method].ranks())


# -- loggers ----------------------------------------------------------------------------------------------------------------


def test_tensorboard(tmp_path: Path) -> None:
    accumulators = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    report = fit(tiny_model(), easy_data(32), easy_data(8), epochs=2, loggers="tensorboard", out=tmp_path)
    found: dict[str, list[Any]] = {}
    for file in tmp_path.rglob("events.out*"):
        events = accumulators.EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            found[tag] = events.Scalars(tag)
    assert [e.value for e in found["val_loss"]] == pytest.approx([h["val_loss"] for h in report.history])
    assert [e.step for e in found["val_loss"]] == [2, 4] and (tmp_path / "report.json").is_file()
    assert any("batch_size: 16" in file.read_text() for file in tmp_path.rglob("hparams.yml"))


def test_a_tracker_of_ones_own_and_names_that_are_none() -> None:
    class Tracker:
        def __init__(self) -> None:
            self.told: list[Any] = []

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            self.told.append(values)

        def log(self, values: dict[str, Any], step: int) -> None:
            self.told.append((step, values["loss"]))

        def finish(self) -> None:
            self.told.append("over")

    tracker = Tracker()
    report = fit(tiny_model(), easy_data(32), epochs=2, loggers=tracker)
    assert tracker.told[0]["backbone"] == "vit-micro" and tracker.told[1:] == [
        *((h["step"], h["loss"]) for h in report.history),
        "over",
    ]
    model = tiny_model()
    before = weights(model)
    with pytest.raises(ConfigError, match=r"There is no logger 'tensorbord'\. Did you mean 'tensorboard'"):
        fit(model, easy_data(8), loggers="tensorbord")
    try:
        import aim  # noqa: F401
    except ImportError:
        with pytest.raises(MissingPackageError, match="The logger 'aim' needs its package"):
            fit(model, easy_data(8), loggers=["aim"])
    with pytest.raises(ConfigError, match="loggers is 5; expected names of loggers"):
        fit(model, easy_data(8), loggers=5)
    assert difference(weights(model), before) == 0


def test_lines_go_to_the_standard_logging(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="zoo"):
        fit(tiny_model(), easy_data(32), epochs=2)
    lines = [r.getMessage() for r in caplog.records if r.name == "zoo.train"]
    assert len(lines) == 2 and lines[0].startswith("epoch 1/2   training: loss")


# -- the picture ------------------------------------------------------------------------------------------------------------


def test_confusion_matrix(tmp_path: Path) -> None:
    model, data = tiny_model(), easy_data(32, noise=2)
    result = zoo.evaluate(model, data, confusion=tmp_path / "cm.png", **QUIET)
    images, labels = data.tensors
    with torch.no_grad():
        taken = model.eval()(images).argmax(1)
    expected = [[int(((labels == i) & (taken == j)).sum()) for j in range(4)] for i in range(4)]
    assert result["confusion"] == expected
    with Image.open(tmp_path / "cm.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
    json.dumps(zoo.evaluate(model, data, confusion=True, **QUIET))
    with pytest.raises(ConfigError, match=r"a picture as '\.gif' cannot be written"):
        zoo.evaluate(model, data, confusion="cm.gif", **QUIET)
    with pytest.raises(ConfigError, match="a confusion matrix is one of a classifier"):
        zoo.evaluate(tiny_model(num_classes=1), data, task="regress", confusion=True, **QUIET)
