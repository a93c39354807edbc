"""What a saved adapter may ask of the machine that loads it: a backbone from a known source, with options from a closed list.

An adapter's config names a backbone and the options that it was built with. Both come from whoever wrote the file, so

- a backbone of a source that is registered here, or in the backbone's own library, is built without asking (`Backbone.known`);
  any other (somebody's Hub repository, a folder) needs the user's word, and nothing is downloaded before;
- options are looked up in the family's closed list (`Backbone.saved_options`): sizes, widths, towers, checked by type and
  range. Options that say what is read, from where and how (`checkpoint_path`, `weights_only`, `pretrained_cfg_overlay`, a file of
  weights) are on no list, also not for a trusted backbone;
- a backbone whose options make it several times larger than the named one is refused before it takes memory.

A user who types the backbone's name and options has given his word by that. What he names is read as tensors only, too
(`zoo.library.only_tensors`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from zoo import registry
from zoo.errors import ConfigError, TrustError, nearest

MAX_LIST = 4096  # entries of a list among the options
ROOM = 50_000_000  # parameters that a backbone may always have, and
GROWTH = 4  # how many times those of the named one


def check_backbone(
    name: str, options: Mapping[str, Any], where: Path, trust: bool | str = False, *, kind: str = "adapter"
) -> None:
    """Raise unless a saved adapter (or a file of another `kind`) may have this backbone built.

    Args:
        name, options: what the file says. where: the file, for messages.
        trust: True, or the name of the one backbone that the user trusts.

    Raises:
        TrustError: the backbone is of an unknown source, and not trusted. ConfigError: an option that is not on the family's
        list, of another type, or out of range.
    """
    if not isinstance(trust, (bool, str)):
        raise ConfigError(f"trust_backbone is {trust!r}; expected True, False, or the name of the backbone to trust.")
    known = registry.known_backbone(name)
    if not known and re.search(r"[:/\\]", name) and trust is not True and trust != name:
        raise TrustError(
            f"The {kind} in '{where}' names the backbone '{name}', which is none of a source registered here: somebody's "
            "repository or folder. Nothing of it was downloaded or read. If you trust it, say so: trust_backbone=True (or "
            f"trust_backbone={name!r}, this one alone; on the command line --trust-backbone)."
        )
    cls, _ = registry.find_backbone(name)
    check_options(cls.saved_options, options, where, name)


def check_options(
    allowed: Mapping[str, Any], options: Mapping[str, Any], where: Path, name: str, path: str = ""
) -> None:
    """Raise ConfigError for an option that is not in a family's closed list, or does not fit it."""
    for key, value in options.items():
        if key not in allowed:
            raise ConfigError(
                f"'{where}' gives the backbone '{name}' the option '{path}{key}', which is none that a file may give: those are "
                f"sizes and the like, never what is read and how. {nearest(key, allowed)} If it is yours, name the backbone "
                f"and its options yourself: zoo.load('{name}', adapter=..., {path.partition('.')[0] or key}=...)."
            )
        if value is None:
            continue
        kind = allowed[key]
        if isinstance(kind, Mapping):
            if not isinstance(value, Mapping):
                _wrong(where, path + key, value, "an object")
            check_options(kind, value, where, name, f"{path}{key}.")
        else:
            expected = _expected(kind, value)
            if expected is not None:
                _wrong(where, path + key, value, expected)


def _wrong(where: Path, name: str, value: Any, expected: str) -> None:
    raise ConfigError(
        f"'{where}': the backbone's option '{name}' is {value!r:.80} ({type(value).__name__}), expected {expected}. Correct it, "
        "or download the folder again."
    )


def _expected(kind: Any, value: Any) -> str | None:
    """What was expected in place of `value`; None if it fits. Kinds: see `Backbone.saved_options`."""
    if isinstance(kind, range):
        fits = _all(value, lambda v: isinstance(v, int) and not isinstance(v, bool) and v in kind)
        return None if fits else f"a whole number from {kind.start} to {kind.stop - 1}, or a list of them"
    if kind is float:
        fits = _all(value, lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 1e9)
        return None if fits else "a number, or a list of them"
    if kind is bool:
        return None if isinstance(value, bool) else "true or false"
    if kind is str:  # words: a list of texts, none of which names anything
        fits = isinstance(value, (list, tuple)) and all(isinstance(v, str) and len(v) <= 200 for v in value)
        return None if fits and len(value) <= 2**20 else "a list of words"
    if isinstance(kind, re.Pattern):
        return None if isinstance(value, str) and kind.fullmatch(value) else "a plain name"
    return None if isinstance(value, str) and value in kind else f"one of {', '.join(kind)}"


def _all(value: Any, fits: Callable[[Any], bool], depth: int = 3) -> bool:
    if not isinstance(value, (list, tuple)):
        return fits(value)
    return depth > 0 and len(value) <= MAX_LIST and all(_all(v, fits, depth - 1) for v in value)


def check_size(name: str, build: Callable[[dict[str, Any]], nn.Module], options: dict[str, Any], where: Path) -> None:
    """Raise ConfigError if a file's options make a backbone many times larger than the named one; nothing takes memory.

    Args:
        build: makes the backbone of these options on the meta device.
    """
    if not options:
        return
    wanted = _count(build(options))
    if wanted <= ROOM:
        return
    plain = _count(build({}))
    if wanted > GROWTH * plain:
        raise ConfigError(
            f"'{where}' asks for a '{name}' of {wanted:,} parameters; by itself it has {plain:,}. If that is meant, name the "
            f"backbone and its options yourself: zoo.load('{name}', adapter=..., {next(iter(options))}=...)."
        )


def _count(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))
