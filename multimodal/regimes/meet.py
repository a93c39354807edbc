"""MEET: controls for good and bad answers are learned first, by little adapters, and then the network is tuned with them.

    stage 1, "controls":  min over c_k       of  -log p(y | x, c_k)     (x, y, k): an answer y of quality k; the network is frozen
    stage 2, "model":     min over theta, c  of  -log p(y | x, c_k)     the network whole, from the controls of stage 1

Each batch mixes the qualities; every sample goes through with the control of its own (adapter `meet`). In use, the control of the
quality that is wanted is given: `model(x, context={"quality": "good"})`. How well the network is controlled is what a measure
gives on the same questions under the first control less what it gives under the last,

    controllability = measure(answers under the first) - measure(answers under the last)

Both are measured against the test data's answers, which are the good ones; it is 0 as long as the controls are equal.
`stages` leaves one stage out: "controls" alone is one tuned prompt (or LoRA) for each quality, "model" alone trains network
and controls together from the beginning. `words` starts prompts as the embeddings of texts: with `stages="model"` and
`controls=False` these are then words in front of the input, as in Chain of Hindsight. Data of one quality
alone is supervised tuning.

Defaults: prompts of 10 tokens, 5 epochs at 1e-3; then 3 epochs, 1e-4 for the network and 1e-3 for the controls; ours, since the
paper's are not published.
Source: Xue, Wang and Ji, "Parameter-Efficient Tuning Helps Language Model Alignment", 2023 (arXiv 2310.00819); no code.
Deviations: theirs are language models tuned on dialogues and summaries; here it is any network of the task `generate`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from multimodal.data.questions import Question, open_questions
from multimodal.tasks.generate import Generate
from zoo import Phase, Regime, Task
from zoo.data import ImageDataset
from zoo.errors import ConfigError, DataError
from zoo.regimes import Run, RunReport
from zoo.registry import adapter, register_regime

if TYPE_CHECKING:
    from zoo.host import Host
    from zoo.model import Model

__all__ = ["MeetRegime", "OfQuality", "of_qualities"]

NAME, WHOLE = "meet", "whole"
STAGES = ("both", "controls", "model")


class QualityRows:
    """The questions of several data sets, one behind the other; `part` (n,) says to which each belongs."""

    labels: np.ndarray | None = None
    blocks: np.ndarray | None = None
    window = 1

    def __init__(self, datasets: Mapping[str, ImageDataset]) -> None:
        self.datasets = [d._like(on_error="raise") for d in datasets.values()]
        self.part: np.ndarray = np.repeat(np.arange(len(datasets)), [len(d) for d in self.datasets])
        self.starts = np.cumsum([0, *(len(d) for d in self.datasets)])
        self.name = "+".join(dict.fromkeys(d.name for d in self.datasets))
        self.noun = self.datasets[0].noun

    def __len__(self) -> int:
        return len(self.part)

    def _place(self, index: int) -> tuple[ImageDataset, int]:
        part = int(self.part[index])
        return self.datasets[part], index - int(self.starts[part])

    def read(self, index: int) -> tuple[Any, int]:
        """(`Question`, index); its image is one of its own part's, whose names of images need not be those of others."""
        dataset, place = self._place(index)
        question = dataset[place][0]
        return replace(question, key=(int(self.part[index]), question.key)), index

    def where(self, index: int) -> str:
        """The place of a question in its own data."""
        dataset, place = self._place(index)
        return dataset.where(place)


class Numbered:
    """Prepared rows, whose targets are {"answer": target, "quality": number of the part}."""

    def __init__(self, rows: Any, part: np.ndarray) -> None:
        self.rows, self.part = rows, part
        self.name, self.blocks, self.window = rows.name, rows.blocks, rows.window
        self.labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        """The place of the question."""
        return str(self.rows.where(index))

    def read(self, index: int) -> tuple[Any, dict[str, Any]]:
        """(inputs, target)."""
        inputs, target = self.rows.read(index)
        return inputs, {"answer": target, "quality": int(self.part[index])}


def of_qualities(datasets: Mapping[str, Any]) -> ImageDataset:
    """Data sets of questions (what `open_questions` takes), by the qualities of their answers, as one: for `OfQuality`."""
    opened = {name: open_questions(data) for name, data in datasets.items()}
    return ImageDataset(QualityRows(opened), None, on_error=next(iter(opened.values())).on_error)


class OfQuality(Task):
    """A task whose samples have a quality each, which adapters read as `quality`.

    Args:
        inner: the task itself. qualities: their names.
        always: the quality of all samples, on data that has none; None: data of `of_qualities`, in the same order.
    """

    name = "of-quality"

    def __init__(self, inner: Task, qualities: Sequence[str], always: str | None = None) -> None:
        self.inner, self.qualities, self.always = inner, tuple(qualities), always
        self.noun, self.monitor, self.hub = inner.noun, inner.monitor, inner.hub  # type: ignore[misc]

    def open(
        self, model: Host, data: Any, *, train: bool, split: str | None = None, augment: str | None = None
    ) -> ImageDataset:
        """As the inner task, with the quality beside each target."""
        options: dict[str, Any] = {"train": train, "split": split, "augment": augment}
        if self.always is not None or (isinstance(data, ImageDataset) and isinstance(data.rows, Numbered)):
            return (
                data if isinstance(getattr(data, "rows", None), Numbered) else self.inner.open(model, data, **options)
            )
        if not isinstance(data, ImageDataset) or not isinstance(data.rows, QualityRows):
            raise DataError("These data say no quality of their answers; put them together with of_qualities({...}).")
        part = data.rows.part
        opened = self.inner.open(model, data, **options)
        return ImageDataset(Numbered(opened.rows, part), None, indices=opened.indices, on_error=opened.on_error)

    def check(self, model: Host, dataset: ImageDataset, what: str = "data set") -> None:
        """As the inner task."""
        self.inner.check(model, dataset, what)

    def loss(self, model: Host, inputs: Any, targets: Any, label_smoothing: float = 0.0) -> tuple[Tensor, Any]:
        """As the inner task."""
        return self.inner.loss(model, inputs, self._answer(targets), label_smoothing)

    def example(self, model: Host, inputs: Any, targets: Any) -> Any:
        """As the inner task."""
        return self.inner.example(model, inputs, self._answer(targets))

    def context(self, model: Host, inputs: Any, targets: Any, *, training: bool) -> dict[str, Any]:
        """`quality`, and what the inner task says."""
        said: Any = self.always
        if said is None:
            said = [self.qualities[i] for i in targets["quality"].tolist()]
        return {**self.inner.context(model, inputs, self._answer(targets), training=training), "quality": said}

    def metrics(self, model: Host) -> Mapping[str, Any]:
        """As the inner task."""
        return self.inner.metrics(model)

    @staticmethod
    def _answer(targets: Any) -> Any:
        return targets["answer"] if isinstance(targets, dict) else targets


@register_regime("meet")
@dataclass(eq=False)
class MeetRegime(Regime):
    """Controls first, then the network with them.

    `zoo.run(model, "meet", data={"good": ..., "bad": ...}, test=...)`: questions (or images with captions) by the quality of
    their answers, the wanted one first, and test questions with good answers. The model writes text and has no adapter in use.
    Afterwards it has the adapters `meet` and `whole` (full tuning; with `stages="controls"` the first alone).

    Args:
        form, num_tokens, rank: of the controls, as of the adapter `meet`.
        words: texts as whose embeddings prompts start, by quality; there are as many tokens as the longest has, the shorter ones
            are refused.
        stages: "both", "controls" or "model".
        controls: whether stage 2 trains the controls too.
        control_epochs, control_lr: of stage 1. epochs, lr: of stage 2, whose controls keep `control_lr`.
        answer_length: of answers in tokens, as of the task `generate`.
        weight_decay: of both.
    """

    form: str = "prompt"
    num_tokens: int = 10
    rank: int = 8
    words: dict[str, str] | None = None
    stages: str = "both"
    controls: bool = True
    control_epochs: int = 5
    control_lr: float = 1e-3
    epochs: int = 3
    lr: float = 1e-4
    answer_length: int | None = None
    weight_decay: float = 0.0

    paper = "Xue, Wang and Ji 2023"
    needs_head = False
    items = (Question,)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.form in ("prompt", "lora"), f"form is {self.form!r}; expected 'prompt' or 'lora'.")
        self.check(self.stages in STAGES, f"stages is {self.stages!r}; expected one of {', '.join(STAGES)}.")
        for name in ("num_tokens", "rank", "control_epochs", "epochs"):
            self.check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; expected 1 or more.")
        for name in ("control_lr", "lr"):
            self.check(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; expected more than 0.")
        self.check(self.weight_decay >= 0, f"weight_decay is {self.weight_decay}; expected 0 or more.")
        self.check(self.words is None or self.form == "prompt", "words start prompts; the form 'lora' has none.")
        self.check(
            self.controls or self.words is not None or self.stages != "model",
            "controls=False with stages='model' leaves the controls as they were drawn; give words=, or train them.",
        )

    def open(self, model: Model, source: Any) -> ImageDataset:
        """Questions, or images with captions."""
        return open_questions(source)

    def prepare(self, run: Run) -> None:
        """Data by quality, a model that writes and has no adapter in use."""
        if not isinstance(run.data, dict) or not run.data or not all(len(d) for d in run.data.values()):
            raise DataError(
                "meet: data= is a dict of questions by the quality of their answers, the wanted one first: {'good': ..., "
                "'bad': ...}; none of them is empty."
            )
        if run.test is not None and not isinstance(run.test, ImageDataset):
            raise DataError("meet: test= is one data set of questions with good answers.")
        if run.model.active:
            raise ConfigError(
                f"meet attaches its own adapters; in use are {', '.join(run.model.active)}. model.set_active()."
            )
        if taken := [name for name in (NAME, WHOLE) if name in run.model.adapters]:
            raise ConfigError(
                f"meet attaches an adapter '{taken[0]}', which the model has already. Remove or rename it."
            )
        if self.words is not None and set(self.words) != set(run.data):
            raise ConfigError(
                f"meet: words= are of {', '.join(self.words)}, and the data are {', '.join(run.data)}; give one text for each."
            )
        self._task(run).check(run.model, next(iter(run.data.values())))

    def phases(self, run: Run) -> Iterator[Phase]:
        """The controls, then the network with them; measured behind each."""
        model, names = run.model, tuple(run.data)
        ids = self._words(model, names)
        count = self.num_tokens if ids is None else ids.shape[1]
        controls = model.add_adapter(
            adapter("meet", qualities=names, form=self.form, num_tokens=count, rank=self.rank), NAME
        )
        if ids is not None:
            table: Tensor = model.backbone.get_input_embeddings().weight.detach()  # type: ignore[operator]
            with torch.no_grad():
                for prompt in controls.parameters():
                    prompt.copy_(table[ids.to(table.device)])
        data, task = of_qualities(run.data), OfQuality(self._task(run), names)
        common = {"weight_decay": self.weight_decay}
        self._measure(run, "start")
        if self.stages != "model":
            yield Phase(
                "controls", data, task=task, fit={**common, "epochs": self.control_epochs, "lr": self.control_lr}
            )
            self._measure(run, "controls")
        if self.stages == "controls":
            return
        model.add_adapter("full", WHOLE)
        rates = {WHOLE: self.lr, **({NAME: self.control_lr} if self.controls else {})}
        trained = None if self.controls else WHOLE
        yield Phase("model", data, task=task, trained=trained, fit={**common, "epochs": self.epochs, "lr": rates})
        self._measure(run, "model")

    def _task(self, run: Run) -> Task:
        return Generate(answer_length=self.answer_length)

    def _words(self, model: Model, names: Sequence[str]) -> Tensor | None:
        """(C, T) tokens of the texts that prompts start as.

        Raises:
            ConfigError: texts of different lengths: one would have to be padded, and padding is read.
        """
        if self.words is None:
            return None
        tokenizer: Any = model.family.tokenizer  # type: ignore[attr-defined]
        rows = [tokenizer(self.words[name], add_special_tokens=False)["input_ids"] for name in names]
        sizes = {name: len(row) for name, row in zip(names, rows, strict=True)}
        if len(set(sizes.values())) > 1 or not min(sizes.values()):
            found = ", ".join(f"'{self.words[n]}': {s}" for n, s in sizes.items())
            raise ConfigError(
                f"meet: the texts of words= have {found} tokens; expected as many of each, and at least 1."
            )
        return torch.tensor(rows)

    def _measure(self, run: Run, stage: str) -> None:
        if run.test is None:
            return
        for name in run.data:
            task = OfQuality(self._task(run), tuple(run.data), always=name)
            run.evaluate(run.test, f"{stage}: {name}", task=task)

    def summary(self, run: Run) -> dict[str, Any]:
        """The score under each control behind each stage, and the controllability."""
        if run.test is None:
            return {}
        names = list(run.data)
        found: dict[str, Any] = {}
        for stage in dict.fromkeys(key.partition(": ")[0] for key in run.values):
            scores = {name: run.values[f"{stage}: {name}"]["score"] for name in names}
            found[stage] = {"scores": scores, "controllability": scores[names[0]] - scores[names[-1]]}
        return found

    def table(self, report: RunReport) -> tuple[list[str], list[list[Any]]]:
        """One row for each stage."""
        if not report.summary:
            return report.phase_table()
        names = list(next(iter(report.summary.values()))["scores"])
        rows = [
            [stage, *(f"{found['scores'][n]:.4f}" for n in names), f"{found['controllability']:.4f}"]
            for stage, found in report.summary.items()
        ]
        return ["behind stage", *(f"score, {n}" for n in names), "controllability"], rows
