"""Names of classes and of adapters: what is given in another form means the same, or is refused at once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from train_parts import easy_data, fit, tiny_model

import zoo
from zoo.errors import ConfigError, UnknownNameError

SHAPE = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}


def saved(folder: Path) -> zoo.Model:
    model = zoo.load("vit-micro", "lora", pretrained=False, seed=3, classes=["a", "b", "c"], **SHAPE)
    model.save_adapter(folder)
    return model


def loaded(folder: Path, **options: object) -> zoo.Model:
    return zoo.load("vit-micro", folder, pretrained=False, seed=3, **SHAPE, **options)  # type: ignore[arg-type]


def test_a_saved_head_stays_where_its_classes_are_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`zoo.load(adapter=..., classes=<the saved names>)` threw the trained head away in silence; so did its own number."""
    model = saved(tmp_path)
    with torch.no_grad():
        model.head.weight.add_(1.0)
    model.save_adapter(tmp_path)
    with caplog.at_level(logging.WARNING, logger="zoo"):
        for options in ({}, {"classes": ["a", "b", "c"]}, {"num_classes": 3}):
            again = loaded(tmp_path, **options)
            assert torch.equal(again.head.weight, model.head.weight) and again.classes == ["a", "b", "c"], options
        assert not caplog.records
        for options, names in (({"classes": ["a", "c", "b"]}, ["a", "c", "b"]), ({"num_classes": 4}, None)):
            caplog.clear()
            other = loaded(tmp_path, **options)
            assert other.classes == names and other.num_classes == (4 if names is None else 3)
            assert not torch.equal(other.head.weight[:3], model.head.weight)
            assert "a new, untrained head stands in its place" in caplog.text
        caplog.clear()
        assert loaded(tmp_path, num_classes=0).num_classes == 0 and not caplog.records


def test_names_of_classes_are_checked_when_they_are_given() -> None:
    """One name for three outputs, a name twice, and half a surrogate were taken, and broke a save after the training."""
    model = tiny_model(num_classes=3)
    for names, words in (
        (["q"], "classes holds 1 names, and the head has 3 outputs"),
        (["a", "a", "b"], "classes names 'a' twice"),
        (["a", "b", "\ud800"], "no Unicode"),
        ("abc", "expected a list of names"),
        ([None, "a", "b"], "expected a list of names"),
    ):
        with pytest.raises(ConfigError, match=words):
            model.classes = names  # type: ignore[assignment]
        assert model.classes is None
    for names in (["a", "a", "b"], ["a", "\ud800"]):
        with pytest.raises(ConfigError, match=r"twice|no Unicode"):
            zoo.load("vit-micro", pretrained=False, classes=names, **SHAPE)
    with pytest.raises(ConfigError, match="no Unicode"):
        model.reset_head(2, classes=["a", "\udfff"])
    with pytest.raises(ConfigError, match="no Unicode"):
        model.grow_head(["\udfff"])


def test_a_class_that_cannot_be_written_is_refused_before_training() -> None:
    data = zoo.open_dataset(easy_data(16))
    data.classes = ["a", "b", "c", "\ud800"]
    with pytest.raises(ConfigError, match="no Unicode"):
        fit(tiny_model(), data, epochs=1)


def test_one_name_instead_of_a_list(tmp_path: Path) -> None:
    """`record_of("lora")` was that of the adapters l, o, r and a: empty; and `set_record("lora", ...)` was lost."""
    model = tiny_model(["lora", "ssf"])
    model.set_record("lora", {"notes": ["n"]})
    assert model.record_of("lora") == model.record_of(["lora"]) == {"notes": ["n"]}
    model.save_adapter(tmp_path, "lora")
    assert [entry.name for entry in zoo.disk.read(tmp_path).adapters] == ["lora"]


@pytest.mark.parametrize("folder", [None, 5, ""])
def test_a_folder_that_is_none(folder: object) -> None:
    """A TypeError of pathlib."""
    from zoo.exchange.peft import to_peft

    for function in (zoo.Model.save_adapter, to_peft):
        with pytest.raises(ConfigError, match=r"folder is .*; expected a path"):
            function(tiny_model(), folder)  # type: ignore[operator]


def test_a_name_of_an_adapter_that_is_none() -> None:
    model = tiny_model(None)
    with pytest.raises(ConfigError, match="'5' cannot name an adapter"):
        model.add_adapter("lora", 5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="adapter is 5; expected a method's name"):
        model.add_adapter(5)  # type: ignore[arg-type]
    assert not model.adapters


@pytest.mark.parametrize("name", ["train", "half", "cpu", "training", "_modules", "_forward_hooks"])
def test_words_of_torch(name: str) -> None:
    """Those that are of an instance, not of its class, ended in torch's KeyError, with the adapter half attached."""
    model = tiny_model(None)
    expected = model.eval()(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ConfigError, match="a word of torch's own modules"):
        model.add_adapter("lora", name)
    assert not model.adapters and not model._sites and torch.equal(model(torch.zeros(1, 3, 8, 8)), expected)


@pytest.mark.parametrize("width", ["3", 2.5, True, -1, 10**9, [3]])
def test_a_width_that_is_none(width: Any) -> None:
    """A TypeError of `<`, or a head of one class for True."""
    model = tiny_model(None)
    head = model.head
    for call in (lambda: model.add_adapter("lora", num_classes=width), lambda: model.reset_head(width)):
        with pytest.raises(ConfigError, match=r"num_classes is .*; expected a whole number >= 0"):
            call()
    assert model.head is head and not model.adapters and not model._sites


@pytest.mark.parametrize(
    "call", [{"backbone": "x" * 5000}, {"adapter": "y" * 300}, {"adapter": ["lora", Path("z" * 999)]}]
)
def test_a_name_longer_than_any(call: dict[str, Any]) -> None:
    """The file system's own error came out."""
    with pytest.raises(UnknownNameError, match="neither a name here nor a path"):
        zoo.load(**{"backbone": "vit-micro", "pretrained": False, **call})
