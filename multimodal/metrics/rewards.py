"""Rewards of written answers: from 0 (wrong) to 1 (right), by what kind of answer was asked for.

    <think> ... </think> <answer> ... </answer>

An answer is judged by what stands in its tags alone; without exactly one pair of answer tags there is none, and the reward is 0.

| reward        | 1 for                                                                | in between                          |
| ------------- | -------------------------------------------------------------------- | ----------------------------------- |
| `judging`     | the same verdict, yes or no                                          |                                     |
| `choice`      | the same set of letters                                              |                                     |
| `boxes`       | one box whose overlap with the right one (IoU) is above a threshold   |                                     |
| `labels`      | the same set of labels                                               | Jaccard: common ones by all         |
| `mathematics` | the same value, as `math-verify` finds                               |                                     |
| `text`        | the same text                                                        | 0.2 for a similar one, if measured  |
| `form`        | thought and answer in their tags, and nothing else                   |                                     |

They are those of Curr-ReFT (ding523/Curr_REFT), without what goes wrong in the released ones: there "not correct" is a
yes; the letters of a choice must come in one order, and replace what symbolic verification found; an answer to a
mathematical question is right whenever neither side holds a letter, or if it contains the reference ("1" is right for
"12", "12" for "1"); boxes are cut to whole numbers, the last of many counts, and one pixel of overlap more is asked for;
a bracketed list of labels raises and scores 0; answers without a closing tag count; and a detection question can have no
point for its form in the stages that ask for no box. Here an answer that names several boxes, verdicts of both kinds, or
several answers, is wrong: otherwise naming many would pay.
"""

from __future__ import annotations

import ast
import json
import math
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

from multimodal.metrics.answers import normalized
from zoo.errors import DataError
from zoo.library import library

__all__ = ["REWARDS", "answer_of", "boxes", "choice", "form", "iou", "judging", "labels", "mathematics", "text"]

Box = tuple[float, float, float, float]

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_FORM = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_YES, _NO = frozenset({"yes", "true", "correct", "right"}), frozenset({"no", "false", "incorrect", "wrong", "untrue"})
_NOT = frozenset({"not", "never", "cannot", "neither", "nor"})  # and all that end with n't
_BETWEEN = frozenset(  # "not quite right", "can't be right"
    {
        "a",
        "an",
        "the",
        "that",
        "to",
        "at",
        "all",
        "very",
        "really",
        "quite",
        "entirely",
        "fully",
        "completely",
        "totally",
    }
    | {"exactly", "necessarily", "be", "been", "being", "look", "looks", "seem", "seems", "appear", "appears", "sound"}
)
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_BOX = re.compile(rf"[\[(]\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*[\])]")


def answer_of(completion: str) -> str | None:
    """What stands between the only pair of answer tags, without blanks at the ends; None if there is no such pair, or several."""
    found = _ANSWER.findall(completion)
    if len(found) != 1 or completion.count("<answer>") != 1 or completion.count("</answer>") != 1:
        return None
    return str(found[0]).strip()


def form(completion: str, *, box: bool = False) -> float:
    """1 if the text is a thought and an answer in their tags, each once, and nothing else; `box`: and the answer holds a box."""
    match = _FORM.fullmatch(completion)
    if match is None or any(completion.count(tag) != 1 for tag in _TAGS):
        return 0.0
    return float(not box or bool(_BOX.search(match.group(2))))


def judging(answer: str, reference: str) -> float:
    """1 if both say yes, or both say no."""
    return _equal(verdict(answer), _known(verdict(reference), reference, "a verdict (yes or no)"))


def verdict(answer: str) -> bool | None:
    """True for yes, False for no; None if the answer says neither, or both. "not correct" and "can't be true" are no."""
    found, turned = set(), False
    for word in re.findall(r"[\w']+", _straight(answer).lower()):
        if word in _YES or word in _NO:
            found.add((word in _YES) != (turned and word not in ("yes", "no")))
            turned = False
        else:
            turned = word in _NOT or word.endswith("n't") or (turned and word in _BETWEEN)
    return found.pop() if len(found) == 1 else None


def choice(answer: str, reference: str) -> float:
    """1 if both name the same letters, in any order."""
    return _equal(letters(answer), _known(letters(reference), reference, "one or several letters"))


def letters(answer: str) -> frozenset[str] | None:
    """The options that an answer names: its isolated capital letters from A to J; small ones if it holds nothing else.

    "A" before a word is the article and "I" the one who answers, unless a stop or a bracket stands behind it.
    """
    answer = _straight(answer)
    if re.fullmatch(r"[\s,;.()\[\]]*(?:[a-j](?:[\s,;.()\[\]]+|$)|and\s+)+", answer.strip()):
        answer = answer.replace("and", " ").upper()
    found = {m.group() for m in re.finditer(r"(?<!\w)(?<!\w')[A-J](?!\w|'\w)", answer) if not _in_a_sentence(answer, m)}
    return frozenset(found) or None


def _in_a_sentence(answer: str, match: re.Match[str]) -> bool:
    behind = re.match(r"\s+(?!and\b|or\b|is\b|because\b)[a-z]", answer[match.end() :])
    return match.group() in "AI" and behind is not None


def _straight(answer: str) -> str:
    """With the apostrophes of typewriters."""
    return answer.replace("\u2019", "'")


def boxes(answer: str, reference: str | Sequence[float], *, threshold: float = 0.5) -> float:
    """1 if the answer names one box (x1, y1, x2, y2) whose overlap with the reference is above `threshold`."""
    given = _known(_box(reference), reference, "a box (x1, y1, x2, y2) with x1 < x2 and y1 < y2")
    found = _box(answer)
    return float(found is not None and iou(found, given) > threshold)


def iou(one: Box, other: Box) -> float:
    """Intersection by union of two boxes, of real numbers; 0 if they do not overlap."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    area = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (one, other))
    return width * height / (area - width * height)


def _box(value: str | Sequence[float]) -> Box | None:
    """The only box that is named; None if there is none, several, or one without area."""
    found = _BOX.findall(value) if isinstance(value, str) else [value]
    if len(found) != 1 or len(found[0]) != 4:
        return None
    x1, y1, x2, y2 = (float(v) for v in found[0])
    return (x1, y1, x2, y2) if math.isfinite(x1 + y1 + x2 + y2) and x1 < x2 and y1 < y2 else None


def labels(answer: str, reference: str | Sequence[str]) -> float:
    """Labels in common by all labels named (Jaccard); case, order and repetition do not count."""
    given, found = _known(_labels(reference), reference, "labels"), _labels(answer)
    return 0.0 if found is None else len(found & given) / len(found | given)


def _labels(value: str | Sequence[str]) -> frozenset[str] | None:
    """Out of a list in brackets (JSON or Python), or words between commas; labels of several words stay whole."""
    parts: Any = value
    if isinstance(value, str):
        parts = re.split(r"[,;\n]", value.strip().strip("[](){}"))
        if value.strip().startswith(("[", "(", "{")):
            for read in (json.loads, ast.literal_eval):
                try:
                    parsed = read(value.strip())
                except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
                    continue
                if isinstance(parsed, (list, tuple, set)):
                    parts = parsed
                    break
    found = frozenset(" ".join(str(p).strip().strip("'\"").lower().split()).rstrip(".") for p in parts)
    return found - {""} or None


def mathematics(answer: str, reference: str) -> float:
    """1 if both have the same value (`math-verify`): numbers, fractions, expressions, sets, in plain text or LaTeX.

    What neither of the two can be read as is right only if the texts are equal, word by word; an empty answer never is.
    """
    if not reference.strip():
        raise DataError(f"A mathematical question has the reference {reference!r}; expected a value.")
    if not answer.strip():
        return 0.0
    if "".join(answer.split()) == "".join(reference.split()):
        return 1.0
    verifier = library("math_verify", "rl")
    limit = 5 if threading.current_thread() is threading.main_thread() else None  # it waits by a signal of the process
    gold, given = (
        verifier.parse(_mathematical(value), parsing_timeout=limit or 0, fallback_mode="no_fallback")
        for value in (reference, answer)
    )
    if not gold or not given:
        return 0.0
    return float(bool(verifier.verify(gold, given, timeout_seconds=limit or 0)))


def _mathematical(value: str) -> str:
    """In marks of LaTeX, if it has commands and no marks: otherwise only a number in it would be read."""
    return f"${value}$" if "\\" in value and "$" not in value and "\\(" not in value else value


def text(
    answer: str, reference: str | Sequence[str], *, similarity: Callable[[str, str], float] | None = None
) -> float:
    """1 if the answer equals a reference, without articles, punctuation, case; the sign of a number counts.

    `similarity` (answer, reference) -> -1 to 1, as the cosine of two sentences: above 0.95 is right too, above 0.9 gives 0.2.
    """
    references = [reference] if isinstance(reference, str) else list(reference)
    if not any(r.strip() for r in references):
        raise DataError(f"A question has the reference {reference!r}; expected a text.")
    given = _said(answer)
    if not given:
        return 0.0
    if given in {_said(r) for r in references}:
        return 1.0
    if similarity is None:
        return 0.0
    closest = max(float(similarity(answer, r)) for r in references)
    return 1.0 if closest > 0.95 else 0.2 if closest > 0.9 else 0.0


def _said(value: str) -> str:
    """Normalized, but for a sign in front of a number; as it is if nothing else would be left ("A" is no article then)."""
    signed = re.sub(r"(?<![\w.)])[-\u2212](?=\.?\d)", " minus ", value)
    return normalized(signed) or " ".join(value.lower().split()).strip(" .")


REWARDS: dict[str, Callable[..., float]] = {
    "judging": judging,
    "choice": choice,
    "boxes": boxes,
    "labels": labels,
    "mathematics": mathematics,
    "text": text,
}


def _equal(found: Any, given: Any) -> float:
    return float(found is not None and found == given)


def _known(value: Any, reference: Any, expected: str) -> Any:
    """The reference as it was read.

    Raises:
        DataError: it could not be.
    """
    if value is None:
        raise DataError(f"The reference {reference!r:.80} is not {expected}.")
    return value
