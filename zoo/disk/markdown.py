"""Texts of other people as Markdown that shows them as they are: no markup of theirs, no HTML, no line of its own.

A card's names, licences, settings and notes come from whoever made the adapter. In a table a line break or a bar would break
the row; in the text, HTML would be taken as HTML, and a fence would swallow what follows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import quote, urlsplit

_MARKS = re.compile(r"[\\`*\[\]<>|~]|(?<![^\W_])_|_(?![^\W_])|&(?=#|\w+;)")
_FIRST = re.compile(r"^(\d{0,9})([#+=.)-])")  # what begins a heading, a list, a numbered list or a rule
_CODE = re.compile(r"(`[^`]+`)")


def line(text: Any) -> str:
    """One line: white space and control characters are single spaces, what is no Unicode is a question mark."""
    whole = "".join(c if c.isprintable() else " " for c in str(text).encode("utf-8", "replace").decode())
    return " ".join(whole.split())


def inline(text: Any) -> str:
    """One line in which every character that Markdown or HTML reads is escaped, for the middle of a line or a cell."""
    return _escaped(line(text))


def plain(text: Any) -> str:
    """As `inline`, and it begins no heading, list or rule where it stands first."""
    return _FIRST.sub(r"\1\\\2", inline(text))


def prose(text: Any) -> str:
    """As `plain`, except that `code` stays code: within it nothing is read."""
    parts = _CODE.split(line(text))
    whole = "".join(part if i % 2 else _escaped(part) for i, part in enumerate(parts))
    return _FIRST.sub(r"\1\\\2", whole)


def _escaped(text: str) -> str:
    return _MARKS.sub(lambda found: "\\" + found[0], text)


def code(text: Any) -> str:
    """One line as inline code, within a fence longer than any in it."""
    body = line(text)
    ticks = max((len(run) for run in re.findall(r"`+", body)), default=0)
    space = " " if body.startswith("`") or body.endswith("`") or not body else ""
    return "`" * (ticks + 1) + space + body + space + "`" * (ticks + 1)


def link(text: Any, address: Any) -> str:
    """A link if the address is one of the web, otherwise the text with the address behind it as code."""
    address = line(address)
    try:
        parts = urlsplit(address)
        web = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        web = False
    if not web:
        return f"{plain(text)} ({code(address)})"
    return f"[{plain(text)}]({quote(address, safe=':/?#@!$&*+,;=%~._-')})"


def python(text: Any) -> str:
    """A text as a Python literal in double quotes, on one line."""
    # a literal of JSON is one of Python, except for how JSON writes what lies beyond 16 bits
    written = json.dumps(str(text).encode("utf-8", "replace").decode(), ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in written)


def table(columns: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A table; cells of `Ready` text are Markdown already."""
    lines = [list(columns), ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in one) + " |" for one in lines)


class Ready(str):
    """A text that is Markdown already, and of one line."""


def _cell(value: Any) -> str:
    if isinstance(value, Ready) or value == "---":
        return str(value)
    if isinstance(value, (list, tuple)):
        value = ", ".join(map(str, value))
    return inline(f"{value:.4g}" if isinstance(value, float) else value)
