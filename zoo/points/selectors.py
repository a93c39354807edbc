"""The small language in which points are chosen: `blocks.{0..5}.attn.{q,v}`, `stages.*.blocks.*.mlp`, `**.norm1`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any


def expand(pattern: str) -> list[str]:
    """`a.{q,v}.{0..2}` -> the six patterns it stands for."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices: list[list[str]] = []
    for i, part in enumerate(parts):
        if i % 2 == 0:
            choices.append([part])
        elif m := re.fullmatch(r"(\d+)\.\.(\d+)", part):
            choices.append([str(n) for n in range(int(m[1]), int(m[2]) + 1)])
        else:
            choices.append([c.strip() for c in part.split(",")])
    return ["".join(c) for c in itertools.product(*choices)]


def matcher(pattern: str) -> Callable[[str], Any]:
    """Whether a name fits a pattern: `*` stays within one component of a name, `**` crosses the dots."""
    words = {"**": ".*", "*": "[^.]*", "?": "[^.]"}
    regex = "".join(words.get(part, re.escape(part)) for part in re.split(r"(\*\*|\*|\?)", pattern))
    return re.compile(regex).fullmatch
