"""Regular expressions that come in a file of somebody's: matched only if what they cost is bounded.

`re` goes back over what it read, which for some expressions takes longer than anybody waits: `(a+)+$` doubles with each letter.
Expressions for module names need no such thing. So an expression is parsed first, by Python's own parser, and refused if one
open-ended repetition stands within another, if more than `MOST` of them follow each other, or if it is longer than `LONGEST`.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from zoo.errors import ConfigError

try:
    from re import _parser as parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_parse as parser

MOST = 3  # open-ended repetitions in one alternative: n letters cost n^3 / 6 steps at the worst
LONGEST = 2_000  # characters
_OPEN = 16  # a repetition that may go on for longer than this is open-ended


@lru_cache(maxsize=8192)
def safe_pattern(text: str, where: str) -> re.Pattern[str]:
    """The compiled expression; `where` names the file and field in messages.

    Raises:
        ConfigError: no regular expression, or one that could take for ever.
    """
    try:
        if len(text) > LONGEST:
            raise ConfigError(f"{where}: an expression of {len(text):,} characters; expected at most {LONGEST:,}.")
        found = re.compile(text)
        count = _open(parser.parse(text))
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"{where}: '{text[:80]}' is no regular expression ({error}).") from error
    if count > MOST:
        why = (
            "one repetition stands within another" if count >= _NESTED else f"it has {count} open repetitions in a row"
        )
        raise ConfigError(
            f"{where}: '{text[:80]}' could take for ever to match ({why}; expected at most {MOST}), so it was not tried. Name "
            "the modules instead."
        )
    return found


_NESTED = 1_000


def _open(parsed: Any) -> int:
    """Open-ended repetitions that one way through the expression meets; `_NESTED` or more: one stands within another."""
    count = 0
    for op, value in parsed:
        name = str(op)
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            _, most, inner = value
            within = _open(inner)
            if int(most) > _OPEN:
                count += _NESTED if within or _branches(inner) else 1
            else:
                count += within * int(most)
        elif name == "BRANCH":
            count += max(map(_open, value[1]))
        elif name in ("SUBPATTERN", "ASSERT", "ASSERT_NOT", "ATOMIC_GROUP"):
            count += _open(value[-1] if isinstance(value, tuple) else value)
        elif name == "GROUPREF_EXISTS":
            count += max(_open(part) for part in value[1:] if part is not None)
        elif name == "GROUPREF":
            count += 1
    return count


def _branches(parsed: Any) -> bool:
    """Whether what is repeated can be read in several ways: alternatives, or an optional part."""
    for op, value in parsed:
        name = str(op)
        if name in ("BRANCH", "MAX_REPEAT", "MIN_REPEAT", "GROUPREF_EXISTS"):
            return True
        if name in ("SUBPATTERN", "ATOMIC_GROUP") and _branches(value[-1] if isinstance(value, tuple) else value):
            return True
    return False
