"""Sessions of new classes, of which there are few images: prompts of a CLIP learn them one after the other.

The method is the adapter `cpe-clip` (or another one whose classes are names); this is how its authors train it. Session 0 brings
many classes with all their images, each later one some new classes with K images of each. Nothing is kept of earlier sessions.

    loss = cross-entropy over the logits of the session's own classes            those of earlier sessions are masked
    g   <- g |C_s| / (|C_0| + ... + |C_s|)                  s >= 1               all gradients of session s, C_s its classes
    theta <- SGD(theta, g), momentum 0.9, weight decay 1e-5, a fresh optimizer in each session

The share of new classes shrinks the steps as classes become more, so what was learned of many classes moves less for few. It has
its effect because the optimizer is SGD; one that divides by the size of gradients would undo it.
Rates by epoch: from `lr_min` up to `lr_max` in 50 epochs, then by a cosine down again until epoch 200, and from the beginning; a
session of 5 epochs sees 0.001, 0.00298, 0.00496, 0.00694, 0.00892 (the authors' `lr` of 0.00325 is never used).
Behind each session the accuracy on every session so far is measured, with all classes seen as answers.
Defaults: the authors' for CIFAR-100 and miniImageNet (60 classes, then 8 sessions of 5): batch 32 and 5 epochs in session 0, then
batch 4 and 5 epochs, K = 5, no augmentation. On CUB-200 (100 classes, then 10 sessions of 10) session 0 is 6 epochs of batch 4.
Seeds there: 42, 13, 50, 24, 69.
Source: D'Alessandro et al., "Multimodal Parameter-Efficient Few-Shot Class Incremental Learning", ICCV Workshops 2023;
neuraptic/cpe-clip (CoLeLib/training/strategies/clip_pe.py).
Deviations: theirs masks by the number -9999 in the place of logits, which gives the same loss and gradients. Their weight decay
acts on the bias of the common map, too; ours on matrices alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from zoo import Phase, Regime
from zoo.data import ImageDataset, few_shot
from zoo.data.joined import with_classes
from zoo.errors import ConfigError
from zoo.regimes import Run, RunReport
from zoo.regimes.continual import accuracies, check_sessions, draw_matrix, forgetting, matrix_table
from zoo.regimes.lae import LocalClassify
from zoo.registry import adapter, adapter_class, register_regime

__all__ = ["CPEClipSessions", "Shrink", "rate_of"]

WARMUP, CYCLE = 50, 200  # epochs


def rate_of(epoch: int, low: float, high: float) -> float:
    """The learning rate of an epoch: up in a line for `WARMUP` epochs, down by a cosine until `CYCLE`, and again."""
    at = epoch % CYCLE
    if at < WARMUP:
        return low + (high - low) * at / WARMUP
    return low + (high - low) * (1 + math.cos(math.pi * (at - WARMUP) / (CYCLE - WARMUP))) / 2


class Shrink:
    """A callback: gradients times a factor, and a learning rate for each epoch.

    Args:
        factor: of all gradients. low, high: of `rate_of`.
    """

    def __init__(self, factor: float, low: float, high: float) -> None:
        self.factor, self.low, self.high = factor, low, high

    def fit_start(self, model: Any, optimizer: Any, total_steps: int) -> None:
        """Remember the optimizer."""
        self.optimizer = optimizer

    def epoch_start(self, model: Any, epoch: int) -> None:
        """The epoch's rate; it is part of the optimizer's checkpoint."""
        self.optimizer.scale_lr(
            list(self.optimizer.parameters), rate_of(epoch, self.low, self.high) / self.optimizer.lr
        )

    def after_backward(self, model: Any, step: int) -> None:
        """Shrink what moves the parameters."""
        for parameter in self.optimizer.parameters.values():
            if parameter.grad is not None:
                parameter.grad.mul_(self.factor)


@register_regime("cpe-clip")
@dataclass(eq=False)
class CPEClipSessions(Regime):
    """Few-shot class-incremental learning by the prompts of a CLIP.

    `zoo.run(model, "cpe-clip", data=sessions, test=sessions)`: data sets of disjoint classes in the order in which they come
    (`zoo.data.by_class(data, [60] + [5] * 8)`), and test data of the same sessions. The model has no adapter and no head.

    Args:
        method: the adapter that learns; one that reads the names of the classes (cpe-clip, maple, coop, cocoop).
        shots: K, images of each class from session 1 on, drawn by the seed; None: all that are given.
        base_epochs, base_batch_size: of session 0. epochs, batch_size: of those behind it.
        lr_min, lr_max: of the rates by epoch.
        balance: shrink the gradients by the share of new classes; false is plain tuning from session to session.
    """

    method: str = "cpe-clip"
    shots: int | None = 5
    base_epochs: int = 5
    base_batch_size: int = 32
    epochs: int = 5
    batch_size: int = 4
    lr_min: float = 1e-3
    lr_max: float = 0.1
    balance: bool = True

    paper = "D'Alessandro et al. 2023"
    needs_head = False

    def __post_init__(self) -> None:
        super().__post_init__()
        reads = adapter_class(self.method).head_kind in ("text", "image-text")
        self.check(
            reads,
            f"method is '{self.method}', which does not read the names of classes; expected cpe-clip, maple, coop or cocoop.",
        )
        for name in ("base_epochs", "base_batch_size", "epochs", "batch_size"):
            self.check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; expected 1 or more.")
        self.check(
            self.shots is None or self.shots >= 1, f"shots is {self.shots}; expected 1 or more, or None for all."
        )
        self.check(
            0 < self.lr_min <= self.lr_max <= 100,
            f"lr_min is {self.lr_min}, lr_max {self.lr_max}; expected 0 < lr_min <= lr_max.",
        )

    def prepare(self, run: Run) -> None:
        """Sessions of classes that are new each time with images enough, their test data, and a model as it comes."""
        check_sessions("cpe-clip", run)
        for session in run.data[1:]:
            self._part(session)
        if run.model.active or run.model.num_classes:
            raise ConfigError(
                f"cpe-clip attaches '{self.method}' with a head of names by itself: load the model without an adapter and "
                "without classes."
            )
        if "text" not in run.model.family.gives:
            raise ConfigError(
                f"cpe-clip compares images with names of classes, and '{run.model.backbone_name}' has no text tower. Use one of "
                "the family 'clip', such as clip-micro."
            )

    def phases(self, run: Run) -> Iterator[Phase]:
        """One phase for each session; measured on every session so far behind each."""
        model = run.model
        for number, session in enumerate(run.data):
            old = len(model.classes or ()) if number else 0
            if number:
                model.grow_head(session.classes)
            else:
                model.add_adapter(adapter(self.method), num_classes=len(session.classes))
                model.classes = list(session.classes)
            classes = list(model.classes or ())
            part = self._part(session) if number else session
            share = len(session.classes) / len(classes) if self.balance else 1.0
            yield Phase(
                f"session-{number}",
                with_classes(part, classes),
                task=LocalClassify(old),
                callbacks=[Shrink(share, self.lr_min, self.lr_max)],
                fit={
                    "epochs": self.epochs if number else self.base_epochs,
                    "batch_size": self.batch_size if number else self.base_batch_size,
                    "lr": self.lr_max,
                    "optimizer": "sgd",
                    "weight_decay": 1e-5,
                    "schedule": "constant",
                    "warmup": 0.0,
                    "clip": None,
                    "augment": "none",
                },
            )
            for past in range(number + 1):
                test = with_classes(run.test[past], classes)
                run.evaluate(test, f"session {past} after {number}", task=LocalClassify(0))

    def _part(self, session: ImageDataset) -> ImageDataset:
        """The images of a later session that are learned from."""
        return session if self.shots is None else few_shot(session, self.shots, self.seed)

    def summary(self, run: Run) -> dict[str, Any]:
        """Accuracy matrix (row: after session, column: on session), over all classes seen, first less last, forgetting."""
        matrix, seen = accuracies(run)
        found: dict[str, Any] = {"matrix": matrix, "seen": seen, "classes": [t.classes for t in run.test]}
        found |= {"last": seen[-1], "average": sum(seen) / len(seen), "drop": seen[0] - seen[-1]}
        return {**found, "forgetting": forgetting(matrix)}

    def table(self, report: RunReport) -> tuple[list[str], list[list[Any]]]:
        """The accuracy matrix."""
        return matrix_table(report.summary)

    def draw(self, figure: Any, report: RunReport) -> None:
        """The accuracy matrix, and the accuracy over all classes seen so far."""
        draw_matrix(figure, report.summary)
