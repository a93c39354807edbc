"""A sample of a large product of families and methods that every run takes; the rest is run with `--whole` (`make table`).

Each family meets the methods that ask for each kind of point, each method the families of each shape, and of all other pairs a
fixed share is drawn by the pair's own name, so that neither a new family nor a new method changes what is drawn of the others.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable
from typing import Any

import pytest

FAMILIES = ("vit", "swin", "groupmamba", "ast", "clip", "vl-t5", "dit")  # one of each shape of block
METHODS = ("full", "lora", "adapter", "prefix", "vpt", "ssf")  # one for each kind of point
SHARE = 8  # of all others one in so many


def drawn(family: str, method: str) -> bool:
    """Whether this pair is in every run."""
    return family in FAMILIES or few(family, method)


def few(family: str, method: str) -> bool:
    """Whether a costlier test, which takes a sample of the families above, too, has this pair in every run."""
    if method in METHODS:
        return True
    return zlib.crc32(f"{family}/{method}".encode()) % SHARE == 0


def lots(families: Iterable[str], methods: Iterable[str], always: Collection[str]) -> list[Any]:
    """Each family with a lot of methods as one parameter: those it always meets and a sample, and, marked `rest`, all."""
    methods = list(methods)
    found = []
    for family in families:
        lot = [method for method in methods if method in always or few(family, method)]
        found += [
            pytest.param(family, lot, id=family),
            pytest.param(family, methods, id=f"{family}-all", marks=pytest.mark.rest),
        ]
    return found


def pairs(families: Iterable[str], methods: Iterable[str]) -> list[Any]:
    """All pairs as parameters of a test; those that are not drawn carry the mark `rest`."""
    methods = list(methods)
    return [
        pytest.param(family, method, marks=() if drawn(family, method) else pytest.mark.rest)
        for family in families
        for method in methods
    ]
