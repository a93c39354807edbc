"""What `model.record` may hold: checked when it is written, and when it is read from a folder of somebody's.

Cards are made from the record (`zoo.disk.cards` lists its keys), so that a wrong type in it would surface later, as a foreign
error in the middle of a save. Keys that are not known here are free, as long as they are JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from zoo.errors import ConfigError


def check_record(record: Any, where: str) -> None:
    """Raise unless cards can be made of a record, and it can be written again; `where` is named in the message.

    Raises:
        ConfigError: naming the key, what it is and what was expected.
    """
    if not isinstance(record, Mapping):
        raise ConfigError(f"{where} is {_told(record)}; expected an object.")
    _check_text(record, where)
    for key, (fits, expected) in _FIELDS.items():
        if record.get(key) is not None and not fits(record[key]):
            raise ConfigError(
                f"{where}: '{key}' is {_told(record[key])}; expected {expected}. Correct it, or leave it out."
            )
    data = record.get("data") or {}
    for key in ("name", "hub_id", "url", "license"):
        if data.get(key) is not None and not isinstance(data[key], str):
            raise ConfigError(
                f"{where}: 'data.{key}' is {_told(data[key])}; expected a text. Correct it, or leave it out."
            )
    for i, table in enumerate(record.get("tables") or []):
        if not _is_table(table):
            raise ConfigError(
                f"{where}: 'tables[{i}]' is {_told(table)}; expected an object with 'columns', a list, and 'rows', lists of as "
                "many cells (texts, numbers, or lists of them). Correct it, or leave it out."
            )


def _check_text(value: Any, where: str) -> None:
    """Raise if a text anywhere in `value` cannot be written as UTF-8."""
    rest, seen = [value], 0
    while rest:
        one = rest.pop()
        seen += 1
        if isinstance(one, str):
            try:
                one.encode()
            except UnicodeEncodeError as error:
                raise ConfigError(
                    f"{where} holds the text {one!r:.60}, which is no Unicode ({error.reason}). Write it anew."
                ) from error
        elif isinstance(one, Mapping):
            rest += [*one.keys(), *one.values()]
        elif isinstance(one, (list, tuple)):
            rest += one


def is_number(value: Any) -> bool:
    """A whole or floating number, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _numbers(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(is_number, value.values()))


def _texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value)


def _is_table(table: Any) -> bool:
    if not isinstance(table, Mapping) or not isinstance(table.get("title", ""), str):
        return False
    columns, rows = table.get("columns"), table.get("rows")
    if not isinstance(columns, (list, tuple)) or not isinstance(rows, (list, tuple)):
        return False
    return all(isinstance(row, (list, tuple)) and len(row) == len(columns) for row in rows)


def _told(value: Any) -> str:
    return f"{value!r:.60} ({type(value).__name__})"


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


# key: what it must be, and how that is said. None stands for a key that is left out.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "task": (_text, "a text, such as 'image-classification'"),
    "trained_for": (_text, "a text, the name of a task, such as 'classify'"),
    "data": (_mapping, "an object with the data's name and sizes"),
    "metrics": (_mapping, "an object with a number for each metric, or with such an object for each split"),
    "hyperparameters": (_mapping, "an object with a value for each name"),
    "seconds": (is_number, "a number of seconds"),
    "device": (_text, "a text"),
    "saved_bytes": (lambda v: is_number(v) or _numbers(v), "a number of bytes, or one for each memory setting"),
    "license": (_text, "a text"),
    "notes": (_texts, "a list of texts"),
    "tables": (_list, "a list of tables"),
}
