"""The task "generate": a text for a question about an image, by a network that writes it word by word (VL-T5, VL-BART, decoders
and language models with eyes).

    loss = mean over samples of w * mean over the answer's words of -log p(word | words before, question, image)

A question is preceded by "vqa: ", a question without words is "caption:". Of several people's answers one is drawn in training,
with a chance that goes with its VQA accuracy (`multimodal.metrics.answers`), which is also its weight w, as in the
authors' code. Single
answers and captions, of which any is drawn, have w = 1.

Evaluation writes the answers (the best word each time, or by beams) and compares them: "exact_match", "vqa_accuracy" where
questions have several answers, "cider" for captions; "score" is the last of these that there is.

Language models (`multimodal.families.vlm`) are asked in the form of their chat template, see images as their processor makes
them, of any size, and learn the answer and its end alone; nothing stands in front of a question there.

For VL-T5 and VL-BART visual input comes from the data (features and boxes), or is made of its images by `vision`: an image
backbone of the zoo, by default that which the network was trained with. It is made once for each image when the data is opened,
and held.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.data.chats import Chats
from multimodal.data.questions import Question, open_questions
from multimodal.data.visual_features import GridFeatures
from multimodal.families.seq2seq.family import PREFIXES, Seq2Seq, visual_inputs
from multimodal.families.vlm.base import LanguageBackbone
from multimodal.metrics.answers import normalized, vqa_accuracy
from multimodal.tasks.generate_tasks import ManyTexts
from multimodal.tasks.seen import Seen
from multimodal.tasks.written import Scores, Written, decode, written_by
from zoo.data.dataset import ImageDataset, collate
from zoo.errors import ConfigError, DataError, MismatchError
from zoo.registry import register_task
from zoo.tasks.base import Task, call

if TYPE_CHECKING:
    from zoo.host import Host

__all__ = ["Generate", "Scores", "Written"]

NONE = -100  # behind the end of an answer


@register_task("generate")
@dataclass
class Generate(Task):
    """Questions and captions.

    Args:
        vision: makes visual input of images: a `GridFeatures`, a model, or the name of one; None takes the network's own, if any.
        prefix: in front of every question; None: "vqa: ", and "caption:" where there is no question; for language models
            nothing, and "Describe the image.".
        question_length, answer_length: in tokens; longer ones are cut, but for answers that a language model is to learn, which
            are refused. None: questions of 20 (language models: of any length), answers of 10, captions of 40.
        beams: in evaluation; 1 takes the best word each time (the authors have 5).
    """

    vision: Any = None
    prefix: str | None = None
    question_length: int | None = None
    answer_length: int | None = None
    beams: int = 1

    noun, monitor, hub = "questions", "score", "visual-question-answering"

    def __post_init__(self) -> None:
        super().__post_init__()
        for what in ("question_length", "answer_length", "beams"):
            value = getattr(self, what)
            if value is not None and value < 1:
                raise ConfigError(f"{what} is {value}; expected 1 or more.")

    def open(
        self, model: Host, data: Any, *, train: bool, split: str | None = None, augment: str | None = None
    ) -> ImageDataset:
        """What `open_questions` takes; items are (inputs of the family, target (2, W)).

        Inputs: question (L,), its mask, the answer shifted to the right (T,), and, for a network that sees, features and boxes;
        of several images together, each token with the number of its image and its object, which count anew in every image;
        of language models a `multimodal.data.chats.Chat`, whose answer is not shifted.
        Target: the answer's tokens, and the code points of all references, each with -100 behind.
        """
        _check_family(model)
        dataset = open_questions(data, split=split)
        if isinstance(dataset.rows, (Prepared, Chats)):
            return dataset
        rows: Any = self._chats(model, dataset, train) if _talks(model) else Prepared(self, model, dataset, train)
        return ImageDataset(rows, None, indices=dataset.indices, on_error=dataset.on_error)

    def _chats(self, model: Host, dataset: ImageDataset, train: bool) -> Chats:
        if self.vision is not None:
            raise ConfigError(
                f"vision= makes features of images, and '{model.backbone_name}' reads these by itself. Leave it out."
            )
        ways: dict[str, Any] = {"codes": _codes, "draw": _drawn, "kinds": (CAPTION, QUESTION)}
        lengths: dict[str, Any] = {"question_length": self.question_length, "answer_length": self.answer_length}
        return Chats(model, dataset, prefix=self.prefix, train=train, **lengths, **ways)

    def check(self, model: Host, dataset: ImageDataset, what: str = "data set") -> None:
        """Raise unless the model writes text."""
        _check_family(model)

    def loss(self, model: Host, inputs: Any, targets: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Written]:
        """inputs as `open` gives them, in batches; targets (B, 2, W).

        Raises:
            DataError: targets of another form.
        """
        if not isinstance(targets, Tensor) or targets.ndim != 3 or targets.shape[1] != 2:
            form = f"{tuple(targets.shape)}" if isinstance(targets, Tensor) else f"a {type(targets).__name__}"
            raise DataError(
                f"Targets are {form}; expected (B, 2, W): words to write and references, as the task's own `open` makes them of "
                "a data set. Pass batches of that, or another task."
            )
        labels, references = targets[:, 0, : inputs[2].shape[1]], [_text(row) for row in targets[:, 1].tolist()]
        logits = call(model, inputs).float()
        words = F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=NONE, reduction="none", label_smoothing=label_smoothing
        ).view(labels.shape)
        there = labels.ne(NONE)
        captions = bool(references) and references[0][0] == CAPTION
        answers = [tuple(texts[1:]) for texts in references]
        each = words.sum(1) / there.sum(1).clamp(min=1)
        texts: list[str] = []
        if model.training or torch.is_grad_enabled():
            if not captions:  # the first reference is the one that was drawn
                weights = [vqa_accuracy(a[0], a[1:]) if len(a) > 3 else 1.0 for a in answers]
                each = each * each.new_tensor(weights)
        else:
            texts = self.write(model, inputs, labels.shape[1])
            answers = [a[1:] for a in answers]
        return each.mean(), Written(logits, texts, answers, captions)

    @torch.no_grad()
    def write(
        self, model: Host, inputs: Sequence[Any], length: int, adapters: Sequence[str | None] | None = None
    ) -> list[str]:
        """Texts of at most `length` tokens for inputs as the family takes them, the third unread, with the active adapters.

        `adapters`: for each sample the one that serves it instead (None: none).
        """
        family: Any = model.family
        ids, mask, _, *visual = inputs
        if _talks(model):
            settings = {"num_beams": self.beams, "do_sample": False, "max_new_tokens": length}

            def talk(ids: Tensor, mask: Tensor, _: Tensor, *seen: Tensor) -> Tensor:
                return family.written(ids, mask, seen, **settings)  # type: ignore[no-any-return]

            return decode(family, written_by(model, talk, inputs, adapters, family.writer().pad))
        if adapters is not None:
            raise ConfigError(
                f"adapters= is for language models; write with '{model.backbone_name}' once for each adapter."
            )
        named = visual_inputs(visual)
        family.check_visual(named["visual_features"])
        given = {name: value for name, value in named.items() if value is not None}
        options = {"num_beams": self.beams, "do_sample": False, "max_new_tokens": length}

        def run() -> Tensor:
            return model.backbone.generate(input_ids=ids, attention_mask=mask, **options, **given)  # type: ignore[operator]

        return decode(family, model.passing(run, ids, *visual))

    def answer(
        self,
        model: Host,
        images: Sequence[Any],
        questions: Sequence[str | None],
        adapters: Sequence[str | None] | None = None,
    ) -> list[str]:
        """Answers to questions about images, which are PIL images, paths, encoded bytes or (features, boxes).

        `adapters`: for each question the adapter that answers it (None: none); by default all are answered with the active ones.

        Raises:
            DataError: not one image for each question.
        """
        for what, given in (("images", images), ("questions", questions)):
            if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
                raise DataError(f"{what} is one {type(given).__name__}; expected a list, with one for each question.")
        if len(images) != len(questions):
            raise DataError(f"{len(images)} images for {len(questions)} questions; give one for each.")
        _check_family(model)
        ready = [Question(i, q, ("?",), k) for k, (i, q) in enumerate(zip(images, questions, strict=True))]
        dataset = self.open(model, ready, train=False)
        batch, _ = collate([dataset[i] for i in range(len(dataset))])
        inputs = [part.to(model.device, model.dtype if part.is_floating_point() else None) for part in batch]
        training = model.training
        model.eval()
        try:
            return self.write(model, inputs, inputs[2].shape[1], adapters)
        finally:
            model.train(training)

    def metrics(self, model: Host) -> Mapping[str, Any]:
        """Exact match, VQA accuracy, CIDEr."""
        return {"text": Scores()}

    @classmethod
    def together(cls, data: Mapping[str, ImageDataset]) -> ManyTexts:
        """Several data sets as tasks of one network, each with a prefix of its own."""
        return ManyTexts(data, lambda prefix: cls(prefix=prefix), lambda model: _front(cls(), model))


CAPTION, QUESTION = "caption", "question"


def _codes(kind: str, texts: Sequence[str]) -> list[int]:
    return [ord(c) for c in "\n".join([kind, *(" ".join(t.split()) for t in texts)])]


def _text(codes: list[int]) -> list[str]:
    return "".join(chr(c) for c in codes if c != NONE).split("\n")


class Prepared:
    """Questions as the network's input and target. Features are made here, once for each image, and images are read no more."""

    labels: Any = None

    def __init__(self, task: Generate, model: Host, dataset: ImageDataset, train: bool) -> None:
        self.rows, self.train, self.task = dataset.rows, train, task
        self.name, self.blocks, self.window = dataset.rows.name, dataset.rows.blocks, dataset.rows.window
        family: Any = model.family
        self.tokenizer, self.shift = family.tokenizer, _Shift(family)
        self.questions: dict[int, Question] = {}  # without their images
        self.broken: dict[int, str] = {}
        features = Seen(family, lambda: _front(task, model)) if family.feat_dim is not None else None
        for index in map(int, dataset.indices):
            try:
                question, _ = self.rows.read(index)
                if features is not None:
                    features.take(question, self.rows.where(index))
                self.questions[index] = replace(question, image=None)
            except DataError as error:
                if dataset.on_error != "skip":
                    raise
                self.broken[index] = str(error)
        if features is not None:
            features.make()
        self.found = None if features is None else features.found
        known = list(self.questions.values())
        self.answer_length = task.answer_length or (40 if any(q.text is None for q in known) else 10)
        codes = (len(_codes(QUESTION, (max(q.answers, key=len), *q.answers))) for q in known)
        self.width = max(self.answer_length, *codes, 0)

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        """The place of the question."""
        return str(self.rows.where(index))

    def read(self, index: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """(inputs, target); see `Generate.open`."""
        if index in self.broken:
            raise DataError(self.broken[index])
        question = self.questions[index]
        kind = CAPTION if question.text is None else QUESTION
        prefix = self.task.prefix
        if prefix is None:
            prefix = PREFIXES["caption" if kind == CAPTION else "vqa"]
        ids, mask = self._encode(f"{prefix}{question.text or ''}", self.task.question_length or 20)
        chosen = _drawn(question, kind) if self.train else question.answers[0]
        words, there = self._encode(chosen, self.answer_length)
        labels = words.masked_fill(~there.bool(), NONE)
        target = torch.full((2, self.width), NONE)
        target[0, : len(labels)] = labels
        codes = _codes(kind, (chosen, *question.answers))
        target[1, : len(codes)] = torch.tensor(codes)
        visual = () if self.found is None else self.found[question.key]
        return (ids, mask, self.shift(labels), *visual), target

    def _encode(self, text: str, length: int) -> tuple[Tensor, Tensor]:
        made = self.tokenizer(text, max_length=length, truncation=True, padding="max_length", return_tensors="pt")
        return made["input_ids"][0], made["attention_mask"][0]


def _drawn(question: Question, kind: str) -> str:
    """The answer to learn this time."""
    answers = question.answers
    if kind == QUESTION and len(answers) > 2:
        answers = tuple({normalized(a): a for a in reversed(answers)}.values())
        chances = torch.tensor([vqa_accuracy(a, question.answers) for a in answers])
        return answers[int(torch.multinomial(chances, 1))]
    return answers[int(torch.randint(len(answers), ()))]


class _Shift:
    """The family's shift to the right, without the network: a data set is copied to worker processes."""

    def __init__(self, family: Any) -> None:
        self.start, self.pad = family.config.decoder_start_token_id, family.config.pad_token_id

    def __call__(self, labels: Tensor) -> Tensor:
        """(T,) -> (T,)."""
        moved = labels.roll(1)
        moved[0] = self.start
        return moved.masked_fill(moved == NONE, self.pad)


def _front(task: Generate, model: Host) -> GridFeatures | None:
    """What makes features of images."""
    _check_family(model)
    if _talks(model):
        return None  # its own eyes
    family: Any = model.family
    vision = task.vision if task.vision is not None else family.front_end
    if vision is None or family.feat_dim is None or isinstance(vision, GridFeatures):
        return vision if family.feat_dim is not None else None
    name, options = vision if isinstance(vision, tuple) else (vision, {})
    if isinstance(name, str):
        from zoo.loading import load_backbone

        name = load_backbone(name, num_classes=0, device=model.device)
    return GridFeatures(name, **options)


def _talks(model: Host) -> bool:
    return isinstance(model.family, LanguageBackbone)


def _check_family(model: Host) -> None:
    if not isinstance(model.family, (Seq2Seq, LanguageBackbone)):
        raise MismatchError(
            f"'{model.backbone_name}' is of the family '{model.family.family}'; generate trains those that write text (families "
            "'vl-t5', 'vl-bart', 'decoder', 'vlm')."
        )
