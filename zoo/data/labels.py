"""Labels of any form, from any source: read once, checked, and named by their row where they are wrong.

| kind | labels | what becomes of them |
| --- | --- | --- |
| "classes" | whole numbers, texts, true and false; whole floats | (n,) int64, an index into the class names |
| "tags" | lists of names or of indices; texts such as "cat;dog"; rows of 0 and 1 | (n, K) float32 of 0 and 1, K names |
| "numbers" | numbers of any kind, below 0 too, or lists of equally many | (n,) or (n, k) float32, no names |
| "any" | whole numbers that only a loss of the user's own understands | (n,) int64, unchecked |
| "auto" | | by their type: whole numbers and texts are classes, lists tags, floats numbers |

Rows of probabilities (they sum to 1) are targets of a classification.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.data.names import not_among, places, warn_of_gaps
from zoo.errors import ConfigError, DataError, nearest

__all__ = [
    "KINDS",
    "Labelled",
    "Labels",
    "bare",
    "check_kind",
    "natural",
    "parsed",
    "probabilities",
    "read_labels",
    "split_tags",
]

KINDS = ("auto", "classes", "tags", "numbers", "any")
MOST = 100_000  # classes that are made of labels alone, unless there are as many rows
LARGEST = 1 << 31  # entries of a table of tags
_SEPARATORS = re.compile(r"\s*[;|,]\s*")
Where = Callable[[int], str]


@dataclass(frozen=True)
class Labels:
    """`labels` (n,) int64 classes, or `targets` (n, K) or (n,) float32; `classes`: K names, None for numbers."""

    labels: np.ndarray | None = None
    targets: np.ndarray | None = None
    classes: list[str] | None = None


class Labelled:
    """What rows that know all their labels share."""

    labels: np.ndarray | None = None
    targets: np.ndarray | None = None
    class_names: list[str] | None = None

    def take(self, found: Labels) -> None:
        """Hold these labels."""
        self.labels, self.targets, self.class_names = found.labels, found.targets, found.classes

    def target(self, index: int) -> Any:
        """What goes with an item: a class index, or float32 targets (K,), or one number ()."""
        if self.targets is not None:
            return torch.as_tensor(self.targets[index])
        assert self.labels is not None
        return int(self.labels[index])


def check_kind(kind: str) -> None:
    """Raise ConfigError for an unknown kind of labels."""
    if kind not in KINDS:
        raise ConfigError(f"labels is {kind!r}; expected one of {', '.join(KINDS)}. {nearest(str(kind), KINDS)}")


def bare(names: Sequence[str] | None) -> bool:
    """Whether names are the numbers 0 ... n-1 in order, so that they say nothing; others are names, digits or not."""
    return names is None or all(str(name) == str(i) for i, name in enumerate(names))


def natural(names: Sequence[str]) -> list[str]:
    """In alphabetical order; names that are all whole numbers in the order of these."""
    if names and all(name.isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def probabilities(rows: np.ndarray) -> bool:
    """Whether all rows (n, K) are probabilities of classes."""
    return bool((rows >= 0).all() and np.allclose(rows.sum(-1), 1.0, atol=1e-3))


def parsed(texts: Sequence[Any]) -> list[Any]:
    """The cells of a column of text as true and false, whole numbers, floats or lists in brackets, if all are.

    Empty ones are None.
    """
    cells = [text.strip() if isinstance(text, str) else text for text in texts]
    cells = [None if cell == "" else cell for cell in cells]
    words = [cell for cell in cells if isinstance(cell, str)]
    if words and {word.lower() for word in words} <= {"true", "false"}:
        return [cell.lower() == "true" if isinstance(cell, str) else cell for cell in cells]
    for kind in (int, float, _list):
        try:
            if any("_" in word for word in words) and kind is not _list:
                continue  # Python reads 1_0 as ten
            numbers: dict[str, Any] = {word: kind(word) for word in set(words)}
        except (ValueError, SyntaxError, RecursionError):
            continue
        return [numbers[cell] if isinstance(cell, str) else cell for cell in cells]
    return cells


def _list(text: str) -> list[Any]:
    """ "['a', 'b']" or "[1, 0]", as lists are written into text tables."""
    if not (text.startswith("[") and text.endswith("]")):
        raise ValueError(text)
    found = ast.literal_eval(text)
    return list(found)


def read_labels(
    values: Any,
    where: Where,
    names: Sequence[str] | None = None,
    kind: str = "auto",
    *,
    given: bool = False,
    own: Sequence[str] | None = None,
) -> Labels:
    """The labels of all rows.

    Args:
        values: (n,) or (n, K) numbers as an array, or any sequence of labels.
        where: the place of a row, for messages. names: class names, if they are known.
        given: the names are the user's own word: where they are numbers, but not 0 ... n-1 in order, labels are these numbers.
        own: the names that the data themselves have for labels that are indices. Other names then choose an order, in which
            labels follow theirs; they rename nothing.

    Raises:
        DataError: a row without a label, or with one that is none of the kind; its place is named.
    """
    check_kind(kind)
    own = None if own is None else [str(name) for name in own]
    names = own if names is None else [str(name) for name in names]
    if own and names is not None and own != names and not bare(own) and _indices(values):
        return _by_name(read_labels(values, where, own, kind), names, where)
    if isinstance(values, Tensor):
        values = values.numpy()
    if isinstance(values, np.ndarray) and values.dtype.kind in "biuf" and values.ndim in (1, 2):
        if values.ndim == 2 and values.shape[1] == 1 and values.dtype.kind in "iu" and kind != "tags":
            values = values[:, 0]
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(1))[0])
            raise DataError(f"{where(row)}: the label is {values[row]}; expected finite numbers.")
        if values.ndim == 2:
            return _matrix(values, where, names, kind)
        return _numbers(values, where, names, kind, given)
    plain = [_plain(value, where, row) for row, value in enumerate(values)]
    lists = [isinstance(value, list) for value in plain]
    if any(lists):
        if not all(lists):
            raise DataError(f"{where(lists.index(not lists[0]))}: {_MIXED.format('a list', 'a single label')}")
        return _lists(plain, where, names, kind)
    words = [isinstance(value, str) for value in plain]
    if any(words) and not all(words):
        raise DataError(f"{where(words.index(not words[0]))}: {_MIXED.format('a text', 'a number')}")
    if any(words):
        return _texts(plain, where, names, kind)
    return _numbers(np.asarray(plain), where, names, kind, given)


def _indices(values: Any) -> bool:
    """Whether labels are numbers, which class names translate, rather than names themselves."""
    if isinstance(values, (Tensor, np.ndarray)):
        return not isinstance(values, np.ndarray) or values.dtype.kind in "biuf"
    for value in values:
        parts = value if isinstance(value, (list, tuple, set)) else [value]
        if any(isinstance(part, (str, bytes)) for part in parts):
            return False
    return True


def _by_name(found: Labels, names: list[str], where: Where) -> Labels:
    """Labels that are indices of names of their own, as those of other names."""
    if found.classes is None and found.targets is not None:
        return found  # numbers
    table = places(found.classes or [], names)
    if found.labels is not None:
        labels = table[found.labels]
        for row in np.flatnonzero(labels < 0)[:1].tolist():
            raise not_among((found.classes or [])[found.labels[row]], names, where(row))
        return Labels(labels, None, names)
    assert found.targets is not None
    targets = np.zeros((len(found.targets), len(names)), dtype=np.float32)
    for column, place in enumerate(table.tolist()):
        if place >= 0:
            targets[:, place] = found.targets[:, column]
        elif len(rows := np.flatnonzero(found.targets[:, column])):
            raise not_among((found.classes or [])[column], names, where(int(rows[0])))
    return Labels(None, targets, names)


_MIXED = "labels are {} in some rows and {} in others; expected one form."


def _plain(value: Any, where: Where, row: int, inside: bool = False) -> Any:
    """A label as a text, a number or a list of these."""
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if value is None or value == "" or (isinstance(value, float) and value != value):
        raise DataError(
            f"{where(row)}: no label ({value!r}){' in the list' if inside else ''}. Fill it in, or take it out."
        )
    if isinstance(value, (list, tuple, set)) and not inside:
        return [_plain(item, where, row, inside=True) for item in value]
    if isinstance(value, (list, tuple, set)):
        raise DataError(f"{where(row)}: the label is a list of lists; expected a list of names or of numbers.")
    if isinstance(value, (str, bool)):
        return value
    if isinstance(value, int) and abs(value) < 1 << 63:
        return value
    if isinstance(value, float) and abs(value) != float("inf"):
        return value
    raise DataError(
        f"{where(row)}: the label is {value!r:.60} ({type(value).__name__}); expected a whole number, a text, a number, or "
        "a list of them."
    )


def _texts(values: list[str], where: Where, names: list[str] | None, kind: str) -> Labels:
    if kind == "tags":
        return _lists([split_tags(value) for value in values], where, names, kind)
    if kind == "numbers":
        return _numbers(
            np.asarray([_number(value, where, row) for row, value in enumerate(values)]), where, None, kind, False
        )
    names = natural(list(set(values))) if names is None else names
    positions = {name: i for i, name in enumerate(names)}
    for row, value in enumerate(values):
        if value not in positions:
            raise DataError(
                f"{where(row)}: label '{value}' is not among the {len(names)} classes. {nearest(value, names)}"
            )
    return Labels(np.fromiter((positions[v] for v in values), np.int64, len(values)), None, names)


def split_tags(text: str) -> list[str]:
    """The names in "sea; sky"."""
    return [name for name in _SEPARATORS.split(text.strip()) if name]


def _number(value: str, where: Where, row: int) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise DataError(f"{where(row)}: the label is {value!r}; expected a number.") from error


def _numbers(values: np.ndarray, where: Where, names: list[str] | None, kind: str, given: bool) -> Labels:
    """(n,) numbers."""
    if kind == "numbers" or (values.dtype.kind == "f" and kind in ("auto", "any")):
        return Labels(None, values.astype(np.float32), None)
    if values.dtype.kind == "f":
        broken = np.flatnonzero(values != np.round(values))
        if len(broken):
            raise DataError(
                f"{where(int(broken[0]))}: the label is {values[broken[0]]:g}; expected a class. Numbers are regressed: "
                "train with a task or loss for them, or open the data with labels='numbers'."
            )
    labels = values.astype(np.int64)
    if kind == "any" or not len(labels):
        return Labels(labels, None, names)
    if names is not None and given and not bare(names) and all(name.isdecimal() for name in names):
        table = {int(name): i for i, name in enumerate(names)}
        if set(np.unique(labels).tolist()) <= set(table):
            return Labels(np.asarray([table[label] for label in labels.tolist()], dtype=np.int64), None, names)
    stated = names is not None
    if names is None:
        names = [str(i) for i in range(_largest(labels, where) + 1)]
        warn_of_gaps(labels, names, where)
    wrong = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if len(wrong):
        advice = "Pass all class names as classes=[...], or mend the labels."
        if stated and not given:
            advice = (
                f"The data name these classes themselves ({', '.join(names[:4])} ...): mend their names, or the labels."
            )
        more = " Whole numbers below 0 can be regressed: labels='numbers'." if labels[wrong[0]] < 0 else ""
        raise DataError(
            f"{where(int(wrong[0]))}: label {labels[wrong[0]]} is outside the {len(names)} classes "
            f"(0..{len(names) - 1}); {len(wrong)} such rows. {advice}{more}"
        )
    return Labels(labels, None, names)


def _largest(labels: np.ndarray, where: Where, rows: int | None = None) -> int:
    """The largest label, of as many classes as can be meant."""
    row = int(labels.argmax())
    largest = int(labels[row])
    if largest >= max(MOST, 10 * (len(labels) if rows is None else rows)):
        raise DataError(
            f"{where(row)}: a label {largest} would make {largest + 1} classes of {len(labels)} rows. Number the classes from 0, "
            "pass their names as classes=[...], or store the labels as texts."
        )
    return largest


def _lists(values: list[list[Any]], where: Where, names: list[str] | None, kind: str) -> Labels:
    """n lists of names, of indices, or of equally many numbers."""
    if not values:
        return Labels(None, np.zeros((0, len(names or ())), dtype=np.float32), names or [])
    words = [any(isinstance(v, str) for v in row) for row in values]
    numbers = [any(not isinstance(v, str) for v in row) for row in values]
    if any(words) and any(numbers):
        first = next(i for i in range(len(values)) if (numbers[i] if words[words.index(True)] else words[i]))
        raise DataError(f"{where(first)}: {_MIXED.format('texts', 'numbers')}")
    if not any(words) and (kind == "numbers" or _is_table(values, names)):
        lengths = [len(row) for row in values]
        odd = next((i for i, n in enumerate(lengths) if n != lengths[0]), None)
        if odd is not None:
            raise DataError(f"{where(odd)}: {lengths[odd]} numbers; expected {lengths[0]}, as in the rows before.")
        return _matrix(np.asarray(values, dtype=np.float64), where, names, kind)
    if kind == "classes":
        several = next((i for i, row in enumerate(values) if len(row) != 1), None)
        if several is None:
            return read_labels([row[0] for row in values], where, names, kind)
        raise DataError(
            f"{where(several)}: the label is a list of {len(values[several])}; expected one class. Several classes for each item "
            "are trained by task='multilabel'."
        )
    if any(words):
        names = natural(list({v for row in values for v in row})) if names is None else names
        place: dict[Any, int] = {name: i for i, name in enumerate(names)}
    else:
        longest = [max((int(v) for v in row), default=-1) for row in values]
        if names is None:
            names = [str(i) for i in range(_largest(np.asarray(longest), where) + 1)]
        place = {i: i for i in range(len(names))}
    if len(values) * len(names) > LARGEST:
        raise DataError(
            f"{len(values)} rows of {len(names)} classes are too many for one table of tags. Open them in parts."
        )
    targets = np.zeros((len(values), len(names)), dtype=np.float32)
    for row, found in enumerate(values):
        for label in found:
            if label not in place:
                raise DataError(
                    f"{where(row)}: label {label!r} is not among the {len(names)} classes. {nearest(str(label), names)}"
                )
            targets[row, place[label]] = 1.0
    return Labels(None, targets, names)


def _is_table(values: list[list[Any]], names: list[str] | None) -> bool:
    """Whether lists of numbers are rows of a table, a column for each class or number, rather than indices of classes.

    Of equally many 0 and 1 they are: as indices they would name a class twice, or always both.
    """
    if any(isinstance(v, float) for row in values for v in row):
        return True
    size = len(values[0])
    if size < 2 or any(len(row) != size for row in values) or (names is not None and len(names) != size):
        return False
    return all(v in (0, 1) for row in values for v in row)


def _matrix(values: np.ndarray, where: Where, names: list[str] | None, kind: str) -> Labels:
    """(n, K) numbers: tags of 0 and 1, probabilities, or numbers to regress."""
    rows = values.astype(np.float32)
    inside = bool(((rows >= 0) & (rows <= 1)).all())
    binary = bool(((rows == 0) | (rows == 1)).all())
    if kind in ("numbers", "any") or (kind == "auto" and not binary and not (inside and probabilities(rows))):
        return Labels(None, rows, None)
    if kind == "classes" and not probabilities(rows):
        first = int(np.flatnonzero(np.abs(rows.sum(1) - 1) > 1e-3)[0]) if inside else 0
        raise DataError(
            f"{where(first)}: the label is {values[first].tolist()!r:.60}, no probabilities of classes (their sum is not "
            "1). Several classes for each item are trained by task='multilabel', numbers are regressed."
        )
    if not inside:
        first = int(np.flatnonzero(((rows < 0) | (rows > 1)).any(1))[0])
        raise DataError(f"{where(first)}: the label is {values[first].tolist()!r:.60}; expected 0 or 1 for each class.")
    names = [str(i) for i in range(rows.shape[1])] if names is None else names
    if len(names) != rows.shape[1]:
        raise DataError(f"{where(0)}: {rows.shape[1]} values for each item, and there are {len(names)} classes.")
    return Labels(None, rows, names)
