"""One graph for each set of adapters: torch's compiler is told how many there are."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["one_more_set"]

EACH = 4  # graphs that a set may take: in training and evaluation, with and without gradients
_seen: set[tuple[int, tuple[str, ...]]] = (
    set()
)  # of all models of the process, whose forward is one function to the compiler


def one_more_set(model: object, names: Sequence[str]) -> None:
    """A set of adapters is in use. By default the compiler gives up, or goes on uncompiled without a word, at the ninth graph.

    Its limits are only ever raised, and only where it is loaded.
    """
    _seen.add((id(model), tuple(names)))
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return
    needed = EACH * len(_seen) + 8
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        if getattr(dynamo.config, limit, needed) < needed:
            setattr(dynamo.config, limit, needed)
