"""Data sets of questions about images, with answers; and of images with captions, which are questions that go without saying.

    train = open_questions("easy_vqa/", split="train")

Parquet files in one of two forms:

    `<split>_images`: image_id, image (encoded bytes), or features and boxes (lists of N x feat_dim and N x 4 numbers)
    `<split>_questions`: image_id, question, answer (a text) or answers (a list: what several people said)

    one table with all of it: image (or features, boxes), question, answer or answers

or what `multimodal.data.pairs.open_pairs` takes (captions), or any list or torch `Dataset` of `Question`s. The result is a
`zoo.data.ImageDataset` of (`Question`, index).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import Dataset

from multimodal.data.pairs import Pair, open_pairs
from zoo.data.dataset import ImageDataset, OnError
from zoo.data.hub import one_split
from zoo.data.locate import is_paths
from zoo.data.tables import choose_column
from zoo.errors import DataError, nearest

__all__ = ["Question", "open_questions"]

QUESTIONS = ("question", "questions", "sent")
IMAGES = ("image", "img", "picture", "photo")
ANSWERS = ("answers", "answer", "label", "captions", "caption")


@dataclass(frozen=True)
class Question:
    """A question about an image.

    Args:
        image: a PIL image or encoded bytes, or (features (N, feat_dim), boxes (N, 4) or None), or a list of several images; None
            for a question about nothing.
        text: the question; None asks for a description.
        answers: one, or those of several people; a text alone is one answer.
        key: names the image: questions with equal keys share it. None: it is this question's alone.
    """

    image: Any
    text: str | None
    answers: tuple[str, ...]
    key: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.answers, str):  # one answer, not one for each of its letters
            object.__setattr__(self, "answers", (self.answers,))


def open_questions(source: Any, *, split: str | None = None, on_error: OnError = "raise") -> ImageDataset:
    """Questions with answers; see the top of this file for what `source` can be.

    Raises:
        DataError: no such source, no such columns, a question without image or features, an empty question or answer.
    """
    if isinstance(source, ImageDataset):
        return source
    rows: Any
    if isinstance(source, (list, tuple)) and not source:
        raise DataError(f"The {type(source).__name__} of questions is empty; expected at least one.")
    if isinstance(source, Mapping):
        source, split = one_split(source, split, type(source).__name__), None
    if not is_paths(source) and _asks(source):
        rows = GivenQuestions(source)
    elif files := _files(source, split):
        rows = ParquetQuestions(*files)
    else:
        pairs = open_pairs(source, split=split)
        return ImageDataset(Captions(pairs.rows), None, indices=pairs.indices, on_error=on_error)
    return ImageDataset(rows, None, on_error=on_error)


class _Rows:
    """What all sources of questions share."""

    task = "generate"
    name: str
    labels: np.ndarray | None = None
    blocks: np.ndarray | None = None
    window = 1


class ParquetQuestions(_Rows):
    """A table of questions, and one of images; or one table of both."""

    def __init__(self, questions: Path, images: Path | None) -> None:
        table = _table(questions)
        self.file = questions
        self.name = f"{questions.resolve().parent.name}/{questions.stem.removesuffix('_questions')}"
        self.texts = _column(table, questions, QUESTIONS).to_pylist()
        given = _column(table, questions, ANSWERS).to_pylist()
        self.answers = [_answers(value, self.where(i)) for i, value in enumerate(given)]
        if images is None:
            self.keys: list[Any] = list(range(len(table)))
            self.images = _images(table, questions)
        else:
            other = _table(images)
            self.keys = _column(table, questions, ("image_id", "img_id")).to_pylist()
            names = _column(other, images, ("image_id", "img_id")).to_pylist()
            self.images = dict(zip(names, _images(other, images).values(), strict=True))
            for i, key in enumerate(self.keys):
                if key not in self.images:
                    raise DataError(
                        f"{self.where(i)}: the question's image {key!r} is not among the {len(self.images)} of {images.name}."
                    )
        if not len(self):
            raise DataError(f"{questions}: there is no question.")
        for i, text in enumerate(self.texts):
            if not isinstance(text, str) or not text.strip():
                raise DataError(f"{self.where(i)}: the question is {text!r}; expected a text.")

    def __len__(self) -> int:
        return len(self.answers)

    def where(self, index: int) -> str:
        """File and row."""
        return f"{self.file}, row {index}"

    def read(self, index: int) -> tuple[Question, int]:
        """(`Question`, index)."""
        key = self.keys[index]
        return Question(self.images[key], self.texts[index], self.answers[index], key), index


class GivenQuestions(_Rows):
    """A list or torch `Dataset` of `Question`s, or of rows {"image": ..., "question": ..., "answer" or "answers": ...}."""

    def __init__(self, source: Any) -> None:
        self.source = source
        self.name = type(source).__name__
        if not len(source):
            raise DataError(f"{self.name}: there is no question.")

    def __len__(self) -> int:
        return len(self.source)

    def where(self, index: int) -> str:
        """The item's number."""
        return f"{self.name}, item {index}"

    def read(self, index: int) -> tuple[Question, int]:
        """(`Question`, index)."""
        item = self.source[index]
        if isinstance(item, Mapping):
            item = self._of_row(item, index)
        if not isinstance(item, Question):
            raise DataError(
                f"{self.where(index)}: {type(item).__name__}; expected a multimodal.data.questions.Question."
            )
        if item.text is not None and not isinstance(item.text, str):
            raise DataError(
                f"{self.where(index)}: the question is {item.text!r:.60}; expected a text, or None for a caption."
            )
        if item.text is not None and not item.text.strip():
            raise DataError(f"{self.where(index)}: the question is empty.")
        _answers(list(item.answers) if isinstance(item.answers, (list, tuple)) else item.answers, self.where(index))
        return item if item.key is not None else replace(item, key=("item", index)), index

    def _of_row(self, row: Mapping[str, Any], index: int) -> Question:
        """A question out of a row by name."""
        where, there = self.where(index), list(row)
        answer = row[choose_column(where, None, ANSWERS, there, there, "answer")]
        text = row[choose_column(where, None, QUESTIONS, there, there, "question")]
        image = next((row[name] for name in IMAGES if name in row), None)
        if isinstance(image, Mapping) and "bytes" in image:
            image = image["bytes"]
        if not isinstance(text, str):
            raise DataError(f"{where}: the question is {text!r:.60}; expected a text.")
        return Question(image, text, _answers(answer, where), row.get("image_id"))


class Captions(_Rows):
    """Images with captions, as questions without words."""

    def __init__(self, rows: Any) -> None:
        self.rows, self.name = rows, rows.name
        self.blocks, self.window = rows.blocks, rows.window

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        """The place of the image."""
        return str(self.rows.where(index))

    def read(self, index: int) -> tuple[Question, int]:
        """(`Question`, index)."""
        pair, _ = self.rows.read(index)
        assert isinstance(pair, Pair)
        return Question(pair.image, None, pair.captions, index), index


def _asks(source: Any) -> bool:
    """Whether a data set is one of questions, as its first item shows; others are read as images with captions."""
    if not (hasattr(source, "__getitem__") and hasattr(source, "__len__")) or not len(source):
        return isinstance(source, Dataset)
    first = source[0]
    named = isinstance(first, Mapping) and any(name in first for name in QUESTIONS)
    pair = isinstance(first, (tuple, list)) and len(first) == 2
    return named or not (pair or isinstance(first, Mapping))


def _files(source: Any, split: str | None) -> tuple[Path, Path | None] | None:
    """(table of questions, table of images or None), or None if the source is something else."""
    if isinstance(source, (list, tuple)) and len(source) == 2 and all(isinstance(s, (str, Path)) for s in source):
        named = {("images" if "images" in Path(s).stem else "questions"): Path(s).expanduser() for s in source}
        if len(named) == 2:
            return named["questions"], named["images"]
    if not isinstance(source, (str, Path)):
        return None
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".parquet":
        if path.stem.endswith("_questions"):
            images = path.with_name(path.name.replace("_questions", "_images"))
            if not images.is_file():
                raise DataError(f"{path}: there is no {images.name} beside it with the images of its questions.")
            return path, images
        return (path, None) if "question" in pq.read_schema(path).names else None
    if not path.is_dir():
        return None
    found = {p.stem.removesuffix("_questions"): p for p in sorted(path.glob("*_questions.parquet"))}
    if found:
        if split is None and len(found) > 1:
            raise DataError(f"{path}: holds the splits {', '.join(found)}; choose one with split=...")
        if split is not None and split not in found:
            raise DataError(f"{path}: no questions of the split '{split}'. {nearest(split, found)}")
        return _files(found[split] if split is not None else next(iter(found.values())), None)
    single = path / f"{split}.parquet"
    return _files(single, None) if split is not None and single.is_file() else None


def _table(file: Path) -> pa.Table:
    try:
        return pq.read_table(file)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file}: not a readable Parquet file ({error}). Copy or download it again.") from error


def _column(table: pa.Table, file: Path, names: Sequence[str]) -> pa.ChunkedArray:
    for name in names:
        if name in table.column_names:
            return table.column(name)
    raise DataError(f"{file}: no column '{names[0]}'; it has {', '.join(table.column_names)}.")


def _answers(value: Any, where: str) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise DataError(
            f"{where}: the answer is {value!r:.80}; expected a text, or a list of texts, none of them empty."
        )
    return tuple(texts)


def _images(table: pa.Table, file: Path) -> dict[Any, Any]:
    """Row -> encoded bytes, or (features, boxes)."""
    if "features" in table.column_names:
        boxes = table.column("boxes").to_pylist() if "boxes" in table.column_names else [None] * len(table)
        found = {}
        for i, value in enumerate(table.column("features").to_pylist()):
            found[i] = (matrix(value, f"{file}, row {i}: features"), boxes[i])
            if boxes[i] is not None:
                found[i] = (found[i][0], matrix(boxes[i], f"{file}, row {i}: boxes", 4))
        return found
    if not set(IMAGES) & set(table.column_names):
        return dict.fromkeys(range(len(table)))
    values = _column(table, file, IMAGES).to_pylist()
    return {i: v.get("bytes") if isinstance(v, dict) else v for i, v in enumerate(values)}


def matrix(value: Any, what: str, width: int | None = None) -> Tensor:
    """Numbers (N, width) as a tensor.

    Raises:
        DataError: none, of different lengths, of another width, or not finite.
    """
    try:
        found = torch.as_tensor(np.asarray(value, dtype=np.float32))
    except (TypeError, ValueError) as error:
        raise DataError(f"{what}: no table of numbers ({error}).") from error
    if found.ndim != 2 or not found.numel() or (width is not None and found.shape[1] != width):
        raise DataError(f"{what}: {tuple(found.shape)}; expected (tokens, {width or 'width'}).")
    if not torch.isfinite(found).all():
        raise DataError(f"{what}: they hold NaN or Inf.")
    return found
