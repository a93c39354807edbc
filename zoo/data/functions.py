"""What a function of the user's is, as one short text: its name, and a digest of its code and of what it computes with.

Equal texts in two processes mean the same loss, augmentation or optimizer, as far as that can be seen: constants, values that it
closes over or finds in its file, tensors (class weights) bit by bit, settings of objects, and the functions of its own file that
it calls. Left out is what may change while it runs: lists and the like where its code fills some, what it writes to, tensors that
are trained, models with their adapters.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["about_function", "about_object"]

_KEPT = (bool, int, float, str)
_PLAIN = (*_KEPT, complex, bytes, type(None))
_FILLED = (list, dict, set)
_FILLING = {"append", "appendleft", "extend", "insert", "pop", "clear", "update", "setdefault", "add", "remove"}
_OURS = ("adapters", "attach")  # of models and adapters, which are noted elsewhere
_DEPTH = 6  # of objects within objects


def about_function(function: Callable[..., Any]) -> str:
    """The name of a function with a digest of its code and of what it computes with."""
    if isinstance(function, functools.partial):
        held = [v for v in (*function.args, *function.keywords.values()) if not isinstance(v, _PLAIN)]
        words = _without_addresses(f"{function.args!r}{function.keywords!r}")
        return f"{about_function(function.func)}{words}{_rest(held)}"
    if isinstance(function, type):
        return function.__name__
    code = getattr(function, "__code__", None)
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    if code is None:
        attributes = getattr(function, "__dict__", {})
        held_plain = {k: v for k, v in attributes.items() if isinstance(v, _KEPT)}
        rest = (
            [function] if isinstance(function, nn.Module) else [v for v in attributes.values() if type(v) not in _PLAIN]
        )
        return f"{name}{held_plain or ''}{_rest(rest)}"
    cells = _cells(function)
    kept = [v for v in (*cells, *(function.__defaults__ or ())) if isinstance(v, _KEPT)]  # type: ignore[attr-defined]
    rest = [v for v in _held(function) if not isinstance(v, _KEPT)]
    return f"{name} {hashlib.blake2b(f'{_code(code)}{kept!r}'.encode(), digest_size=6).hexdigest()}{_rest(rest)}"


def about_object(value: Any) -> str:
    """What an object says of itself, with a digest of functions in it, and of what says nothing of itself."""
    return f"{_without_addresses(repr(value))}{_rest(_untold(value, _DEPTH))}"


def _untold(value: Any, depth: int) -> Iterable[Any]:
    """What a text of an object does not tell apart. Its own words are taken for its settings, some of which change in use."""
    if isinstance(value, (functools.partial, Tensor, np.ndarray)) or hasattr(value, "__code__"):
        yield value
    elif depth and isinstance(value, (list, tuple)):
        for part in value:
            yield from _untold(part, depth - 1)
    elif depth and not isinstance(value, (type, *_PLAIN)) and hasattr(value, "__dict__"):
        if type(value).__repr__ is object.__repr__:  # type: ignore[comparison-overlap]
            yield value
        else:
            children = value.children() if isinstance(value, nn.Module) else ()
            for part in (*(v for _, v in _public(value)), *children):
                yield from _untold(part, depth - 1)


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _cells(function: Any) -> list[Any]:
    found = []
    for cell in getattr(function, "__closure__", None) or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # a function that is defined later
            continue
    return found


def _held(function: Any) -> Iterable[Any]:
    """What a function computes with besides its arguments and the constants in its code."""
    own, stored, fills = getattr(function, "__globals__", {}), *_writes(function.__code__)
    named = [(name, own[name]) for name in sorted(_names(function.__code__)) if name in own and name not in stored]
    yield from (v for v in _cells(function) if not (fills and isinstance(v, _FILLED)))
    yield from function.__defaults__ or ()
    yield from (getattr(function, "__kwdefaults__", None) or {}).items()
    if (of := getattr(function, "__self__", None)) is not None:
        yield of
    for name, value in named:
        if isinstance(value, (*_KEPT, tuple, Tensor, np.ndarray)) or (isinstance(value, _FILLED) and not fills):
            yield name, value
        elif hasattr(value, "__code__") and getattr(value, "__module__", "") == function.__module__:
            yield value  # of its own file; others are a library's


def _writes(code: CodeType) -> tuple[set[str], bool]:
    """Global names that code writes to, and whether it may fill a list or the like."""
    stored, fills = set[str](), bool(_FILLING & {*code.co_names})
    for step in dis.get_instructions(code):
        fills = fills or step.opname in ("STORE_SUBSCR", "DELETE_SUBSCR")
        if step.opname == "STORE_GLOBAL":
            stored.add(str(step.argval))
    for inner in (c for c in code.co_consts if isinstance(c, CodeType)):
        more, also = _writes(inner)
        stored, fills = stored | more, fills or also
    return stored, fills


def _names(code: CodeType) -> set[str]:
    inner = [_names(c) for c in code.co_consts if isinstance(c, CodeType)]
    return set(code.co_names).union(*inner)


def _code(code: CodeType) -> str:
    constants = [
        _code(c) if isinstance(c, CodeType) else repr(sorted(c, key=repr)) if isinstance(c, frozenset) else repr(c)
        for c in code.co_consts
    ]  # a set is written down in another order in each process
    return f"{code.co_code.hex()}{constants}{code.co_names}"


def _rest(values: Iterable[Any]) -> str:
    """A digest of values that their text does not tell apart; "" where there are none."""
    digest, seen = hashlib.blake2b(digest_size=6), set[int]()
    noted = [_note(digest, value, seen, _DEPTH) for value in values]
    return f" {digest.hexdigest()}" if any(noted) else ""


def _note(digest: Any, value: Any, seen: set[int], depth: int) -> bool:
    """Add a value to a digest; whether there was anything in it."""
    if isinstance(value, (Tensor, np.ndarray)):
        return _note_numbers(digest, value)
    if isinstance(value, _PLAIN):
        digest.update(repr(value).encode())
        return True
    if id(value) in seen or depth == 0 or isinstance(value, type) or any(hasattr(value, n) for n in _OURS):
        return False
    seen.add(id(value))
    parts: Iterable[Any]
    if isinstance(value, Mapping):
        parts = [part for pair in value.items() for part in pair]
    elif isinstance(value, (list, tuple)):
        parts = value
    elif isinstance(value, (set, frozenset)):
        parts = sorted(value, key=repr)
    elif isinstance(value, functools.partial):
        parts = [value.func, *value.args, *value.keywords.items()]
    elif (code := getattr(value, "__code__", None)) is not None:
        parts = [_code(code), *_held(value)]
    elif isinstance(value, nn.Module):
        parts = [_public(value), [*value.named_parameters(recurse=False)], [*value.named_buffers(recurse=False)]]
        parts += value.named_children()
    elif type(value).__module__.partition(".")[0] in sys.stdlib_module_names or not hasattr(value, "__dict__"):
        parts = []
    else:
        parts = [_public(value)]
    digest.update(f"{type(value).__qualname__}(".encode())
    noted = [_note(digest, part, seen, depth - 1) for part in parts]
    digest.update(b")")
    return any(noted)


def _public(value: Any) -> list[tuple[str, Any]]:
    """Attributes by name; of a module those that are its user's."""
    own = [(k, v) for k, v in sorted(vars(value).items()) if not k.startswith("__")]
    return [(k, v) for k, v in own if not (isinstance(value, nn.Module) and (k == "training" or k.startswith("_")))]


def _note_numbers(digest: Any, value: Tensor | np.ndarray) -> bool:
    digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
    if isinstance(value, np.ndarray):
        digest.update(repr(value.tolist()).encode() if value.dtype == object else np.ascontiguousarray(value).tobytes())
    elif not (value.requires_grad or value.is_meta or value.layout is not torch.strided):
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return True
