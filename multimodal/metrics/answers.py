"""Numbers for generated answers: exact match and VQA accuracy.

Exact match: the answer equals one of the references; case, and blanks at the ends and between words, do not count.

VQA accuracy (Antol et al., ICCV 2015), with several people's answers a_1 .. a_n to one question:

    acc(p) = 1/n sum_i min(#{j != i: a_j = p} / 3, 1)         for one answer alone: whether it is equal

after putting answers into lower case, without articles and punctuation, number words as digits. The published script also
rewrites contractions ("dont" to "don't"), which is left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["exact_match", "normalized", "vqa_accuracy"]

NUMBERS = {
    word: str(i)
    for i, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))
}
NUMBERS["none"] = "0"


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is one of the references, else 0."""
    return float(_plain(answer) in {_plain(r) for r in references})


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def normalized(answer: str) -> str:
    """An answer as VQA accuracy compares it."""
    text = re.sub(r"(?<=\d),(?=\d)", "", answer.lower())  # 1,000
    text = re.sub(r"(?!(?<=\d)\.(?=\d))[^\w\s']", " ", text)  # a point stays in 1.5
    words = (NUMBERS.get(word, word) for word in text.split())
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Between 0 and 1. One reference: whether it is equal."""
    given, others = normalized(answer), [normalized(r) for r in references]
    hits, count = others.count(given), len(others)
    if count <= 1:
        return float(hits == 1)
    own = min((hits - 1) / 3, 1)  # of those who said the same, each leaves himself out
    return (hits * own + (count - hits) * min(hits / 3, 1)) / count
