"""The folder format: damage is named, and a killed or failed save leaves no damage."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from disk_parts import POINT, parts
from safetensors.torch import save_file

from zoo import disk
from zoo.disk.layout import CARD, CONFIG, FILES, METRICS, WEIGHTS
from zoo.errors import ConfigError, SaveError, WeightsError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole saved folder."""
    return disk.write(tmp_path / "saved", *parts())


# -- damaged weights --------------------------------------------------------------------------------------------------


def test_every_truncation_is_noticed(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    for length in [*range(40), *range(40, len(data), 97), len(data) - 1]:
        (folder / WEIGHTS).write_bytes(data[:length])
        with pytest.raises(WeightsError, match=r"truncated|damaged"):
            disk.read(folder)
    (folder / WEIGHTS).write_bytes(data + b"\0")
    with pytest.raises(WeightsError):
        disk.read(folder)


def test_every_flipped_bit_is_noticed(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    rng = np.random.default_rng(0)
    positions = [*range(24), *rng.integers(24, len(data), 400).tolist()]
    for position in positions:
        flipped = bytearray(data)
        flipped[position] ^= 1 << int(rng.integers(8))
        (folder / WEIGHTS).write_bytes(flipped)
        with pytest.raises(WeightsError):
            disk.read(folder)
    (folder / WEIGHTS).write_bytes(data)
    assert not disk.read(folder).recovered


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf(tmp_path: Path, folder: Path, value: float) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    config, tensors, record, card = parts(2.0)
    tensors["head/weight"][1, 2] = value
    with pytest.raises(WeightsError, match=r"tensor 'head/weight' has 1 of 6 values that are NaN or Inf"):
        disk.write(folder, config, tensors, record, card)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    save_file(tensors, folder / WEIGHTS)  # by another program
    with pytest.raises(WeightsError, match=r"tensor 'head/weight' has 1 of 6"):
        disk.read(folder)


def test_tensors_that_nobody_declared(tmp_path: Path) -> None:
    config, tensors, record, card = parts()
    for name in ("lora", "lora/", "other/x", "head"):
        with pytest.raises(WeightsError, match=rf"tensor '{name}'"):
            disk.write(tmp_path / "out", config, {**tensors, name: torch.ones(1)}, record, card)
    assert not (tmp_path / "out").exists()


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickles_are_refused_unread(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    for protocol in range(2, 6):
        (folder / WEIGHTS).write_bytes(pickle.dumps(Bomb(mark), protocol))
        with pytest.raises(WeightsError, match=r"pickle under another name"):
            disk.read(folder)
    for zipped in (True, False):
        torch.save({"x": Bomb(mark)}, folder / WEIGHTS, _use_new_zipfile_serialization=zipped)
        with pytest.raises(WeightsError, match=r"pickle under another name"):
            disk.read(folder)
    (folder / WEIGHTS).write_bytes(pickle.dumps(Bomb(mark), 0))
    with pytest.raises(WeightsError):
        disk.read(folder)
    for suffix in ("bin", "pt", "pth", "pkl", "ckpt"):
        (folder / WEIGHTS).unlink(missing_ok=True)
        (folder / f"adapter_model.{suffix}").write_bytes(pickle.dumps(Bomb(mark)))
        for path in (folder, folder / f"adapter_model.{suffix}"):
            with pytest.raises(WeightsError, match=rf"{suffix}' is a pickle"):
                disk.read(path)
        (folder / f"adapter_model.{suffix}").unlink()
    with pytest.raises(WeightsError, match=r"has no adapter_model.safetensors"):
        disk.read(folder)
    assert not mark.exists()


def test_links_that_leave_the_folder(folder: Path, tmp_path: Path) -> None:
    for name, error in ((WEIGHTS, WeightsError), (CONFIG, ConfigError)):
        outside = tmp_path / f"outside-{name}"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)
        with pytest.raises(error, match=r"link that leads out"):
            disk.read(folder)
        (folder / name).unlink()
        outside.rename(folder / "inside")
        (folder / name).symlink_to("inside")
        assert disk.read(folder).num_classes == 2
        (folder / name).unlink()
        (folder / "inside").rename(folder / name)
    os.mkfifo(folder / "pipe")
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("pipe")  # reading it would wait for ever
    with pytest.raises(WeightsError, match=r"is not a file"):
        disk.read(folder)


# -- saving that fails ------------------------------------------------------------------------------------------------


def contents_for(value: float, folder: Path) -> dict[str, bytes]:
    """The four files of `parts(value)`."""
    made = disk.write(folder, *parts(value))
    return {name: (made / name).read_bytes() for name in FILES}


def whole(saved: disk.SavedAdapter) -> float:
    """Which state was read; every part of it has to say the same."""
    value = saved.tensors[POINT][0, 0].item()
    assert all(torch.equal(saved.tensors[k], v) for k, v in parts(value)[1].items())
    assert saved.adapters[0].config["alpha"] == saved.record["metrics"]["accuracy"] == value
    assert saved.card == f"# card {value}\n"
    return value


def state(folder: Path) -> float:
    """Which state a folder is in, also when its files are copied elsewhere."""
    value = whole(disk.read(folder))
    files = disk.contents(folder)
    disk.write_files(folder.parent / "copy", files)
    assert whole(disk.read(folder.parent / "copy")) == value and not disk.read(folder.parent / "copy").recovered
    return value


def fork(action: Callable[[], object]) -> int:
    """Run in a forked process, which ends there whatever happens; its id."""
    child = os.fork()
    if child == 0:
        status = 3
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return child


def in_child(action: Callable[[], object]) -> int:
    """Run in a forked process; its wait status (the signal that killed it, 0 if all went well)."""
    return os.waitpid(fork(action), 0)[1]


@pytest.fixture
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill, unlike a power cut, does not need the disk to have the data; without waiting for it there is more to see."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.mark.parametrize("cut_off_before", [False, True])
def test_a_kill_at_every_line_leaves_a_whole_adapter(tmp_path: Path, no_sync: None, cut_off_before: bool) -> None:
    """What a kill would leave behind is what the kernel has of the folder at that line, so it is copied at each."""
    one, two = (contents_for(value, tmp_path / f"{value}") for value in (1.0, 2.0))
    before, after = one, two
    if cut_off_before:  # and now somebody returns to the old state
        before, after = {**two, CONFIG: one[CONFIG]}, one
    folder, watched = tmp_path / "target", (disk.write_files.__code__, disk.store._write.__code__)
    disk.write_files(folder, before)
    copies: list[Path] = []

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code not in watched:
            return None
        copies.append(tmp_path / f"copy{len(copies)}")
        shutil.copytree(folder, copies[-1])
        return trace

    old_trace = sys.gettrace()
    sys.settrace(trace)
    try:
        disk.write_files(folder, after)
    finally:
        sys.settrace(old_trace)
    seen = [whole(disk.read(copy)) for copy in copies]
    assert len(seen) > 40 and seen == sorted(seen, reverse=cut_off_before)  # one moment at which old becomes new
    assert set(seen) == {1.0, 2.0} and state(folder) == seen[-1] == (1.0 if cut_off_before else 2.0)
    for copy in copies[:: len(copies) // 10]:
        disk.write_files(copy, one)  # and it can be saved to again
        assert state(copy) == 1.0 and not disk.read(copy).recovered


def test_a_kill_at_any_time_leaves_a_whole_adapter(tmp_path: Path, no_sync: None) -> None:
    folder = disk.write(tmp_path / "target", *parts(0.0))
    rng, seen = np.random.default_rng(0), set()
    for i in range(12):
        child = fork(lambda: [disk.write(folder, *parts(float(v))) for v in range(2000 * i, 2000 * i + 2000)])  # noqa: B023
        try:
            deadline = time.monotonic() + 0.01 + float(rng.random()) * 0.03
            known = len(seen)
            # On a busy machine the writer may not have begun: wait for its first new state before the kill.
            while time.monotonic() < deadline or (len(seen) == known and time.monotonic() < deadline + 30):
                seen.add(whole(disk.read(folder)))  # a reader beside the writer finds whole adapters too
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        seen.add(state(folder))
    assert len(seen) > 10


@pytest.mark.parametrize("limit", [0, 100, 2500])
def test_a_disk_that_is_full_for_real(tmp_path: Path, limit: int) -> None:
    folder = disk.write(tmp_path / "target", *parts(1.0))
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def save_in_little_room() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # the kernel refuses bytes beyond this
        with pytest.raises(SaveError, match=r"File too large.*still whole"):
            disk.write(folder, *parts(2.0))
        with pytest.raises(SaveError):
            disk.write(tmp_path / "new", *parts(2.0))

    assert in_child(save_in_little_room) == 0
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize(("call", "at"), [("fsync", 1), ("replace", 1), ("replace", 2), ("replace", 3), ("replace", 4)])
def test_no_space_at_any_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, at: int) -> None:
    folder = disk.write(tmp_path / "target", *parts(1.0))
    count, real = 0, {"fsync": os.fsync, "replace": Path.replace}[call]

    def fail(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(os if call == "fsync" else Path, call, fail)
    with pytest.raises(SaveError, match=r"No space left on device.*[Ff]ree some space"):
        disk.write(folder, *parts(2.0))
    monkeypatch.undo()
    # Until the weights are renamed the old state is whole, afterwards the new one.
    assert state(folder) == (2.0 if call == "replace" and at > 1 else 1.0)
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)


def test_places_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SaveError, match=r"Could not save"):
        disk.write(tmp_path / "file", *parts())
    folder = disk.write(tmp_path / "target", *parts(1.0))
    before = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    (folder / CARD).unlink()
    (folder / CARD).mkdir()
    with pytest.raises(SaveError, match=r"README.md' is a folder"):
        disk.write(folder, *parts(2.0))
    assert hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest() == before
    assert (tmp_path / "file").read_text() == "x"


def test_what_is_not_json_is_refused(tmp_path: Path) -> None:
    config, tensors, _, card = parts()
    for record in ({"x": float("nan")}, {"x": torch.ones(1)}, {"x": {1, 2}}):
        with pytest.raises(ConfigError, match=r"model.record cannot be written as JSON"):
            disk.write(tmp_path / "out", config, tensors, record, card)
    assert not (tmp_path / "out").exists()


def test_other_files_stay_and_old_leftovers_go(folder: Path) -> None:
    (folder / "report.json").write_text("mine")
    old, new = folder / f".{WEIGHTS}.{'0' * 12}.tmp", folder / f".{WEIGHTS}.{'1' * 12}.tmp"
    for path in (old, new):
        path.write_text("half")
    os.utime(old, (time.time() - 7200,) * 2)
    disk.write(folder, *parts(2.0))
    assert (folder / "report.json").read_text() == "mine"
    assert not old.exists() and new.exists()  # another process may be writing the new one now


def test_metrics_can_be_lost(folder: Path) -> None:
    (folder / METRICS).write_text("{broken")
    (folder / CARD).write_text("my own words")
    saved = disk.read(folder)
    assert saved.record == parts()[2] and saved.card == "my own words" and not saved.recovered


@pytest.mark.parametrize("left", [b"", b"\0" * 700])
def test_a_power_cut_may_empty_the_files_that_are_not_synced(folder: Path, left: bytes) -> None:
    for name in (CONFIG, METRICS, CARD):
        (folder / name).write_bytes(left)
    assert disk.read(folder).recovered and state(folder) == 1.0
    disk.write(folder, *parts(1.0))
    assert not disk.read(folder).recovered and state(folder) == 1.0
