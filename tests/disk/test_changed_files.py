"""Folders that somebody changed, damaged or wrote to while they were read: refused by name, or read as one save left them."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from disk_parts import edit, parts, small_model

import zoo
from zoo import disk
from zoo.disk.layout import CARD, CONFIG, METRICS, WEIGHTS, pack, unpack
from zoo.errors import ConfigError, MismatchError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA with a head and class names."""
    model = small_model(adapter=zoo.adapter("lora", rank=2, dropout=0.1))
    model.classes = ["ant", "bee", "cat"]
    return model.save_adapter(tmp_path_factory.mktemp("saved") / "out")


def loaded(folder: Path) -> zoo.Model:
    model = small_model(adapter=None)
    disk.attach(model, disk.read(folder))
    return model


def copy(saved: Path, folder: Path) -> Path:
    return disk.write_files(folder, disk.contents(saved)) or folder


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "adapters[0].config.alpha": lambda c: c["adapters"][0]["config"].update(alpha=99.0),
    "adapters[0].config.dropout": lambda c: c["adapters"][0]["config"].update(dropout=0.5),
    "adapters[0].config.rslora": lambda c: c["adapters"][0]["config"].update(rslora=True),
    "adapters[0].config.targets": lambda c: c["adapters"][0]["config"].update(targets=["v", "q"]),
    "head.classes[0]": lambda c: c["head"]["classes"].reverse(),
    "head.classes": lambda c: c["head"].update(classes=None),
    "head.kind": lambda c: c["head"].update(kind="cosine"),
    "adapters[0].name": lambda c: c["adapters"][0].update(name="other"),
    "adapters[0].plan": lambda c: c["adapters"][0].update(plan={"a": 1}),
    "backbone.fingerprint": lambda c: c["backbone"].update(fingerprint=None),
    "backbone.name": lambda c: c["backbone"].update(name="vit-s16"),
    "backbone.kwargs.img_size": lambda c: c["backbone"]["kwargs"].update(img_size=16),
    "zoo_version": lambda c: c.update(zoo_version="0.0.1"),
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_config_that_was_changed_after_the_save(saved: Path, tmp_path: Path, field: str) -> None:
    """Settings that no shape shows (alpha, the order of classes, the head's kind) loaded, and the model answered otherwise."""
    folder = copy(saved, tmp_path / "out")
    edit(folder, CHANGES[field], sign=False)
    with pytest.raises(ConfigError) as error:
        zoo.load(adapter=folder, pretrained=False)
    assert CONFIG in str(error.value) and ("changed after" in str(error.value) or "adapters[0]" in str(error.value))
    if "changed after" in str(error.value):
        assert f"'{field}" in str(error.value)
    (folder / CONFIG).write_bytes(b"")  # as the message says
    x = torch.randn(2, 3, 32, 32)
    one, two = loaded(folder).eval(), loaded(saved).eval()
    assert torch.equal(one(x), two(x)) and one.classes == two.classes == ["ant", "bee", "cat"]


def test_the_layout_of_a_config_does_not_matter(saved: Path, tmp_path: Path) -> None:
    """Order of keys and white space are no change."""
    folder = copy(saved, tmp_path / "out")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(dict(reversed(config.items()))))
    assert disk.read(folder).classes == ["ant", "bee", "cat"] and not disk.read(folder).recovered


WRONG: dict[str, Any] = {
    "metrics as a list": {"metrics": [1]},
    "metrics as a number": {"metrics": 3},
    "data as text": {"data": "birds"},
    "a name as a number": {"data": {"name": 3}},
    "a licence as a list": {"data": {"name": "x", "license": ["mit"]}},
    "an address as an object": {"data": {"name": "x", "url": {}}},
    "notes as text": {"notes": "one note"},
    "notes of numbers": {"notes": [1]},
    "tables as an object": {"tables": {"a": 1}},
    "a table without rows": {"tables": [{"columns": ["a"]}]},
    "a ragged table": {"tables": [{"columns": ["a", "b"], "rows": [[1]]}]},
    "seconds as text": {"seconds": "long"},
    "seconds as truth": {"seconds": True},
    "bytes as text": {"saved_bytes": "3 MB"},
    "bytes of text": {"saved_bytes": {"default": "3"}},
    "hyperparameters as a list": {"hyperparameters": [1]},
    "a task as a number": {"task": 3},
    "a device as a list": {"device": ["cpu"]},
    "a licence as a number": {"license": 3},
    "a lone surrogate": {"notes": ["\ud800"]},
    "a lone surrogate in a key": {"hyperparameters": {"\udfff": 1}},
    "a lone surrogate, deep": {"anything": [[{"x": ["\udc00"]}]]},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_damaged_record(saved: Path, tmp_path: Path, wrong: str) -> None:
    """It loaded, and saving the model again raised AttributeError, TypeError or UnicodeEncodeError."""
    folder = copy(saved, tmp_path / "out")
    (folder / METRICS).write_text(json.dumps(WRONG[wrong]))
    model = loaded(folder)  # the copy in the weights file is whole
    assert model.save_adapter(tmp_path / "again").is_dir()
    tensors, held, _ = unpack((folder / WEIGHTS).read_bytes(), folder / WEIGHTS)
    try:
        data, digest = pack(held["config"], WRONG[wrong], held["card"], tensors)
    except (UnicodeEncodeError, ConfigError):
        return  # no such file can be made here
    (folder / WEIGHTS).write_bytes(data)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "checksum": digest}))
    with pytest.raises(ConfigError, match=r"expected|no Unicode"):
        loaded(folder)


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_record_is_not_written(tmp_path: Path, wrong: str) -> None:
    model = small_model()
    model.record = WRONG[wrong]
    with pytest.raises(ConfigError, match=r"expected|no Unicode"):
        model.save_adapter(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def writer(folder: Path, values: list[float]) -> int:
    """A process that saves the same states again and again."""
    child = os.fork()
    if child == 0:
        try:
            os.fsync = lambda handle: None  # more to see
            while True:
                for value in values:
                    disk.write(folder, *parts(value))
        finally:
            os._exit(1)
    return child


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs forked processes")
def test_two_processes_that_save_into_one_folder(tmp_path: Path) -> None:
    """One in nine reads gave the record or the card of one save with the weights of the other."""
    folder = disk.write(tmp_path / "out", *parts(0.0))
    children = [writer(folder, [1.0, 2.0]), writer(folder, [3.0, 4.0])]
    seen: list[float] = []
    try:
        deadline = time.monotonic() + 30
        while len(seen) < 60 or (len(set(seen)) < 4 and time.monotonic() < deadline):
            found = disk.read(folder)
            value = found.adapters[0].config["alpha"]
            assert found.record == {"metrics": {"accuracy": value}} and found.card == f"# card {value}\n"
            assert all(torch.equal(found.tensors[k], v) for k, v in parts(value)[1].items())
            seen.append(value)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    assert len(set(seen)) > 2
    disk.write(folder, *parts(7.0))  # a killed writer's lock is gone with it
    assert disk.read(folder).record == {"metrics": {"accuracy": 7.0}}
    assert sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) == sorted(
        [WEIGHTS, METRICS, CARD, CONFIG]
    )


def by_numpy(p: torch.Tensor) -> None:
    p.detach().numpy()[...] += 0.1


WAYS: dict[str, Callable[[torch.Tensor], Any]] = {
    "load through data": lambda p: p.data.copy_(p.data + 0.1),
    "another tensor": lambda p: setattr(p, "data", p.data + 0.1),
    "an initialiser": lambda p: torch.nn.init.normal_(p.data),
    "numpy": by_numpy,
    "in place": lambda p: p.data.add_(0.1),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_backbone_whose_numbers_were_changed_by_hand(tmp_path: Path, way: str) -> None:
    """What is written through `.data` or numpy counts in no version, and the adapter loaded onto the package's weights."""
    model = small_model()
    first = model.save_adapter(tmp_path / "first")
    for parameter in model.backbone.parameters():
        WAYS[way](parameter)
    second = model.save_adapter(tmp_path / "second")
    loaded(first)
    with pytest.raises(MismatchError, match="other weights"):
        loaded(second)


def test_a_backbone_that_was_only_rounded(tmp_path: Path) -> None:
    """Loading in half precision is no change of weights, and neither is having been there and back."""
    model = small_model()
    model.to(torch.bfloat16)
    loaded(model.save_adapter(tmp_path / "half"))
    loaded(model.float().save_adapter(tmp_path / "back"))


def test_numbers_and_names_that_no_file_can_hold(saved: Path, tmp_path: Path) -> None:
    """1e999 in a record loaded as infinity and could not be saved; a lone surrogate in a class name failed while saving."""
    folder = copy(saved, tmp_path / "out")
    (folder / METRICS).write_text('{"hyperparameters": {"lr": 1e999}}')
    assert loaded(folder).save_adapter(tmp_path / "again").is_dir()
    (folder / CONFIG).write_text((folder / CONFIG).read_text().replace("0.1", "1e999"))
    with pytest.raises(ConfigError, match="range of numbers"):
        loaded(folder)
    model = small_model()
    with pytest.raises(ConfigError):
        model.classes = ["a", "b", "\ud800"]
        model.save_adapter(tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
