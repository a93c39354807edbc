"""The small language in which points are chosen: `blocks.{0..5}.attn.{q,v}`, `stages.*.blocks.*.mlp`, `**.norm1`.

A selector may come from a file or a command line, so what it costs is bounded: it stands for at most `MOST` names, which are
counted before any is made, and wildcards are matched in time linear in the name wherever a regular expression would go back.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

from zoo.errors import SelectionError

MOST = 10_000  # names that one selector may stand for
LONGEST = 1_000  # characters of a selector
_FEW = 3  # wildcards that a regular expression matches fast whatever the name is


def expand(pattern: str) -> list[str]:
    """`a.{q,v}.{0..2}` -> the six patterns it stands for.

    Raises:
        SelectionError: more than `MOST` of them, or a text longer than `LONGEST`.
    """
    if len(pattern) > LONGEST:
        raise SelectionError(
            f"a selector has {len(pattern):,} characters; expected at most {LONGEST:,}. Give a list of shorter ones. It "
            f"begins with '{pattern[:60]}'."
        )
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices: list[list[str] | range] = []
    for i, part in enumerate(parts):
        if i % 2 == 0:
            choices.append([part])
        elif m := re.fullmatch(r"([0-9]+)\.\.([0-9]+)", part):
            first, last = int(m[1]), int(m[2])
            if first > last:
                raise SelectionError(f"'{{{part}}}' in '{pattern}' counts down; write {{{last}..{first}}}.")
            choices.append(range(first, last + 1))
        else:
            choices.append([c.strip() for c in part.split(",")])
    # not len(): a range may be longer than any list can be
    total = math.prod(c.stop - c.start if isinstance(c, range) else len(c) for c in choices)
    if total > MOST:
        raise SelectionError(
            f"'{pattern}' stands for {total:,} names; expected at most {MOST:,}. Write * for all of them, or a narrower range."
        )
    return ["".join(map(str, c)) for c in itertools.product(*choices)]


def matcher(pattern: str) -> Callable[[str], Any]:
    """Whether a name fits a pattern: `*` stays within one component of a name, `**` crosses the dots."""
    # wildcards side by side are one: as wide as the widest of them
    parts = [part for part in re.split(r"(\*+|\?)", pattern) if part]
    if sum(part[0] == "*" for part in parts) > _FEW:
        return lambda name: _walk(parts, name)
    return re.compile("".join(_regex(part) for part in parts)).fullmatch


def _regex(part: str) -> str:
    if part[0] == "*":
        return "[^.]*" if len(part) == 1 else ".*"
    return "[^.]" if part == "?" else re.escape(part)


def _walk(parts: list[str], name: str) -> bool:
    """As the regular expression says, with every place of the name at which what was read so far can end."""
    ends = {0}
    for part in parts:
        if part[0] == "*":
            reached: set[int] = set()
            for end in sorted(ends):
                if end in reached:
                    continue  # an earlier one went on through here
                stop = name.find(".", end) if len(part) == 1 else -1
                reached.update(range(end, (len(name) if stop < 0 else stop) + 1))
            ends = reached
        elif part == "?":
            ends = {end + 1 for end in ends if end < len(name) and name[end] != "."}
        else:
            ends = {end + len(part) for end in ends if name.startswith(part, end)}
        if not ends:
            return False
    return len(name) in ends
