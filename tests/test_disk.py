"""The folder format: what is written comes back to the bit, damage is named, and a killed save leaves no damage."""

from __future__ import annotations

import errno
import hashlib
import json
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
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import zoo
from zoo import disk
from zoo.errors import ConfigError, MismatchError, SaveError, UnknownNameError, WeightsError, ZooError
from zoo.layout import CARD, CONFIG, FILES, METRICS, WEIGHTS

SMALL = {"pretrained": False, "depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32}
POINT = "lora/blocks.0.attn.q.lora_a"


def parts(value: float = 1.0) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, Any], str]:
    """Config, tensors, record and card of a made-up adapter in which everything says `value`."""
    config = {
        "backbone": {"name": "vit-ti16", "fingerprint": "v1:ab", "kwargs": {"img_size": 32}},
        "adapters": [{"name": "lora", "method": "lora", "config": {"rank": 2, "alpha": value}, "plan": None}],
        "head": {"num_classes": 2, "classes": ["cat", "dog"]},
    }
    tensors = {
        POINT: torch.full((2, 300), value),
        "lora/blocks.1.norm1.scale": torch.full((7,), value, dtype=torch.bfloat16),
        "lora/steps": torch.tensor(int(value)),
        "head/weight": torch.full((2, 3), value, dtype=torch.float16),
    }
    return config, tensors, {"metrics": {"accuracy": value}}, f"# card {value}\n"


def small_model(seed: int = 0, adapter: Any = "lora", **options: Any) -> zoo.Model:
    """A tiny ViT, the same for the same seed, whose trainable values are random and not those of its start."""
    torch.manual_seed(seed)
    model = zoo.load("timm:vit_tiny_patch16_224", adapter=adapter, **{"num_classes": 3, **SMALL, **options})
    with torch.no_grad():
        for parameter in model.parameters_to_train().values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole saved folder."""
    return disk.write(tmp_path / "saved", *parts())


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the config by hand."""
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


# -- round trips ------------------------------------------------------------------------------------------------------


def test_what_is_written_comes_back(folder: Path) -> None:
    config, tensors, record, card = parts()
    saved = disk.read(folder)
    assert {k: v.dtype for k, v in saved.tensors.items()} == {k: v.dtype for k, v in tensors.items()}
    assert all(torch.equal(saved.tensors[k], v) for k, v in tensors.items())
    assert saved.adapter_tensors("lora").keys() == {"blocks.0.attn.q.lora_a", "blocks.1.norm1.scale", "steps"}
    assert saved.head_tensors().keys() == {"weight"}
    assert (saved.backbone_name, saved.fingerprint, saved.backbone_kwargs) == ("vit-ti16", "v1:ab", {"img_size": 32})
    assert [(a.name, a.method, a.config) for a in saved.adapters] == [("lora", "lora", config["adapters"][0]["config"])]
    assert (saved.num_classes, saved.classes, saved.record, saved.card) == (2, ["cat", "dog"], record, card)
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)
    # the files are what they say, for anybody's reader
    assert load_file(folder / WEIGHTS).keys() == tensors.keys()
    with safe_open(folder / WEIGHTS, framework="np") as file:
        assert np.array_equal(file.get_tensor("head/weight"), np.ones((2, 3), np.float16))
    assert json.loads((folder / METRICS).read_text()) == record


def test_tensors_that_share_storage_or_are_strided(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "a/x": base,
        "a/y": base,
        "a/t": base.T,
        "a/row": base[1],
        "a/none": torch.empty(0, 4),
        "a/z": base[0, 3],
    }
    config = {**parts()[0], "adapters": [{"name": "a", "method": "lora", "config": {}, "plan": None}], "head": None}
    saved = disk.read(disk.write(tmp_path / "out", config, tensors))
    assert all(torch.equal(saved.tensors[k], v) for k, v in tensors.items())
    assert saved.num_classes is None and saved.record == {} and not saved.has_head


def test_a_model_comes_back_to_the_bit(tmp_path: Path) -> None:
    model = small_model(adapter=["lora", "bitfit"])
    model.classes = ["a", "b", "c"]
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    model.save_adapter(tmp_path / "out")
    torch.manual_seed(0)
    loaded = zoo.load(adapter=tmp_path / "out", pretrained=False)
    assert (
        torch.equal(loaded(x), expected) and loaded.classes == ["a", "b", "c"] and loaded.active == ("lora", "bitfit")
    )
    model.save_adapter(tmp_path / "one", ["bitfit"])
    assert [a.name for a in disk.read(tmp_path / "one").adapters] == ["bitfit"]
    torch.manual_seed(0)
    one = zoo.load(adapter=tmp_path / "one", pretrained=False)
    model.set_active("bitfit")
    assert torch.equal(one(x), model(x)) and not torch.equal(one(x), expected)


def test_two_saved_adapters_with_heads_of_their_own(tmp_path: Path) -> None:
    first, second = small_model(), small_model(num_classes=5)
    first.save_adapter(tmp_path / "first")
    second.save_adapter(tmp_path / "second")
    torch.manual_seed(0)
    both = zoo.load(adapter=[tmp_path / "first", tmp_path / "second"], pretrained=False)
    x = torch.randn(2, 3, 32, 32)
    names = list(both.adapters)
    for name, model in zip(names, (first, second), strict=True):
        both.set_active(name)
        assert torch.equal(both(x), model(x))
        both.save_adapter(tmp_path / "again")
        assert torch.equal(disk.read(tmp_path / "again").head_tensors()["weight"], model.head.weight)


def test_saving_again_and_saving_nothing(tmp_path: Path) -> None:
    model = small_model()
    before = {p: p.stat().st_mtime_ns for p in model.save_adapter(tmp_path / "out").iterdir()}
    model.save_adapter(tmp_path / "out")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before  # unchanged files are left alone
    model.set_active()
    with pytest.raises(ConfigError, match=r"No adapter is active.*lora"):
        model.save_adapter(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"no adapter named 'lore'.*'lora'"):
        model.save_adapter(tmp_path / "none", ["lore"])
    assert not (tmp_path / "none").exists()


# -- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dim": 96}, r"belongs to|other weights"),
        ({"depth": 3}, r"other weights"),
        ({}, r"other weights of 'timm:vit_tiny_patch16_224'"),
    ],
)
def test_another_backbone_is_refused_and_nothing_stays(tmp_path: Path, change: dict[str, int], message: str) -> None:
    small_model().save_adapter(tmp_path / "out")
    torch.manual_seed(1)
    model = zoo.load("timm:vit_tiny_patch16_224", num_classes=4, **{**SMALL, **change})
    head, x = model.head, torch.randn(1, 3, 32, 32)
    logits = model(x)
    with pytest.raises(MismatchError, match=message):
        disk.attach(model, disk.read(tmp_path / "out"))
    assert not model.adapters and model.head is head and torch.equal(model(x), logits)


def test_width_depth_and_settings_are_told_apart_without_a_fingerprint(tmp_path: Path) -> None:
    small_model().save_adapter(tmp_path / "out")
    saved = disk.read(tmp_path / "out")
    for change in ({"embed_dim": 96}, {"depth": 3}, {"depth": 1}):
        model = zoo.load("timm:vit_tiny_patch16_224", num_classes=4, **{**SMALL, **change})
        model.fingerprint = None
        head = model.head
        with pytest.raises(MismatchError, match=r"tensor '.*' has shape"):
            disk.attach(model, saved)
        assert not model.adapters and model.head is head and model.num_classes == 4
    other = zoo.load("timm:deit_tiny_patch16_224", num_classes=4, **SMALL)
    other.fingerprint = None
    with pytest.raises(MismatchError, match=r"belongs to the backbone 'timm:vit_tiny_patch16_224'"):
        disk.attach(other, saved)
    edit(tmp_path / "out", lambda c: c["adapters"][0]["config"].update(rank=3))
    torch.manual_seed(0)
    with pytest.raises(MismatchError, match=r"its settings were changed"):
        zoo.load(adapter=tmp_path / "out", pretrained=False)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: c["adapters"][0]["config"].pop("rank"), ConfigError, r"adapters\[0\].config.*rank"),
        (lambda c: c["adapters"][0]["config"].update(rnak=3), ConfigError, r"no setting 'rnak'.*rank"),
        (lambda c: c["adapters"][0]["config"].update(rank="8"), ConfigError, r"'rank' is '8'.*expected int"),
        (lambda c: c["adapters"][0].update(method="lorra"), UnknownNameError, r"no adapter method 'lorra'.*lora"),
    ],
)
def test_settings_of_the_method(tmp_path: Path, change: Any, error: type[ZooError], message: str) -> None:
    small_model().save_adapter(tmp_path / "out")
    edit(tmp_path / "out", change)
    torch.manual_seed(0)
    with pytest.raises(error, match=message):
        zoo.load(adapter=tmp_path / "out", pretrained=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("backbone"), r"lacks the field 'backbone' \(an object\)"),
        (lambda c: c["backbone"].pop("name"), r"lacks the field 'backbone.name' \(a string\)"),
        (lambda c: c["adapters"][0].pop("method"), r"lacks the field 'adapters\[0\].method'"),
        (lambda c: c.pop("head"), r"lacks the field 'head' \(an object or null\)"),
        (lambda c: c.pop("checksum"), r"lacks the field 'checksum'"),
        (lambda c: c.update(backbones={}), r"unknown field 'backbones'.*'backbone'"),
        (lambda c: c["head"].update(width=3), r"unknown field 'head.width'"),
        (lambda c: c.update(adapters={}), r"'adapters' is \{\} \(dict\), expected a list"),
        (lambda c: c["adapters"].append(3), r"'adapters\[1\]' is 3 \(int\), expected an object"),
        (lambda c: c["backbone"].update(name=3), r"'backbone.name' is 3 \(int\), expected a string"),
        (lambda c: c["head"].update(num_classes=True), r"'head.num_classes' is True \(bool\), expected a whole number"),
        (lambda c: c["head"].update(num_classes=0), r"'head.num_classes' is 0"),
        (lambda c: c["head"].update(classes=["a"]), r"'head.classes' is 1 entries, expected 2 strings"),
        (lambda c: c["head"].update(classes=["a", 1]), r"'head.classes'"),
        (lambda c: c["adapters"][0].update(name="../x"), r"'adapters\[0\].name' is '../x'"),
        (lambda c: c["adapters"][0].update(name="head"), r"'adapters\[0\].name' is 'head'"),
        (lambda c: c["adapters"].append(c["adapters"][0]), r"'adapters\[1\].name'.*no name twice"),
        (lambda c: c.update(format_version=2), r"format_version 2; .* reads up to 1. Upgrade"),
        (lambda c: c.update(format_version="1"), r"'format_version' is '1' \(str\)"),
        (lambda c: c.update(format_version=0), r"'format_version' is 0"),
        (lambda c: c.update(peft_type="LORA"), r"peft's format"),
    ],
)
def test_fields_of_the_config(folder: Path, change: Any, message: str) -> None:
    edit(folder, change)
    with pytest.raises(ConfigError, match=message):
        disk.read(folder)


@pytest.mark.parametrize("text", [b" ", b'{"format_version": 1', b"[1]", b"\xff\xfe", b'{"x": NaN}', b"[" * 100_000])
def test_a_config_that_is_none(folder: Path, text: bytes) -> None:
    (folder / CONFIG).write_bytes(text)
    with pytest.raises(ConfigError, match=CONFIG):
        disk.read(folder)


def test_what_is_no_folder_of_ours(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"no folder"):
        disk.read(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"is a file"):
        disk.read(folder / CONFIG)
    (folder / CONFIG).unlink()
    with pytest.raises(ConfigError, match=r"has no adapter_config.json"):
        disk.read(folder)


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
    folder, watched = tmp_path / "target", (disk.write_files.__code__, disk._write.__code__)
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
