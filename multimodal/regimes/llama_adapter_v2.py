"""LLaMA-Adapter V2's training: captions of images and instructions in words, each for its own parameters of one adapter.

    "joint":  one fit, whose batches are captions or instructions (p ~ n^tau); captions train the visual part and its gate,
              instructions everything else (`disjoint` of the adapter sees to it)
    "apart":  "captions" trains {visual part, prompts, gates}, then "instructions" {biases, scales, norms}, as the released code

The eye is frozen: its tokens are made once for each image when the data are opened, and held. A question of the data is
`Question(image, text, answers)`; its image is a picture, which the eye sees, or the tokens themselves, (tokens, None). A
caption is a question without words. The adapter `llama-adapter-v2` must be in use on a decoder without eyes of its own.

Defaults: one fit of 4 epochs at 1e-3, AdamW (.9, .95), weight decay 0.02, tau = 1 (the paper's run takes both as they come);
"apart": captions at 1e-4 and decay 0.05, as released.
Source: Gao et al., "LLaMA-Adapter V2", 2023 (OpenGVLab/LLaMA-Adapter).
Deviations: their captions are seen for 150 epochs of a fiftieth of the data; here the user says how many.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from multimodal.adapters.llama_adapter_v2 import LlamaAdapterV2, eye_tokens
from multimodal.data.questions import Question, open_questions
from multimodal.data.visual_features import opened
from multimodal.regimes.meet import QualityRows
from multimodal.tasks.generate import Generate
from zoo import Phase, Regime, Task
from zoo.data import ImageDataset
from zoo.errors import ConfigError, DataError
from zoo.regimes import Run
from zoo.registry import register_regime
from zoo.train.samplers import OnePart

if TYPE_CHECKING:
    from zoo.host import Host
    from zoo.model import Model

__all__ = ["LlamaAdapterRegime", "WithEye", "parts_of"]

CAPTIONS, INSTRUCTIONS = "captions", "instructions"
AT_A_TIME = 32  # pictures that the eye sees together


class PartRows(QualityRows):
    """As `QualityRows`; `parts` are the names, of which a batch has one."""

    def __init__(self, datasets: Mapping[str, ImageDataset]) -> None:
        super().__init__(datasets)
        self.parts = list(datasets)


def parts_of(datasets: Mapping[str, Any]) -> ImageDataset:
    """Questions of several data sets as one, so that `zoo.train.OnePart` makes batches of one of them."""
    found = {name: open_questions(data) for name, data in datasets.items()}
    return ImageDataset(PartRows(found), None, on_error=next(iter(found.values())).on_error)


class _Words:
    """The rows without their images: what the language network itself reads."""

    labels: Any = None
    blocks: Any = None
    window = 1

    def __init__(self, rows: Any) -> None:
        self.rows, self.name, self.noun = rows, rows.name, getattr(rows, "noun", "questions")

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        return str(self.rows.where(index))

    def read(self, index: int) -> tuple[Question, int]:
        question, _ = self.rows.read(index)
        return replace(question, image=None), index


class _Seen:
    """Prepared rows whose targets are {"answer": target, "image": tokens (N, eye_dim)}, the latter where there is an image."""

    labels: Any = None
    blocks: Any = None
    window = 1

    def __init__(self, rows: Any, images: Mapping[int, Tensor], source: Any) -> None:
        self.rows, self.images, self.name = rows, images, rows.name
        if hasattr(source, "parts"):
            self.parts, self.part = source.parts, source.part

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        return str(self.rows.where(index))

    def read(self, index: int) -> tuple[Any, dict[str, Tensor]]:
        inputs, target = self.rows.read(index)
        image = self.images.get(index)
        return inputs, {"answer": target} if image is None else {"answer": target, "image": image}


class WithEye(Task):
    """The task `generate` on a language network without eyes, with an eye beside it: its tokens are the value `image`.

    Args:
        inner: the task. eye: a CLIP of the zoo, or None for data that bring the tokens.
    """

    name = "with-eye"
    noun, monitor, hub = Generate.noun, Generate.monitor, Generate.hub

    def __init__(self, inner: Generate, eye: Any = None) -> None:
        self.inner, self.eye = inner, eye

    def open(
        self, model: Host, data: Any, *, train: bool, split: str | None = None, augment: str | None = None
    ) -> ImageDataset:
        """As the inner task, with the eye's tokens beside each target."""
        dataset = open_questions(data, split=split)
        if isinstance(dataset.rows, _Seen):
            return dataset
        images = self._images(dataset)
        plain = ImageDataset(_Words(dataset.rows), None, indices=dataset.indices, on_error=dataset.on_error)
        ready = self.inner.open(model, plain, train=train)
        rows = _Seen(ready.rows, images, dataset.rows)
        return ImageDataset(rows, None, indices=ready.indices, on_error=ready.on_error)

    def _images(self, dataset: ImageDataset) -> dict[int, Tensor]:
        """The eye's tokens of each row that has an image; of pictures that several share, once."""
        found: dict[int, Tensor] = {}
        known: dict[Any, Tensor] = {}
        waiting: dict[Any, tuple[Any, list[int]]] = {}
        for index in map(int, dataset.indices):
            question = dataset.rows.read(index)[0]
            if question.image is None:
                continue
            if isinstance(question.image, tuple):
                found[index] = torch.as_tensor(question.image[0], dtype=torch.float32)
            elif question.key in known:
                found[index] = known[question.key]
            else:
                picture = opened(question.image, str(dataset.rows.where(index)))
                waiting.setdefault(question.key, (picture, []))[1].append(index)
                if len(waiting) == AT_A_TIME:
                    self._look(waiting, known, found)
        self._look(waiting, known, found)
        return found

    def _look(
        self, waiting: dict[Any, tuple[Any, list[int]]], known: dict[Any, Tensor], found: dict[int, Tensor]
    ) -> None:
        if not waiting:
            return
        if self.eye is None:
            raise DataError(
                "There are pictures, and no eye that sees them: eye='clip-vit-l14', or give its tokens as images."
            )
        transform = self.eye.preprocess(train=False)
        pictures = torch.stack([transform(picture) for picture, _ in waiting.values()])
        tokens = eye_tokens(self.eye, pictures.to(self.eye.device, self.eye.dtype)).float().cpu()
        for (key, (_, indices)), own in zip(waiting.items(), tokens, strict=True):
            known[key] = own
            found.update(dict.fromkeys(indices, own))
        waiting.clear()

    def check(self, model: Host, dataset: ImageDataset, what: str = "data set") -> None:
        """As the inner task."""
        self.inner.check(model, dataset, what)

    def loss(self, model: Host, inputs: Any, targets: Any, label_smoothing: float = 0.0) -> tuple[Tensor, Any]:
        """As the inner task."""
        return self.inner.loss(model, inputs, targets["answer"], label_smoothing)

    def context(self, model: Host, inputs: Any, targets: Any, *, training: bool) -> dict[str, Any]:
        """`image`, where the batch has images."""
        return {"image": targets["image"]} if "image" in targets else {}

    def metrics(self, model: Host) -> Mapping[str, Any]:
        """As the inner task."""
        return self.inner.metrics(model)


@register_regime("llama-adapter-v2")
@dataclass(eq=False)
class LlamaAdapterRegime(Regime):
    """Captions for the visual part, instructions for the rest.

    `zoo.run(model, "llama-adapter-v2", data={"captions": ..., "instructions": ...}, test=...)`: questions or captions with
    images, and questions without (of "apart", with images or without); test data of either kind.

    Args:
        stages: "joint" or "apart", see the file. eye: a CLIP's name, for data of pictures.
        epochs, lr, weight_decay: of the joint fit, or of the instructions. tau: of the sampling.
        caption_epochs, caption_lr, caption_weight_decay: of the captions, where they are apart.
        answer_length: in tokens, as of the task `generate`.
    """

    stages: str = "joint"
    eye: str | None = None
    epochs: int = 4
    lr: float = 1e-3
    weight_decay: float = 0.02
    tau: float = 1.0
    caption_epochs: int = 4
    caption_lr: float = 1e-4
    caption_weight_decay: float = 0.05
    answer_length: int | None = None

    paper = "Gao et al. 2023"
    needs_head = False
    items = (Question,)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.stages in ("joint", "apart"), f"stages is {self.stages!r}; expected 'joint' or 'apart'.")
        for name in ("epochs", "caption_epochs"):
            self.check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; expected 1 or more.")
        for name in ("lr", "caption_lr"):
            self.check(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; expected more than 0.")
        for name in ("weight_decay", "caption_weight_decay", "tau"):
            self.check(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; expected 0 or more.")

    def open(self, model: Model, source: Any) -> ImageDataset:
        """Questions, or images with captions."""
        return open_questions(source)

    def prepare(self, run: Run) -> None:
        """Two data sets by name, the adapter in use, and where images come in that fits the stages."""
        if (
            not isinstance(run.data, dict)
            or set(run.data) != {CAPTIONS, INSTRUCTIONS}
            or not all(map(len, run.data.values()))
        ):
            raise DataError(
                "llama-adapter-v2: data= is {'captions': ..., 'instructions': ...}, questions with images and without; "
                "none is empty."
            )
        if run.test is not None and not isinstance(run.test, ImageDataset):
            raise DataError("llama-adapter-v2: test= is one data set of questions.")
        if run.test is not None and self._images(run.test, CAPTIONS) and self._images(run.test, INSTRUCTIONS):
            raise DataError(
                "llama-adapter-v2: some questions of test= have an image and others none; give one kind of them."
            )
        adapter = self._adapter(run)
        fusion = "early" if self.stages == "joint" else "late"
        if adapter.fusion != fusion or (fusion == "early" and not adapter.disjoint):
            raise ConfigError(
                f"llama-adapter-v2: stages='{self.stages}' is of fusion='{fusion}' (disjoint), and the adapter in use has "
                f"fusion='{adapter.fusion}', disjoint={adapter.disjoint}. Attach it anew, or take the other stages."
            )
        wrong = next((name for name in run.data if self._images(run.data[name], name)), None)
        if self.stages == "joint" and wrong is not None:
            has = "has no image" if wrong == CAPTIONS else "has an image"
            raise DataError(
                f"llama-adapter-v2: a question of the {wrong} {has}; captions have one each, instructions none."
            )

    def _images(self, data: ImageDataset, name: str) -> bool:
        """Whether a question has an image and should have none, or the other way round."""
        return any((data[i][0].image is None) == (name == CAPTIONS) for i in range(len(data)))

    def _adapter(self, run: Run) -> LlamaAdapterV2:
        active = [run.model.adapters[name] for name in run.model.active]
        if len(active) != 1 or not isinstance(active[0], LlamaAdapterV2):
            raise ConfigError(
                "llama-adapter-v2: the model has one adapter in use, 'llama-adapter-v2'; attach it first."
            )
        return active[0]

    def phases(self, run: Run) -> Iterator[Phase]:
        """One fit of both, or one after the other."""
        adapter, task = self._adapter(run), self._task(run)
        last = {"epochs": self.epochs, "lr": self.lr, "weight_decay": self.weight_decay}
        common = {"optimizer_options": {"betas": (0.9, 0.95)}}
        if self.stages == "joint":
            yield Phase("joint", parts_of(run.data), task=task, sampler=OnePart(tau=self.tau), fit={**last, **common})
        else:
            groups = {k: [f"{adapter.name}/{n}" for n in names] for k, names in adapter.groups().items()}
            first = {"epochs": self.caption_epochs, "lr": self.caption_lr, "weight_decay": self.caption_weight_decay}
            seeing = groups["vision"] + groups["prompts"]
            yield Phase(CAPTIONS, run.data[CAPTIONS], task=task, trained=seeing, fit={**first, **common})
            yield Phase(
                INSTRUCTIONS, run.data[INSTRUCTIONS], task=task, trained=groups["tuned"], fit={**last, **common}
            )
        if run.test is not None:
            run.evaluate(run.test, "test", task=task)

    def _task(self, run: Run) -> WithEye:
        eye = None
        if self.eye is not None:
            from zoo.loading import load_backbone

            eye = load_backbone(self.eye, device=run.model.device)
        return WithEye(Generate(answer_length=self.answer_length), eye)

    def summary(self, run: Run) -> dict[str, Any]:
        """The test's numbers."""
        return dict(run.values.get("test", {}))
