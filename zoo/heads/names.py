"""Names of classes, checked when they are given: what cannot be told apart, or written down, is noticed before training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from zoo.errors import ConfigError

__all__ = ["check_texts", "class_names"]


def class_names(names: Any, outputs: int = 0) -> list[str]:
    """A list of names, each once, one for each output of a head (0: it has none).

    Raises:
        ConfigError: no list of names, a name that is there twice or cannot be written, or another number of them.
    """
    if isinstance(names, (str, bytes)) or not isinstance(names, Iterable):
        raise ConfigError(f"classes is {names!r:.60}; expected a list of names.")
    found = list(names)
    if wrong := [n for n in found if not isinstance(n, (str, int)) or isinstance(n, bool)]:
        raise ConfigError(f"classes holds {wrong[0]!r:.60}; expected a list of names.")
    found = [str(n) for n in found]
    check_texts(found)
    if double := [n for i, n in enumerate(found) if n in set(found[:i])]:
        raise ConfigError(f"classes names '{double[0]}' twice; expected another name for each class.")
    if outputs and len(found) != outputs:
        raise ConfigError(
            f"classes holds {len(found)} names, and the head has {outputs} outputs. Name each of them, in the order of the "
            f"labels, or make another head: model.reset_head({len(found)}, classes=[...])."
        )
    return found


def check_texts(names: Iterable[str]) -> None:
    """Raise ConfigError for a name that no file can hold (half of a pair of surrogates)."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"The class {name!r:.60} has a name that is no Unicode ({error.reason}), which no file can hold. Write it anew."
            ) from None
