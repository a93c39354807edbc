"""Settings are of their types however an adapter or a regime is made: by name, by its class, from a file."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import pytest

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
