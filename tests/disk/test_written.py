"""Folders that an earlier version wrote load unchanged: the same settings, the same tensors to the bit, the same answers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from written_folders import FOLDERS, WRITTEN, fill, numbers

import zoo
from zoo import disk
from zoo.disk.layout import CONFIG, WEIGHTS
from zoo.table import tiny_model

EXPECTED: dict[str, list[float]] = json.loads((WRITTEN / "expected.json").read_text())


def same(model: Any, name: str) -> None:
    """What the model would save is what the folder holds, but for settings that came later."""
    stored = load_file(WRITTEN / name / WEIGHTS)
    config = json.loads((WRITTEN / name / CONFIG).read_text())
    (entry,) = config["adapters"]
    adapter = model.adapters[entry["name"]]
    settings, tensors = adapter.saved()
    assert {k: settings[k] for k in entry["config"]} == entry["config"] and adapter.plan == entry["plan"]
    found = {f"{entry['name']}/{k}": v for k, v in tensors.items()}
    if config["head"] is not None:
        found |= {f"head/{k}": v for k, v in model.head.state_dict().items()}
        assert model.classes == config["head"]["classes"]
    assert found.keys() == stored.keys()
    assert all(torch.equal(v, stored[k]) and v.dtype == stored[k].dtype for k, v in found.items())


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_an_earlier_version(name: str, tmp_path: Any) -> None:
    family, method, _ = FOLDERS[name]
    model, _ = tiny_model(family)
    fill(model.backbone)
    model.fingerprint = None
    assert disk.attach(model, disk.read(WRITTEN / name)) == [method]
    same(model, name)
    assert numbers(model) == pytest.approx(EXPECTED[name], rel=1e-4, abs=2e-6)
    again = disk.read(model.save_adapter(tmp_path / "again"))  # and what this version writes of it
    old = disk.read(WRITTEN / name)
    assert again.tensors.keys() == old.tensors.keys()
    assert all(torch.equal(again.tensors[k], v) for k, v in old.tensors.items())


@pytest.mark.parametrize("name", FOLDERS)
def test_by_name_alone(name: str) -> None:
    """The folder knows its backbone and its size."""
    same(zoo.load(adapter=WRITTEN / name, pretrained=False), name)


def test_every_folder_is_read() -> None:
    assert {p.name for p in WRITTEN.iterdir() if p.is_dir()} == set(FOLDERS) == set(EXPECTED)
