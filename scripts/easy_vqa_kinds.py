"""The questions of easy-VQA by kind, and the forms in which `vlm-micro` is asked them.

107 different questions about drawings of one coloured shape fall into ten kinds. Three kinds are left out of the training of
`vlm-micro`, so that it can be measured whether what is trained later reaches them:

    seen       has-color, has-no-color, has-shape, has-no-shape    "is there (not) a red shape?", "is no circle present?" ...
               color, shape                                        "what color is the shape?", "what shape is present?" ...
               color-of                                            "what color is the circle?"
    left out   lacks                                               "does the image not contain a red shape / a circle?"
               color-of-2                                          "what is the color of the circle?"
               shape-of                                            "what is the red shape?"

A question is asked in one of two ways: as it is, answered by the answer alone; or after the system message `THINK`,
answered by "<think>red circle</think><answer>no</answer>". What stands between the first tags is the drawing's colour and
shape, as far as the questions of the same split tell them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
LEFT_OUT = ("lacks", "color-of-2", "shape-of")
THINK = "think, then answer."


@dataclass(frozen=True)
class Row:
    """A question about an image, its answer, its kind, and what is known of the drawing."""

    image: int
    question: str
    answer: str
    kind: str
    color: str | None
    shape: str | None

    @property
    def tagged(self) -> str | None:
        """The answer behind a thought; None where the drawing is not known."""
        if self.color is None or self.shape is None:
            return None
        return f"<think>{self.color} {self.shape}</think><answer>{self.answer}</answer>"

    @property
    def pool(self) -> tuple[str, ...]:
        """All answers that a question of this kind can have."""
        return COLORS if self.answer in COLORS else SHAPES if self.answer in SHAPES else ("yes", "no")


def kind_of(question: str) -> str:
    """One of the ten kinds."""
    words = re.findall(r"\w+", question)
    color, shape = set(words) & set(COLORS), set(words) & set(SHAPES)
    if words[0] in ("is", "does"):
        if words[:4] == ["does", "the", "image", "not"]:
            return "lacks"
        return f"has-{'no-' if {'no', 'not'} & set(words) else ''}{'color' if color else 'shape'}"
    if shape:
        return "color-of-2" if "of" in words else "color-of"
    if color:
        return "shape-of"
    return "color" if "color" in words else "shape"


def rows(folder: Path, split: str) -> list[Row]:
    """The questions of a split ("train" or "test") of `folder`/easy_vqa, in its order."""
    table = pq.read_table(folder / "easy_vqa" / f"{split}_questions.parquet").to_pylist()
    known: dict[int, dict[str, str]] = defaultdict(dict)
    for row in table:
        words = re.findall(r"\w+", row["question"])
        if row["answer"] in (
            "yes",
            "no",
        ):  # a question that is answered "yes" names what is there, "is there not": what is not
            told = words if (row["answer"] == "yes") != bool({"no", "not"} & set(words)) else []
        else:
            told = [*words, row["answer"]]
        for word in told:
            if word in COLORS or word in SHAPES:
                known[row["image_id"]]["color" if word in COLORS else "shape"] = word
    return [
        Row(
            row["image_id"],
            row["question"],
            row["answer"],
            kind_of(row["question"]),
            known[row["image_id"]].get("color"),
            known[row["image_id"]].get("shape"),
        )
        for row in table
    ]


def images(folder: Path, split: str) -> dict[int, bytes]:
    """The encoded drawings of a split."""
    table = pq.read_table(folder / "easy_vqa" / f"{split}_images.parquet").to_pydict()
    return dict(zip(table["image_id"], table["image"], strict=True))
