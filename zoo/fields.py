"""Fields of dataclasses of settings, and the types that they are annotated with."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from typing import Any

from zoo.errors import ConfigError

__all__ = ["check_fields", "fits", "other_type"]


def fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of the type that a field of a dataclass is annotated with."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, h) for h in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin in (tuple, list):
        inner = [h for h in typing.get_args(hint) if h is not Ellipsis]
        return isinstance(value, (list, tuple)) and all(any(fits(v, h) for h in inner) for v in value)
    if origin is dict:
        return isinstance(value, dict)
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint if origin is None else origin)


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


_found = functools.lru_cache(maxsize=512)(typing.get_type_hints)


def hints_of(cls: type) -> dict[str, Any]:
    """`typing.get_type_hints`, which compiles every annotation, once for each class; nobody changes what is given."""
    return _found(cls)


def _hints(cls: type) -> dict[str, Any]:
    try:
        return hints_of(cls)
    except NameError:  # a class inside of a function, whose annotations name what only that function knows
        return {}


def other_type(where: str, value: Any, hint: Any) -> str:
    """The words for a value of another type."""
    several = isinstance(value, str) and any(
        typing.get_origin(h) in (tuple, list) for h in (hint, *typing.get_args(hint))
    )
    how = f": a list, on the command line [{value}]" if several else ""
    return f"{where} is {value!r} ({type(value).__name__}); expected {_name(hint)}{how}."


def check_fields(settings: Any, where: str) -> None:
    """Raise ConfigError unless every field of a dataclass is of its type; `where` has {} for the field's name."""
    hints = _hints(type(settings))  # type: ignore[arg-type]
    for field in dataclasses.fields(settings):
        value, hint = getattr(settings, field.name), hints.get(field.name, Any)
        if not fits(value, hint):
            raise ConfigError(other_type(where.format(field.name), value, hint))
