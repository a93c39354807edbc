"""Rejected sampling: a model's own answers, of which those that a judge finds good are kept.

A judge is a callable (exercise, completion) -> a score from 0 to 100:

    Rule(scores)      100 for a right answer in its form: 80 by the exercise's reward, 20 by the form
    Asking(model)     a language model of ours is asked for a number; a regime's own model may be it
    any other         of yours; nothing is called over a network unless you do so

Completions and scores are written to a file as they come, one line each, so that a judge which fails in the middle
(or a run that is killed there) costs only the answer at which it failed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from multimodal.data.exercises import Exercise
from multimodal.metrics.rewards import form
from multimodal.regimes.parts.grpo import Scores
from multimodal.regimes.parts.tuning import write
from zoo.data.seeds import kept_generators, seed_everything
from zoo.disk import write_file
from zoo.errors import ConfigError, DataError, WeightsError

if TYPE_CHECKING:
    from zoo.model import Model

__all__ = ["Asking", "Judge", "Rule", "Sampled", "digest"]

Judge = Callable[[Exercise, str], float]


class Rule:
    """80 points for the answer, 20 for the form: with a threshold of 85 only what is wholly right in its form is kept."""

    def __init__(self, scores: Scores) -> None:
        self.scores = scores

    def __call__(self, exercise: Exercise, completion: str) -> float:
        """0 to 100."""
        score = self.scores.score(completion, exercise)
        if not 0 <= score <= 1:
            raise ConfigError(
                f"the reward '{exercise.scored}' is {score:g}, and this rule takes 0 to 1: scale it, or set regime.judge"
            )
        return 80 * score + 20 * form(completion)


class Asking:
    """A language model of ours that is asked for a number.

    Args:
        model: the judge.
        question: with {question}, {reference} and {answer}.
        image: whether it sees the exercise's image.
    """

    QUESTION = (
        "Question: {question}\nRight answer: {reference}\nGiven answer: {answer}\n"
        "Rate the given answer from 0 to 100 for accuracy, logic, form and fluency. Reply with the number alone."
    )

    def __init__(self, model: Model, question: str = QUESTION, image: bool = True) -> None:
        if "{answer}" not in question:
            raise ConfigError(f"the judge's question is {question!r:.60}; expected a text with {{answer}} in it.")
        self.model, self.question, self.image = model, question, image

    def __call__(self, exercise: Exercise, completion: str) -> float:
        """The first number of the reply.

        Raises:
            DataError: there is none from 0 to 100.
        """
        values = {"question": exercise.question, "reference": exercise.answer, "answer": completion}
        text = re.sub(r"\{(question|reference|answer)\}", lambda found: str(values[found[1]]), self.question)
        asked = Exercise(exercise.image if self.image else None, text, "100", key=exercise.key)
        reply = write(self.model, [asked], "", length=16)[0]
        number = re.search(r"(?<!\w)-\d+|\d+(?:\.\d+)?", reply)
        if number is None or not 0 <= float(number.group()) <= 100:
            raise DataError(
                f"The judge replied {reply!r:.60} to exercise {exercise.key}; expected a number from 0 to 100."
            )
        return float(number.group())


def digest(model: Model) -> str:
    """Of everything that is trained: equal texts mean the same answers."""
    found = hashlib.blake2b(str(model.fingerprint).encode())
    for name, parameter in model.parameters_to_train().items():
        found.update(name.encode())
        found.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


class Sampled:
    """Completions of exercises and their scores, in a file that grows.

    Args:
        file: None keeps them in memory.
        identity: what makes them these; a file of others is begun anew.
    """

    def __init__(self, file: Path | None, identity: dict[str, Any]) -> None:
        self.file, self.identity = file, json.loads(json.dumps(identity))
        self.completions: list[str] = []
        self.scores: list[float] = []

    def collect(
        self,
        model: Model,
        exercises: Sequence[Exercise],
        judge: Judge,
        *,
        system: str,
        length: int,
        temperature: float,
        at_once: int,
        seed: int,
    ) -> list[float]:
        """One completion for each exercise, and its score.

        Raises:
            ConfigError: the judge raised, or gave no number from 0 to 100; what was judged before is kept.
        """
        self._read()
        if not self.completions:
            with kept_generators():
                seed_everything(seed, "rejected sampling")
                self.completions = write(
                    model, exercises, system, length=length, temperature=temperature, at_once=at_once
                )
            self._begin()
        for index in range(len(self.scores), len(exercises)):
            self.scores.append(self._judged(judge, exercises[index], self.completions[index], index))
            self._append(self.scores[-1])
        return self.scores

    def _judged(self, judge: Judge, exercise: Exercise, completion: str, index: int) -> float:
        kept = f" {index} scores are kept: the same call goes on with this one." if self.file is not None else ""
        about = (
            f"The judge, at exercise {exercise.key if exercise.key is not None else index} (answer {completion!r:.60}),"
        )
        try:
            score = float(judge(exercise, completion))
        except Exception as error:
            raise ConfigError(f"{about} raised {type(error).__name__}: {error}.{kept}") from error
        if not (math.isfinite(score) and 0 <= score <= 100):
            raise ConfigError(f"{about} gave {score}; expected a number from 0 to 100.{kept}")
        return score

    def _read(self) -> None:
        """What the file holds of these; a last line that was cut off is left out."""
        if self.file is None or not self.file.exists():
            return
        lines = self.file.read_text(encoding="utf-8").split("\n")
        try:
            head = json.loads(lines[0])
            if head["identity"] == self.identity:
                self.completions = head["completions"]
                self.scores = [float(json.loads(line)) for line in lines[1:-1]]
        except (ValueError, KeyError, TypeError) as error:
            raise WeightsError(f"'{self.file}' is not a file of judged answers ({error}). Delete it.") from error
        if self.completions:
            self._begin()

    def _begin(self) -> None:
        if self.file is not None:
            lines = [
                json.dumps({"identity": self.identity, "completions": self.completions}),
                *map(json.dumps, self.scores),
            ]
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_file(self.file, ("\n".join(lines) + "\n").encode())

    def _append(self, score: float) -> None:
        if self.file is not None:
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps(score) + "\n")
                file.flush()
                os.fsync(file.fileno())
