"""Regimes: phases, going on where a killed run was, refusals with nothing half done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from train_parts import easy_data, tiny_model

import zoo
from zoo import Phase, Regime
from zoo.data import ImageDataset
from zoo.errors import ConfigError, MismatchError, UnknownNameError
from zoo.regimes import Run, RunReport
from zoo.regimes.running import _opened

FIT: dict[str, Any] = {"batch_size": 16, "lr": 1e-2, "progress": False, "checkpoint_every": 1}


@dataclass(eq=False)
class Grows(Regime):
    """A head phase, a second adapter whose number of heads depends on a measurement, an average, random numbers between."""

    epochs: int = 2
    name: ClassVar[str] = "grows"

    def phases(self, run: Run) -> Iterator[Phase]:
        yield Phase("head", run.data, trained="head", fit={"epochs": 1})
        accuracy = run.evaluate(run.test, "first")["accuracy"]
        run.model.add_adapter(zoo.adapter("lora", rank=1 + (accuracy < 2), dropout=0.2), "second")
        with torch.no_grad():  # random numbers, and a change of what is trained, between two phases
            for p in run.model.adapters["lora"].parameters():
                p.add_(0.01 * torch.randn_like(p))
        yield Phase(
            "second", run.data, trained=("second", "head"), fit={"epochs": self.epochs}, streams={"replay": run.test}
        )
        run.model.set_active("lora")
        yield Phase("back", run.data, fit={"epochs": 1})
        run.evaluate(run.test, "last")

    def summary(self, run: Run) -> dict[str, Any]:
        return {name: run.values[name]["accuracy"] for name in ("first", "last")}


def go(out: Path | None = None, callbacks: Any = None, **options: Any) -> tuple[zoo.Model, RunReport]:
    model = tiny_model(zoo.adapter("lora", dropout=0.2))
    return model, zoo.run(model, Grows(), easy_data(40, noise=2), easy_data(20, seed=1), out=out, fit=FIT, **options)


def everything(model: zoo.Model) -> dict[str, Tensor]:
    parts = [(n, a) for n, a in model.adapters.items()] + [(n, h) for n, h in model.heads.items()]
    return {f"{n}/{k}": v.clone() for n, module in parts for k, v in module.state_dict().items()}


def same(a: zoo.Model, b: zoo.Model) -> bool:
    ours, theirs = everything(a), everything(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def numbers(report: RunReport) -> Any:
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if "second" not in k or k == "second"}
        return [plain(v) for v in value] if isinstance(value, list) else value

    return plain(json.loads(report.to_json())["phases"]), plain(report.values), report.summary


@pytest.fixture(scope="module")
def unbroken() -> tuple[zoo.Model, RunReport]:
    return go()


def test_phases_train_what_they_say(unbroken: tuple[zoo.Model, RunReport]) -> None:
    model, report = unbroken
    head = sum(p.numel() for p in model.head.parameters())
    assert [p["name"] for p in report.phases] == ["head", "second", "back"]
    assert [p["parameters"] for p in report.phases] == [head, head + 2 * 192, head + 8 * 192]
    assert list(model.adapters) == ["lora", "second"] and model.active == ("lora",) and not model.training
    assert all(p.requires_grad for p in model.parameters_to_train().values())
    assert report.summary["last"] == report.values["last"]["accuracy"]
    assert report.table().count("\n") == 4 and report.picture().startswith(b"\x89PNG")


def test_the_state_is_gone_on_from(tmp_path: Path, unbroken: tuple[zoo.Model, RunReport]) -> None:
    """A finished run is only read; nothing is trained or measured again, and the model is the same."""
    model, report = go(tmp_path)
    assert numbers(report) == numbers(unbroken[1]) and same(model, unbroken[0])
    assert {p.name for p in (tmp_path / "001-second").iterdir()} == {"done.safetensors"}
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} == {
        "report.json",
        "report.md",
        "report.png",
        "start.safetensors",
        "state.json",
    }
    before = (tmp_path / "001-second" / "done.safetensors").stat().st_mtime_ns
    again, second = go(tmp_path)
    assert numbers(second) == numbers(report) and same(again, model)
    assert (tmp_path / "001-second" / "done.safetensors").stat().st_mtime_ns == before


SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from pathlib import Path
import zoo
from zoo.train.hooks import Hooks
from test_run import go
steps, count = Path(sys.argv[3]), 0
former = Hooks.step_end

def told(self, step):
    global count
    count += 1
    steps.write_text(str(count))
    former(self, step)

Hooks.step_end = told
go(Path(sys.argv[2]))
"""


def test_kill_minus_nine(tmp_path: Path, unbroken: tuple[zoo.Model, RunReport]) -> None:
    """Killed in the first, in the second and in the third phase; a fourth process finishes."""
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(tmp_path / "run"), str(tmp_path / "step")]
    path = os.pathsep.join([str(Path(__file__).parents[1] / "parts"), str(Path(__file__).parents[2])])
    for kill_at in (2, 4, 4):
        (tmp_path / "step").unlink(missing_ok=True)
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path})
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if (tmp_path / "step").exists() and int((tmp_path / "step").read_text() or 0) >= kill_at:
                break
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was through before it could be killed"
    model, report = go(tmp_path / "run")
    assert numbers(report) == numbers(unbroken[1]) and same(model, unbroken[0])


def test_another_run_is_refused(tmp_path: Path) -> None:
    data, test = easy_data(40, noise=2), easy_data(20, seed=1)
    go(tmp_path)

    def again(**other: Any) -> Any:
        given = {"model": tiny_model(zoo.adapter("lora", dropout=0.2)), "regime": Grows(), "data": data, **other}
        return zoo.run(given["model"], given["regime"], given["data"], test, out=tmp_path, fit=other.get("fit", FIT))

    with pytest.raises(ConfigError, match=r"holds another run: epochs was 2, is 3\. Go on with the same"):
        again(regime=Grows(epochs=3))
    with pytest.raises(ConfigError, match="the data changed"):
        again(data=easy_data(44))
    with pytest.raises(ConfigError, match="the model changed"):
        again(model=tiny_model(zoo.adapter("lora", rank=2)))
    with pytest.raises(ConfigError, match="the fit arguments changed"):
        again(fit={**FIT, "lr": 1e-3})
    with pytest.raises(ConfigError, match="its regime is 'grows'"):
        again(regime=zoo.registry.regime("supervised"))
    state = tmp_path / "state.json"
    state.write_text(state.read_text()[:100])
    with pytest.raises(zoo.ZooError, match="not the state of a run"):
        again()
    assert (
        zoo.run(tiny_model(), "supervised", data, out=tmp_path, resume=False, epochs=1, fit=FIT).phases[0]["epochs"]
        == 1
    )
    assert not (tmp_path / "001-second").exists()


@dataclass(eq=False)
class Wrong(Regime):
    what: str = ""
    name: ClassVar[str] = "wrong"

    def phases(self, run: Run) -> Iterator[Phase]:
        run.model.add_adapter("bitfit", "extra")
        yield Phase("good", run.data, fit={"epochs": 1})
        if self.what == "nothing":
            run.model.set_active()
            run.model.reset_head(0)
            yield Phase("bad", run.data)
        if self.what == "double":
            yield Phase("good", run.data, fit={"epochs": 1})
        if self.what == "once":
            run.once("a", lambda: object())
        if self.what == "rate":
            yield Phase("bad", run.data, fit={"lr": 1.0})
        yield Phase("bad", run.data, trained=None if self.what != "typo" else "hed")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nothing", "'bad' trains nothing: the model has no adapter"),
        ("typo", r"trains nothing called 'hed'\. Did you mean 'head'"),
        ("double", "'good' of 'wrong' is used twice"),
        ("once", "'a' of the regime 'wrong' is not JSON"),
        ("rate", r"'lr' is decided by the regime 'wrong' \(1.0 in 'bad'\)"),
    ],
)
def test_refused_with_nothing_half_done(what: str, message: str) -> None:
    model = tiny_model()
    before, active, classes = everything(model), model.active, model.classes
    with pytest.raises(ConfigError, match=message):
        zoo.run(model, Wrong(what=what), easy_data(32), fit={"lr": 1e-2, "progress": False})
    after = everything(model)
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in after)
    assert model.active == active and model.classes == classes and model.record == {}


def test_a_call_put_right_is_not_refused(tmp_path: Path) -> None:
    """A run that is refused before anything was done leaves no folder that would be another run's."""
    out = tmp_path / "run"
    with pytest.raises(ConfigError, match="'epochs' is decided by the regime"):
        zoo.run(tiny_model(), "supervised", easy_data(8), out=out, fit={"epochs": 2, "progress": False}, epochs=1)
    assert not out.exists()
    zoo.run(tiny_model(), "supervised", easy_data(8), out=out, fit={"progress": False}, epochs=1)
    before = (out / "state.json").read_bytes()
    with pytest.raises(ConfigError, match="epochs was 1, is 2"):
        zoo.run(tiny_model(), "supervised", easy_data(8), out=out, fit={"progress": False}, epochs=2)
    assert (out / "state.json").read_bytes() == before


def test_names_and_settings() -> None:
    assert "supervised" in zoo.list_regimes()
    with pytest.raises(UnknownNameError, match="Did you mean 'supervised'"):
        zoo.run(tiny_model(), "supervized", easy_data(8))
    with pytest.raises(ConfigError, match=r"has no setting 'epoch'\. Did you mean 'epochs'"):
        zoo.run(tiny_model(), "supervised", easy_data(8), epoch=3)
    with pytest.raises(ConfigError, match=r"setting 'epochs' is 2\.5"):
        zoo.run(tiny_model(), "supervised", easy_data(8), epochs=2.5)
    with pytest.raises(ConfigError, match=r"'checkpoint': \.\.\.\} is decided by the regime"):
        zoo.run(tiny_model(), "supervised", easy_data(8), fit={"checkpoint": "x"})


def test_a_run_that_decides_otherwise_is_refused(tmp_path: Path) -> None:
    class Fickle(Grows):
        width: ClassVar[int] = 2

        def phases(self, run: Run) -> Iterator[Phase]:
            run.model.add_adapter(zoo.adapter("lora", rank=self.width), "extra")
            yield Phase("one", run.data, fit={"epochs": 1})

        def summary(self, run: Run) -> dict[str, Any]:
            return {}

    zoo.run(tiny_model(), Fickle(), easy_data(32), out=tmp_path, fit=FIT)
    Fickle.width = 3
    with pytest.raises(MismatchError, match="Phase 0 of the run was 'one' and is now 'one': its model differs"):
        zoo.run(tiny_model(), Fickle(), easy_data(32), out=tmp_path, fit=FIT)


@pytest.mark.parametrize("memory", ["low", "min"])
def test_with_less_memory(memory: str, unbroken: tuple[zoo.Model, RunReport]) -> None:
    """A phase that freezes what is inside a block gives the numbers of one that keeps everything."""
    model = tiny_model(zoo.adapter("lora", dropout=0.2), memory=memory)
    report = zoo.run(model, Grows(), easy_data(40, noise=2), easy_data(20, seed=1), fit=FIT)
    for mine, theirs in zip(report.phases, unbroken[1].phases, strict=True):
        assert [h["loss"] for h in mine["history"]] == pytest.approx([h["loss"] for h in theirs["history"]], rel=1e-4)


def test_command_line(tmp_path: Path, image_folder: Path) -> None:
    from typer.testing import CliRunner

    from zoo.cli import app

    line = ["run", "supervised", "vit-micro", "linear", "--data", str(image_folder), "--split", "train"]
    line += ["--test-split", "test", "-s", "run.epochs=1", "-o", str(tmp_path / "run"), "-q"]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    assert "supervised: 1 phases" in result.output
    assert json.loads((tmp_path / "run" / "report.json").read_text())["settings"] == {"seed": 0, "epochs": 1}
    assert zoo.load(adapter=tmp_path / "run").num_classes > 1
    own = ["run", "lae", "vit-micro", "--data", str(image_folder), "--sessions", "2", "-q", "-s", "run.form=prefix"]
    own += ["--split", "train", "--test-split", "test", "-s", "run.epochs=1", "-s", "run.frozen_epochs=0"]
    result = CliRunner().invoke(app, [*own, "-o", str(tmp_path / "lae")])  # a regime that attaches its own adapter
    assert result.exit_code == 0, result.output
    assert "prefix" in zoo.load(adapter=tmp_path / "lae").adapters
    wrong = CliRunner().invoke(app, [*line[:-2], "-s", "run.epoch=1"])
    assert wrong.exit_code == 1 and "epoch" in wrong.output


@pytest.mark.parametrize("form", [tuple, list, lambda pair: {"image": pair[0], "label": pair[1]}])
def test_a_list_of_pairs_is_one_data_set(form: Any) -> None:
    """And a list of such lists is two."""
    pairs = [form((torch.full((3, 16, 16), i / 8), i % 2)) for i in range(8)]
    for data in (pairs, {"a": pairs, "b": [pairs, pairs]}):
        opened = _opened(tiny_model(num_classes=2), Regime(), data)
        first = opened if data is pairs else opened["a"]
        assert isinstance(first, ImageDataset) and len(first) == 8
        assert data is pairs or [len(part) for part in opened["b"]] == [8, 8]
