"""The folder format: what is written comes back to the bit, and what does not fit is refused. See also test_disk_damage.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from disk_parts import SMALL, edit, parts, small_model
from safetensors import safe_open
from safetensors.torch import load_file

import zoo
from zoo import disk
from zoo.disk.layout import CONFIG, FILES, METRICS, WEIGHTS
from zoo.errors import ConfigError, MismatchError, UnknownNameError, ZooError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole saved folder."""
    return disk.write(tmp_path / "saved", *parts())


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
