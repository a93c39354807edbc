"""Resuming: a run that was cut off anywhere ends with exactly the numbers of an unbroken one."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train_parts import Stop, StopAt, difference, easy_data, fit, tiny_model, weights

import zoo
from zoo.errors import ConfigError, MismatchError, SaveError, WeightsError
from zoo.train import Report

# dropout, momentum, accumulation, a short last batch, a choice among epochs: everything that a checkpoint has to carry
SETTINGS: dict[str, Any] = {
    "epochs": 3,
    "batch_size": 16,
    "accumulate": 2,
    "checkpoint_every": 1,
    "lr": 1e-2,
    "patience": 9,
}


def build() -> zoo.Model:
    return tiny_model(zoo.adapter("lora", dropout=0.2))


def numbers(report: Report) -> list[dict[str, Any]]:
    """The history without what depends on the clock."""
    return [{k: v for k, v in h.items() if "second" not in k} for h in report.history]


@pytest.fixture(scope="module")
def unbroken() -> tuple[Report, dict[str, Tensor]]:
    model = build()
    return fit(model, easy_data(40, noise=2), **SETTINGS), weights(model)


@pytest.mark.parametrize("every", [1, 2, None])
def test_cut_off_after_every_step(
    tmp_path: Path, unbroken: tuple[Report, dict[str, Tensor]], every: int | None
) -> None:
    """Each start goes two steps beyond the checkpoint, until the run is through."""
    options, starts = {**SETTINGS, "checkpoint_every": every, "checkpoint": tmp_path}, 0
    for stop in range(0 if every == 1 else 1, 9, 1 if every == 1 else 3 if every is None else 2):
        with pytest.raises(Stop):
            fit(build(), easy_data(40, noise=2), callbacks=[StopAt(stop)], **options)
        starts += 1
    model = build()
    report = fit(model, easy_data(40, noise=2), **options)
    assert starts >= 3 and numbers(report) == numbers(unbroken[0])
    assert report.best["epoch"] == unbroken[0].best["epoch"]
    assert difference(weights(model), unbroken[1]) == 0
    assert {p.suffix for p in tmp_path.iterdir()} == {".safetensors"} and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("hook", ["eval_start", "epoch_end", "fit_end"])
def test_cut_off_between_epochs(tmp_path: Path, unbroken: tuple[Report, dict[str, Tensor]], hook: str) -> None:
    with pytest.raises(Stop):
        step = -1 if hook != "epoch_end" else 1
        fit(build(), easy_data(40, noise=2), callbacks=[StopAt(step, hook)], checkpoint=tmp_path, **SETTINGS)
    model = build()
    report = fit(model, easy_data(40, noise=2), checkpoint=tmp_path, **SETTINGS)
    assert numbers(report) == numbers(unbroken[0]) and difference(weights(model), unbroken[1]) == 0


def test_a_finished_run_is_only_loaded(tmp_path: Path, unbroken: tuple[Report, dict[str, Tensor]]) -> None:
    fit(build(), easy_data(40, noise=2), checkpoint=tmp_path, **SETTINGS)
    model = build()
    report = fit(model, easy_data(40, noise=2), checkpoint=tmp_path, callbacks=[StopAt(0, "step_start")], **SETTINGS)
    assert difference(weights(model), unbroken[1]) == 0 and numbers(report) == numbers(unbroken[0])


@pytest.mark.parametrize(
    "adapter",
    [
        zoo.adapter("vpt", num_tokens=3, dropout=0.1),
        zoo.adapter("spt", budget=0.002, rank=2, num_batches=2),
        zoo.adapter("full"),
        zoo.adapter("meft", rank=2, dropout=0.1),
        zoo.adapter("petalface", rank=2, threshold=None),
        zoo.adapter("diffora", rank=2, warmup=2, steps=3),
    ],
    ids=["vpt", "spt", "full", "meft", "petalface", "diffora"],
)
def test_other_methods(tmp_path: Path, adapter: zoo.Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a calibration decided is in the checkpoint; it is not made again."""
    options: dict[str, Any] = {"epochs": 2, "batch_size": 16, "checkpoint_every": 1, "keep": "best"}
    whole = fit(expected := tiny_model(adapter), easy_data(48), **options)
    with pytest.raises(Stop):
        fit(tiny_model(adapter), easy_data(48), checkpoint=tmp_path, callbacks=[StopAt(4)], **options)
    model = tiny_model(adapter)
    monkeypatch.setattr(type(adapter), "calibrate", None)
    report = fit(model, easy_data(48), checkpoint=tmp_path, **options)
    assert numbers(report) == numbers(whole) and difference(weights(model), weights(expected)) == 0
    images, _ = easy_data(8, seed=3).tensors
    assert torch.equal(model(images), expected(images))
    assert any(not name.startswith("head/") for name in weights(model))


SCRIPT = """
import sys, torch
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/../parts"]
torch.set_num_threads(1)
from pathlib import Path
from test_train_resume import SETTINGS, build, easy_data, fit

class Tell:
    def step_end(self, model, step):
        Path(sys.argv[3]).write_text(str(step))

fit(build(), easy_data(40, noise=2), checkpoint=sys.argv[2], callbacks=[Tell()], **SETTINGS)
"""


def test_kill_minus_nine(tmp_path: Path, unbroken: tuple[Report, dict[str, Tensor]]) -> None:
    """A process that checkpoints after every step is killed twice, at whatever it is doing; a third one finishes."""
    steps = tmp_path / "step"
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(tmp_path / "run"), str(steps)]
    for kill_at in (2, 5):
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if steps.exists() and (text := steps.read_text()) and int(text) >= kill_at:
                break
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was through before it could be killed"
    model = build()
    report = fit(model, easy_data(40, noise=2), checkpoint=tmp_path / "run", **SETTINGS)
    assert numbers(report) == numbers(unbroken[0]) and difference(weights(model), unbroken[1]) == 0


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    options = {"epochs": 1, "checkpoint": tmp_path}
    fit(tiny_model(), easy_data(32), **options)
    with pytest.raises(ConfigError, match=r"of another run: lr was 0.003, is 0.1\. Resume with the same settings"):
        fit(tiny_model(), easy_data(32), **{**options, "lr": 0.1})
    with pytest.raises(ConfigError, match="the data changed"):
        fit(tiny_model(), easy_data(36), **options)
    with pytest.raises(MismatchError, match="adapters lora; this one has bitfit"):
        fit(tiny_model("bitfit"), easy_data(32), **options)
    with pytest.raises(ConfigError, match=r"of another run: lora: rank was 8, is 4\. Resume with the same settings"):
        fit(tiny_model(zoo.adapter("lora", rank=4)), easy_data(32), **options)
    report = fit(tiny_model(), easy_data(36), resume=False, **options)
    assert report.images == 36


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    options = {"epochs": 1, "checkpoint": tmp_path}
    fit(tiny_model(), easy_data(32), **options)
    file = tmp_path / "last.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="not a whole checkpoint"):
        fit(tiny_model(), easy_data(32), **options)
    file.write_bytes(b"\x80\x04" + whole[2:])
    with pytest.raises(WeightsError, match="not a whole checkpoint"):
        fit(tiny_model(), easy_data(32), **options)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit(expected := build(), easy_data(40, noise=2), **SETTINGS)
    done = []

    def full(descriptor: int) -> None:
        done.append(descriptor)
        if len(done) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(SaveError, match="No space left on device"):
        patch.setattr(os, "fsync", full)
        fit(build(), easy_data(40, noise=2), checkpoint=tmp_path, **SETTINGS)
    assert not list(tmp_path.glob(".*"))
    model = build()
    assert numbers(fit(model, easy_data(40, noise=2), checkpoint=tmp_path, **SETTINGS)) == numbers(whole)
    assert difference(weights(model), weights(expected)) == 0


class Growing:
    """Attached as a callback would be, but with parameters of its own, as IncreLoRA has: one more every second step."""

    def __init__(self, model: zoo.Model) -> None:
        self.parts = nn.ParameterList()
        model.adapters["lora"].register_module("growing", self.parts)
        self.model = model
        model.adapters["lora"].extra_state = self.extra_state
        model.adapters["lora"].load_extra_state = self.load_extra_state
        self.score = torch.zeros(3)

    def fit_start(self, model: zoo.Model, optimizer: Any, total_steps: int) -> None:
        self.optimizer = optimizer

    def extra_loss(self, model: zoo.Model, outputs: Tensor, targets: Tensor) -> Tensor | None:
        return sum(((p - outputs.mean()) ** 2).sum() for p in self.parts) if len(self.parts) else None

    def after_backward(self, model: zoo.Model, step: int) -> None:
        self.score = 0.9 * self.score + torch.rand(3)  # the shared random stream, and a state that is no buffer
        if step % 2 == 1:
            self.parts.append(nn.Parameter(self.score + torch.rand(3)))
            self.optimizer.add({f"lora/growing.{len(self.parts) - 1}": self.parts[-1]}, warmup=1)

    def extra_state(self) -> dict[str, Any]:
        return {"count": len(self.parts), "score": self.score, "nested": [{"a": 1.5}, None]}

    def load_extra_state(self, model: zoo.Model, state: dict[str, Any]) -> None:
        assert state["nested"] == [{"a": 1.5}, None]
        while len(self.parts) < state["count"]:
            self.parts.append(nn.Parameter(torch.zeros(3)))
        self.score = state["score"]


@pytest.mark.parametrize("stop", [3, 4])
def test_a_method_that_grows(tmp_path: Path, stop: int) -> None:
    def go(**options: Any) -> tuple[Report, dict[str, Tensor]]:
        model = build()
        growing = Growing(model)
        callbacks = [growing, *options.pop("callbacks", [])]
        report = fit(model, easy_data(40), callbacks=callbacks, epochs=2, checkpoint_every=1, **options)
        return report, weights(model)

    whole, expected = go()
    assert sum(name.startswith("lora/growing") for name in expected) == 3
    with pytest.raises(Stop):
        go(checkpoint=tmp_path, callbacks=[StopAt(stop)])
    report, final = go(checkpoint=tmp_path)
    assert numbers(report) == numbers(whole) and difference(final, expected) == 0


@pytest.mark.parametrize("steps", [1, 7, 8, 9])
def test_steps_that_ended_in_the_middle_of_an_epoch(tmp_path: Path, steps: int) -> None:
    """The rest of the epoch comes first: batches of 40 items are 16, 16 and 8, three to an epoch.

    With a schedule that does not know where a run ends, both are the same run: weights, history, items that were seen.
    """
    options: dict[str, Any] = {"batch_size": 16, "lr": 1e-2, "schedule": "constant", "warmup": 0.0, "keep": "last"}
    whole = fit(expected := build(), easy_data(40, noise=2), steps=11, **options)
    fit(build(), easy_data(40, noise=2), steps=steps, checkpoint=tmp_path, **options)
    report = fit(model := build(), easy_data(40, noise=2), steps=11, checkpoint=tmp_path, **options)
    assert difference(weights(model), weights(expected)) == 0
    assert numbers(report) == numbers(whole) and report.images == whole.images
    assert report.settings["changes"][-1]["step"] == steps
