"""Exercises for learning by rewards: a question about an image or about nothing, its reference, its level, its score.

    train = open_exercises("exercises/", split="train")

    level     | what is asked for                          | scored by default as (`multimodal.metrics.rewards`)
    judge     | yes or no                                  | judging
    choice    | letters of answers that are given          | choice
    open      | anything                                   | text

A source is a list or torch `Dataset` of `Exercise`s or of rows by name, or a Parquet table with the columns question, answer,
level, and, where there are any, image (encoded bytes) and reward. `as_judgement` and `as_choice` make the easier forms of an
open question.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from multimodal.metrics.rewards import REWARDS
from zoo.data.dataset import ImageDataset
from zoo.errors import DataError, nearest

__all__ = ["LEVELS", "Exercise", "as_choice", "as_judgement", "open_exercises"]

LEVELS = {"judge": "judging", "choice": "choice", "open": "text"}  # level -> reward
LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Exercise:
    """One question with its reference.

    Args:
        image: a PIL image, a path or encoded bytes; None: a question about nothing.
        question, answer: texts; the answer is the reference as the reward reads it (a box as "[1, 2, 3, 4]").
        level: "judge", "choice" or "open".
        reward: a name of `multimodal.metrics.rewards.REWARDS`; none: that of the level.
        key: what it is called in messages; none: its place in the data.
    """

    image: Any
    question: str
    answer: str
    level: str = "open"
    reward: str = ""
    key: Any = None

    @property
    def scored(self) -> str:
        """The name of its reward."""
        return self.reward or LEVELS[self.level]


def as_judgement(exercise: Exercise, candidate: str) -> Exercise:
    """The question whether `candidate` is the answer."""
    question = f"{exercise.question}\nIs the answer {candidate}?"
    answer = "yes" if candidate == exercise.answer else "no"
    return Exercise(exercise.image, question, answer, "judge", key=exercise.key)


def as_choice(exercise: Exercise, others: Sequence[str], draw: random.Random) -> Exercise:
    """The question with its answer among others, in a random order, to be chosen by a letter.

    Raises:
        DataError: none or too many others, or the answer among them.
    """
    options = [exercise.answer, *others]
    if len(options) < 2 or len(options) > len(LETTERS) or len(set(options)) < len(options):
        raise DataError(f"{options} to choose from; expected 2 to {len(LETTERS)} different answers.")
    draw.shuffle(options)
    listed = "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    answer = LETTERS[options.index(exercise.answer)]
    return Exercise(exercise.image, exercise.question + listed, answer, "choice", key=exercise.key)


def open_exercises(source: Any, *, split: str | None = None) -> ImageDataset:
    """Exercises; see the top of this file for what `source` can be. The result's items are (`Exercise`, index).

    Raises:
        DataError: no such source, no such columns, an empty question or answer, an unknown level or reward.
    """
    if isinstance(source, ImageDataset):
        return source
    if isinstance(source, (str, Path)):
        file = Path(source).expanduser()
        file = file / f"{split or 'train'}.parquet" if file.is_dir() else file
        if not file.is_file():
            raise DataError(
                f"'{file}' is not there; expected a Parquet file of exercises, or a folder with <split>.parquet."
            )
        try:
            source, name = pq.read_table(file).to_pylist(), str(file)
        except Exception as error:  # many classes, and a damaged file can raise any of them
            raise DataError(f"{file}: not a readable Parquet file ({error!s:.150}).") from error
    else:
        name = type(source).__name__
    if isinstance(source, Exercise) or not hasattr(source, "__len__"):
        raise DataError(f"{name} is no data set of exercises. A list of them is one as open_exercises(list).")
    if not len(source):
        raise DataError(f"{name}: there is no exercise.")
    return ImageDataset(_Exercises(source, name), None)


class _Exercises:
    """Rows of a data set."""

    labels: np.ndarray | None = None
    blocks: np.ndarray | None = None
    window = 1

    def __init__(self, source: Any, name: str) -> None:
        self.source, self.name = source, name

    def __len__(self) -> int:
        return len(self.source)

    def where(self, index: int) -> str:
        """The exercise's place."""
        return f"{self.name}, row {index}"

    def read(self, index: int) -> tuple[Exercise, int]:
        """(`Exercise`, index)."""
        item = self.source[index]
        if isinstance(item, Mapping):
            item = self._of_row(item, index)
        if not isinstance(item, Exercise):
            raise DataError(f"{self.where(index)}: {type(item).__name__}; expected an Exercise or a row by name.")
        for what in ("question", "answer"):
            value = getattr(item, what)
            if not isinstance(value, str) or not value.strip():
                raise DataError(f"{self.where(index)}: the {what} is {value!r:.60}; expected a text.")
        if item.level not in LEVELS:
            raise DataError(f"{self.where(index)}: the level is {item.level!r}. {nearest(item.level, LEVELS)}")
        if item.reward and item.reward not in REWARDS:
            raise DataError(f"{self.where(index)}: the reward is {item.reward!r}. {nearest(item.reward, REWARDS)}")
        return item, index

    def _of_row(self, row: Mapping[str, Any], index: int) -> Exercise:
        missing = [name for name in ("question", "answer", "level") if name not in row]
        if missing:
            raise DataError(f"{self.where(index)}: no '{missing[0]}'; it has {', '.join(map(str, row))}.")
        image = row.get("image")
        image = image.get("bytes") if isinstance(image, Mapping) else image
        return Exercise(image, row["question"], row["answer"], row["level"], row.get("reward") or "", row.get("key"))
