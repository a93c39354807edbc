"""Names of inputs: transformers' networks take any, and read those that they know."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import cache

import torch
from torch import nn

from zoo.errors import ConfigError, nearest
from zoo.library import library

__all__ = ["check_names"]


def check_names(name: str, module: nn.Module | None, given: Iterable[str], spare: Iterable[str] = ()) -> None:
    """Raise ConfigError for an input that would be taken, and not read.

    Args:
        name: of the backbone. module: whose forward gets them; None where nothing but the first input is handed on.
        spare: what is known besides.
    """
    if torch.compiler.is_compiling():
        return
    names = () if module is None else _names(type(module))  # type: ignore[arg-type]
    known = {*names, *spare}
    if wrong := [word for word in given if word not in known]:
        hint = nearest(wrong[0], sorted(known)) if known else "It reads its first input alone."
        raise ConfigError(f"'{name}' has no input '{wrong[0]}'. {hint}")


@cache
def _names(kind: type[nn.Module]) -> frozenset[str]:
    rest = library("transformers", "multimodal").utils.TransformersKwargs.__annotations__
    return frozenset({*inspect.signature(kind.forward).parameters, *rest} - {"self", "kwargs"})
