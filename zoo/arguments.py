"""What an argument may be, said once: a table of kinds stands in front of a function, and its body meets plain values only.

    @typed(epochs=whole(1), lr=number(above=0) | NOTHING)
    def fit(model, *, epochs=10, lr=None): ...

    fit(model, epochs=np.int64(3), lr=1)     the body gets 3 and 1.0
    fit(model, epochs="3")                   ConfigError: epochs is '3'; expected a whole number >= 1.
    fit(model, epoch=3)                      ConfigError: zoo.fit has no argument 'epoch'. Did you mean 'epochs'?

Numbers may come as Python's, as numpy's or as tensors of one element. Truth values are no numbers, and text is none.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
import os
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from zoo.errors import ConfigError, ZooError, nearest

__all__ = [
    "ANYTHING",
    "DEVICE",
    "DTYPE",
    "FLAG",
    "FUNCTION",
    "MODEL",
    "NAMES",
    "NOTHING",
    "ONE_OR_MORE",
    "PATH",
    "TEXT",
    "Kind",
    "instance",
    "mapping",
    "number",
    "one_of",
    "shown",
    "typed",
    "whole",
]

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Kind:
    """What a value may be.

    Args:
        words: behind "expected".
        take: value -> the value in its plain form; raises TypeError or ValueError for what it may not be.
        meant: a wrong value -> what was probably meant, as it is to be written, or "".
        others: kinds that will do, too.
    """

    words: str
    take: Callable[[Any], Any]
    meant: Callable[[Any], str] | None = None
    others: tuple[Kind, ...] = ()

    def words_for(self, value: Any) -> str:
        """What is expected in the place of a wrong value."""
        meant = self.meant(value) if self.meant is not None else ""
        own = f"{self.words}, {meant}" if meant else self.words
        return ", or ".join([own, *(other.words_for(value) for other in self.others)])

    def __or__(self, other: Kind) -> Kind:
        """Either of two: the first that takes a value."""

        def take(value: Any) -> Any:
            try:
                return self.take(value)
            except (TypeError, ValueError):
                return other.take(value)

        return Kind(self.words, take, self.meant, (*self.others, other))

    def of(self, name: str, value: Any) -> Any:
        """The plain form of an argument's value.

        Raises:
            ConfigError: it is none; the message names the argument.
        """
        try:
            return self.take(value)
        except ZooError:  # a kind with words of its own
            raise
        except (TypeError, ValueError, OverflowError):
            raise ConfigError(f"{name} is {shown(value)}; expected {self.words_for(value)}.") from None


def shown(value: Any) -> str:
    """A value in a message: its repr, cut; of what has a long one, or none, its type."""
    cut = reprlib.Repr()
    cut.maxstring = cut.maxother = 80
    try:
        text = cut.repr(value)
    except Exception:  # somebody's __repr__
        text = ""
    return text if text and "\n" not in text else f"a {type(value).__name__}"


def _plain(value: Any) -> Any:
    """A number of Python out of one of numpy or torch."""
    value = _alone(value)
    if isinstance(value, (bool, str, bytes, complex)):
        raise TypeError
    return value


def _alone(value: Any) -> Any:
    """What a tensor or an array of one element holds; anything else as it is."""
    shape = getattr(value, "shape", None)
    return value.item() if shape is not None and hasattr(value, "item") and math.prod(shape) == 1 else value


def whole(least: int | None = None, most: int | None = None) -> Kind:
    """A whole number; 3.0 is one."""

    def take(value: Any) -> int:
        value = _plain(value)
        if isinstance(value, float):
            if not value.is_integer():
                raise ValueError
            value = int(value)
        value = operator.index(value)
        if (least is not None and value < least) or (most is not None and value > most):
            raise ValueError
        return value

    bounds = [f">= {least}"] if least is not None else []
    bounds += [f"<= {most}"] if most is not None else []
    return Kind(" ".join(["a whole number", " and ".join(bounds)]).strip(), take)


def number(
    least: float | None = None, most: float | None = None, above: float | None = None, below: float | None = None
) -> Kind:
    """A finite number, as a float."""

    def take(value: Any) -> float:
        value = _plain(value)
        if not isinstance(value, (int, float)):
            raise TypeError
        value = float(value)
        if not math.isfinite(value):
            raise ValueError
        bounds = (least, operator.lt), (most, operator.gt), (above, operator.le), (below, operator.ge)
        if any(limit is not None and outside(value, limit) for limit, outside in bounds):
            raise ValueError
        return value

    words = (("of at least", least), ("above", above), ("at most", most), ("below", below))
    limits = " and ".join(f"{word} {limit:g}" for word, limit in words if limit is not None)
    return Kind(f"a number {limits}".rstrip(), take)


def one_of(*names: str) -> Kind:
    """One of some words."""

    def take(value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            raise ValueError
        return value

    return Kind(f"one of {', '.join(names)}" if len(names) > 2 else " or ".join(repr(n) for n in names), take)


def instance(words: str, *types: type[Any]) -> Kind:
    """An object of one of these classes."""

    def take(value: Any) -> Any:
        if not isinstance(value, types):
            raise TypeError
        return value

    return Kind(words, take)


def mapping(words: str, inner: Kind, least: int = 0) -> Kind:
    """A dict from names to values of a kind, with at least so many entries."""

    def take(value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping) or len(value) < least or not all(isinstance(key, str) for key in value):
            raise TypeError
        return {key: inner.take(v) for key, v in value.items()}

    return Kind(words, take)


def _nothing(value: Any) -> None:
    if value is not None:
        raise TypeError


def _flag(value: Any) -> bool:
    value = _alone(value)
    if not isinstance(value, bool):
        raise TypeError
    return value


def _function(value: Any) -> Any:
    if not callable(value):
        raise TypeError
    return value


def _names(value: Any) -> list[str]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TypeError
    found = list(value)
    if not all(isinstance(name, (str, int)) and not isinstance(name, bool) for name in found):
        raise TypeError
    return [str(name) for name in found]


def _path(value: Any) -> Any:
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value) or "\0" in str(value):
        raise TypeError
    return value


def _device(value: Any) -> Any:
    import torch

    if not isinstance(value, (str, torch.device)):
        raise TypeError
    try:
        torch.device(value)
    except RuntimeError as error:
        raise ValueError from error
    return value


def _dtype(value: Any) -> Any:
    import torch

    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise TypeError
    return found


def _model(value: Any) -> Any:
    if hasattr(value, "parameters_to_train") and hasattr(value, "backbone"):
        return value
    if hasattr(getattr(value, "module", None), "parameters_to_train"):
        raise ConfigError(
            f"model is a {type(value).__name__} around a model; expected the model itself, model.module. Several processes train "
            "together by `accelerate launch`, without a wrapper."
        )
    raise TypeError


ANYTHING = Kind("anything", lambda value: value)
NOTHING = Kind("None", _nothing)
FLAG = Kind("True or False", _flag)
TEXT = instance("text", str)
FUNCTION = Kind("a function", _function)
NAMES = Kind("a list of names", _names, lambda value: f"[{value!r:.60}]" if isinstance(value, str) else "")
ONE_OR_MORE = Kind("a name, or a list of names", lambda value: [value] if isinstance(value, str) else _names(value))
PATH = Kind("a path", _path)
DTYPE = Kind("a floating type such as torch.bfloat16 or 'bfloat16'", _dtype)
MODEL = Kind("a model of zoo.load", _model)
DEVICE = Kind("a device such as 'cpu', 'cuda' or 'cuda:1'", _device)


def typed(**kinds: Kind) -> Callable[[F], F]:
    """Decorator: arguments that are named here arrive in the plain form of their kind.

    Raises:
        ConfigError: of the decorated function, for a value of another kind, and for arguments that it does not have.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        if unknown := set(kinds) - set(signature.parameters):
            raise TypeError(f"{function.__name__} has no {', '.join(sorted(unknown))}")
        open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            own = f"zoo.{function.__name__}"
            if not open_ended and (wrong := [name for name in kwargs if name not in signature.parameters]):
                raise ConfigError(f"{own} has no argument '{wrong[0]}'. {nearest(wrong[0], signature.parameters)}")
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise ConfigError(f"{own}: {error}; it is called {function.__name__}{_call(signature)}.") from None
            for name, value in bound.arguments.items():
                if name in kinds:
                    bound.arguments[name] = kinds[name].of(name, value)
            return function(*bound.args, **bound.kwargs)

        return cast("F", checked)

    return decorate


def _call(signature: inspect.Signature) -> str:
    names = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return f"({', '.join(names)}, ...)"
