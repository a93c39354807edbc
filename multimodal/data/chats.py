"""Questions about images as a language model reads them: its chat template, places for visual tokens, images of any size.

    [padding | <user> image, question | <assistant>] answer <end>        loss on answer and end alone

The text is what the processor's own chat template makes of one message of the user, with the beginning of an answer; the words of
the answer stand apart from it, so that no template can change them. A tokenizer without a template (a model that was not trained
to talk) gets the question and a line break.

Items are `Chat`s: they stand together in a batch with padding in front of the texts, and behind the patches of smaller images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.data.questions import Question
from multimodal.data.visual_features import opened
from zoo.errors import ConfigError, DataError, MismatchError

if TYPE_CHECKING:
    from zoo.data.dataset import ImageDataset
    from zoo.host import Host

__all__ = ["DESCRIBE", "NONE", "Chat", "Chats"]

NONE = -100  # behind the end of an answer
DESCRIBE = "Describe the image."  # in place of a question, for captions


class Chat(tuple[Tensor, ...]):
    """The inputs of one sample: words (L,), answer (T,), then images as the family takes them by sample."""

    pad = 0  # the word that stands in front

    @classmethod
    def together(cls, items: Sequence[Chat]) -> tuple[Tensor, ...]:
        """Batch: words (B, L) and their mask, answers (B, T), images."""
        longest = max(len(chat[0]) for chat in items)
        ids = torch.stack([F.pad(chat[0], (longest - len(chat[0]), 0), value=chat.pad) for chat in items])
        mask = torch.stack([F.pad(torch.ones_like(c[0]), (longest - len(c[0]), 0)) for c in items])
        seen = [_padded([chat[k] for chat in items]) for k in range(2, len(items[0]))]
        return ids, mask, torch.stack([chat[1] for chat in items]), *seen


def _padded(parts: Sequence[Tensor]) -> Tensor:
    """Tensors of one rank, zeros behind the smaller ones along every axis, as one."""
    sizes = [max(sizes) for sizes in zip(*(part.shape for part in parts), strict=True)]

    def room(part: Tensor) -> Tensor:
        behind = [n for own, all_ in zip(reversed(part.shape), reversed(sizes), strict=True) for n in (0, all_ - own)]
        return F.pad(part, behind)

    return torch.stack([room(part) for part in parts])


class Chats:
    """Rows of a data set of questions; see the top of this file.

    Args:
        prefix: in front of every question. question_length, answer_length: in tokens.
        codes: (kind, texts) -> numbers that stand for them in a target. draw: (question, kind) -> the answer to learn.
        kinds: what captions and questions are called there.
        train: answers are drawn; else the first is taken.
    """

    labels: Any = None

    def __init__(
        self,
        model: Host,
        dataset: ImageDataset,
        *,
        prefix: str | None,
        question_length: int | None,
        answer_length: int | None,
        codes: Any,
        draw: Any,
        kinds: tuple[str, str],
        train: bool,
    ) -> None:
        self.rows, self.train, self.prefix, self.question_length = dataset.rows, train, prefix, question_length
        self.name, self.blocks, self.window = dataset.rows.name, dataset.rows.blocks, dataset.rows.window
        self.codes, self.draw, self.kinds = codes, draw, kinds
        self.words = model.family.writer()  # type: ignore[attr-defined]
        self.broken: dict[int, str] = {}
        known: dict[int, Question] = {}
        for index in map(int, dataset.indices):
            try:
                question, _ = self.rows.read(index)
                known[index] = replace(question, image=None if question.image is None else True)
            except DataError as error:
                if dataset.on_error != "skip":
                    raise
                self.broken[index] = str(error)
        self.with_images = any(q.image for q in known.values())
        if self.with_images and not self.words.eyes:
            raise MismatchError(
                f"'{model.backbone_name}' reads text alone, and the questions of '{self.name}' are about images. Take a model "
                "with eyes (zoo.list_backbones('*vl*')), or data without images."
            )
        self.answer_length = answer_length or (40 if any(q.text is None for q in known.values()) else 10)
        asked = (len(codes(kinds[1], (max(q.answers, key=len), *q.answers))) for q in known.values())
        self.width = max(self.answer_length, *asked, 0)

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        """The place of the question."""
        return str(self.rows.where(index))

    def read(self, index: int) -> tuple[Chat, Tensor]:
        """(inputs, target (2, W)): the answer's words, and the code points of all references, each with -100 behind.

        Raises:
            DataError: an image that is missing or damaged, an answer that is longer than it may be.
        """
        if index in self.broken:
            raise DataError(self.broken[index])
        question, where = self.rows.read(index)[0], self.where(index)
        kind = self.kinds[0] if question.text is None else self.kinds[1]
        chosen = self.draw(question, kind) if self.train else question.answers[0]
        answer = self.words.answer(chosen)
        if len(answer) > self.answer_length:
            if self.train:
                raise DataError(
                    f"{where}: the answer '{chosen:.60}' has {len(answer)} tokens with its end, and answer_length is "
                    f"{self.answer_length}: cut, it would never end. Pass task=Generate(answer_length={len(answer)})."
                )
            answer = answer[: self.answer_length]
        target = torch.full((2, self.width), NONE)
        target[0, : len(answer)] = torch.tensor(answer)
        codes = self.codes(kind, (chosen, *question.answers))
        target[1, : len(codes)] = torch.tensor(codes)
        ids, *seen = self.words.asked(self.text(question), self.pictures(question, where), where)
        self.words.check_context(ids, len(answer) if self.train else self.answer_length, where)
        chat = Chat((ids, target[0, : self.answer_length].clone(), *seen))
        chat.pad = self.words.pad
        return chat, target

    def text(self, question: Question) -> str:
        """What is asked, with what stands in front."""
        if question.text is None:
            return DESCRIBE if self.prefix is None else self.prefix
        text = question.text
        if self.question_length is not None:
            text = self.words.cut(text, self.question_length)
        return f"{self.prefix or ''}{text}"

    def pictures(self, question: Question, where: str) -> list[Any]:
        """The question's images, opened."""
        if not self.with_images:
            return []
        images = question.image if isinstance(question.image, list) else [question.image]
        if not images or any(image is None for image in images):
            raise DataError(
                f"{where}: the question has no image, and others of '{self.name}' have. Add it, leave the row out, or keep "
                "questions without images in data of their own."
            )
        if any(isinstance(image, tuple) for image in images):
            raise DataError(
                f"{where}: features in place of an image, which this model's eyes do not read; give pictures."
            )
        return [opened(image, where) for image in images]


class Writer:
    """A processor (or tokenizer) as `Chats` and the task use it; without the network, since it goes to worker processes.

    Args:
        processor: of transformers; for a model without eyes its tokenizer.
        visual: the names of the images' tensors in the order of the family's inputs; (): no eyes.
        packed: images are patches in one row rather than (images, 3, H, W).
        context: places that the network has; None: any number. flat: the word of which a whole image takes few places, if any.
    """

    def __init__(
        self,
        processor: Any,
        tokenizer: Any,
        visual: tuple[str, ...],
        packed: bool,
        name: str,
        context: int | None = None,
        flat: int | None = None,
    ) -> None:
        self.processor, self.tokenizer, self.visual, self.packed, self.name = processor, tokenizer, visual, packed, name
        self.context, self.flat = context, flat
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"The tokenizer of '{name}' has no eos_token, with which answers end. Set one.")

    @property
    def eyes(self) -> bool:
        """Whether images are read."""
        return bool(self.visual)

    @property
    def pad(self) -> int:
        """The word in front of shorter texts."""
        given = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if given is None else given)

    def answer(self, text: str) -> list[int]:
        """Words of an answer and its end."""
        found = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*map(int, found), int(self.tokenizer.eos_token_id)]

    def check_context(self, ids: Tensor, answer: int, where: str) -> None:
        """Raise DataError if a text (L,) and an answer of so many words have more places than the network was made for."""
        count = len(ids) if self.flat is None else int((ids != self.flat).sum())
        if self.context is not None and count + answer > self.context:
            raise DataError(
                f"{where}: the question has {count} tokens and its answer up to {answer}, and the context of '{self.name}' is "
                f"{self.context}; what stands behind it was never learned. Shorten the question, leave it out, or cut questions: "
                "task=Generate(question_length=...)."
            )

    def cut(self, text: str, length: int) -> str:
        """The first `length` tokens of a text."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return text if len(ids) <= length else str(self.tokenizer.decode(ids[:length]))

    def prompt(self, text: str, images: int) -> str:
        """A message of the user with so many images, and the beginning of an answer, in the model's own form.

        Raises:
            ConfigError: a model with eyes whose processor has no chat template.
        """
        template = getattr(self.processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)
        if template is None:
            if not self.eyes:
                return f"{text}\n"
            raise ConfigError(
                f"The processor of '{self.name}' has no chat template, which says where an image stands in a text. Set "
                "model.family.processor.chat_template."
            )
        content: Any = text
        if self.eyes:
            content = [*[{"type": "image"}] * images, {"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        given = {} if getattr(self.processor, "chat_template", None) else {"chat_template": template}
        return str(self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **given))

    def asked(self, text: str, images: list[Any], where: str) -> tuple[Tensor, ...]:
        """Words (L,) of a question, and its images as the family takes them by sample."""
        prompt = self.prompt(text, len(images))
        # a template writes the special words itself; a tokenizer would put its first one in front of them once more
        own = getattr(self.tokenizer, "bos_token", None)
        special = {"add_special_tokens": False} if own and prompt.startswith(own) else {}
        if not images:
            found = self.tokenizer(prompt, return_tensors="pt", **special)
            return (found["input_ids"][0],)
        try:
            made = self.processor(text=[prompt], images=[images], return_tensors="pt", **special)
        except Exception as error:  # whatever a processor thinks of an image's size
            raise DataError(
                f"{where}: the processor of '{self.name}' does not take these images: {error!s:.300}"
            ) from error
        seen = []
        for name in self.visual:
            part = made.get(name)
            if part is None:
                raise ConfigError(
                    f"The processor of '{self.name}' makes no '{name}' (but {', '.join(made)}): it is another model's. Set "
                    "model.family.processor."
                )
            seen.append(part if self.packed or (part.ndim == 4 and name == "pixel_values") else part[0])
        return (made["input_ids"][0], *seen)
