"""Settings are of their types however an adapter or a regime is made: by name, by its class, from a file."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import pytest
import torch
from method_models import METHODS, bare, each, images, shake, targets

import zoo
from zoo.errors import ConfigError
from zoo.fields import fits
from zoo.registry import adapter_class, regime_class


def classes() -> list[Any]:
    found = [adapter_class(name) for name in zoo.list_adapters()]
    return found + [regime_class(name) for name in zoo.list_regimes()]


@pytest.mark.parametrize("cls", classes(), ids=lambda cls: cls.__name__)
def test_wrong_types_are_named(cls: Any) -> None:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        for wrong in ("x", 1.5, [b""], b"x", True):
            if not fits(wrong, hints[field.name]):
                with pytest.raises(ConfigError, match=rf"{field.name}'? is .*; expected"):
                    cls(**{field.name: wrong})


def test_one_text_in_the_place_of_a_list() -> None:
    with pytest.raises(
        ConfigError, match=r"'tasks' is 'a,b' .str.; expected .*: a list, on the command line \[a,b\]\.$"
    ):
        zoo.adapter("polyhistor-lite", tasks="a,b")


@each
def test_what_could_never_act_is_refused(method: str) -> None:
    """A factor of 0 in front of all that is learned: the head alone would be trained, and nothing said so."""
    cls = METHODS[method]
    if "vit" not in cls.trial_families:
        pytest.skip("has no points on a ViT")
    for field in dataclasses.fields(cls):
        if type(field.default) not in (int, float) or field.default == 0:
            continue
        model = bare("vit")
        try:
            adapter = model.add_adapter(zoo.adapter(method, **{**cls.trial, field.name: type(field.default)(0)}))
            if adapter.needs_calibration:
                adapter.calibrate(model, [(images(), targets())])
        except zoo.ZooError:
            continue
        before = model(images())
        shake(model, method)
        assert not torch.equal(model(images()), before), f"{field.name}=0"


@pytest.mark.parametrize("setting", ["alpha", "beta"])
def test_keys_that_no_vote_depends_on(setting: str) -> None:
    with pytest.raises(ConfigError, match=f"{setting} is 0"):
        zoo.adapter("tip-adapter-f", **{setting: 0.0})
    zoo.adapter("tip-adapter", **{setting: 0.0})
