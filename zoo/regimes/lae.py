"""LAE: classes in sessions; a fast adapter learns them, a slow one keeps what was known, and both answer together.

Idea: the online adapter learns the session at hand; the offline one follows it by a moving average, so it changes slowly; at
inference each class is as likely as the more confident of the two says.

    theta_off <- a theta_off + (1 - a) theta_on                   after every optimizer step
    p(c | x) = max(softmax f(x; theta_on)_c, softmax f(x; theta_off)_c)      over all classes seen so far
    loss = cross-entropy over the logits of the session's own classes ("local"), so that old rows of the head are left alone

Session 0: adapter and head are trained, there is no offline adapter yet. Session t >= 1: the offline adapter begins as a copy of
the online one (at t = 1); the head grows by the new classes; the online adapter is frozen for the first `frozen_epochs` epochs,
while the head catches up (the speeds of learning of head and adapter are calibrated so), then trained with it. The head is
shared by both experts and not averaged. Only the data of the session at hand are used.

Points: those of the adapter that the model has (any method), or one of the three forms of the paper in blocks 0-4 (`FORMS`),
whose learnable scales bring all methods to one speed of adaptation:

| form      | where                          | settings                                                            | ViT-B/16 |
| --------- | ------------------------------ | ------------------------------------------------------------------- | -------- |
| `adapter` | parallel to the attention      | r = 5, GELU, scale s trained from 1                                 | 42,270   |
| `lora`    | k and v                        | r = 5, s_k and s_v trained from 1                                   | 76,810   |
| `prefix`  | keys and values of attention   | T = 10, s_k and s_v, U(0, 0.01), attention of the prefix sums to 1  | 76,810   |

Defaults: a = 0.9999; 5 epochs, 3 of them frozen; Adam, 2.8125e-3 (0.03 * 24 / 256), constant, batch 24, no weight decay, no
clipping; new rows of the head N(0, 0.001^2), biases 0, as the authors' (CIFAR-100; on ImageNet-R 50 epochs, 30 frozen,
4.6875e-4).

`offline=False` is sequential tuning: the same without offline adapter, freezing and ensemble. `joint=True` is the bound: session
t is trained on the data of all sessions so far, with the loss over all classes, from the adapter and head before it.

Source: Gao et al., "A Unified Continual Learning Framework with General Parameter-Efficient Tuning", ICCV 2023 (gqk/LAE).
Deviations: the last batch of an epoch that is not full is used; theirs is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.data.dataset import ImageDataset
from zoo.data.joined import with_classes
from zoo.errors import ConfigError
from zoo.regimes.base import Phase, Regime
from zoo.regimes.continual import accuracies, check_sessions, draw_matrix, forgetting, matrix_table
from zoo.regimes.report import RunReport
from zoo.regimes.work import Run
from zoo.registry import adapter, register_regime
from zoo.tasks.classify import Classify
from zoo.train.averages import MovingAverage

if TYPE_CHECKING:
    from zoo.adapters.base import Adapter
    from zoo.host import Host
    from zoo.model import Model

__all__ = ["FORMS", "LAE", "Ensemble"]

BLOCKS = "blocks.{0,1,2,3,4}"
FORMS: dict[str, Callable[..., Adapter]] = {
    "adapter": partial(
        adapter,
        "adapter",
        form="parallel",
        rank=5,
        targets=f"{BLOCKS}.attn",
        activation="gelu",
        scale=1.0,
        learn_scale=True,
    ),
    "lora": partial(adapter, "lora", rank=5, targets=f"{BLOCKS}.attn.{{k,v}}", learn_scale=True),
    "prefix": partial(
        adapter,
        "prefix",
        num_tokens=10,
        targets=f"{BLOCKS}.attn.product",
        learn_scale=True,
        compensate=True,
        init="uniform",
    ),
}


def ensemble(model: Any, experts: tuple[str, ...], inputs: Any) -> Tensor:
    """(B, K): elementwise maximum of the experts' probabilities; the adapters in use stay as they are."""
    active, found = model.active, []
    try:
        for name in experts:
            model.set_active(name)
            found.append(model(inputs).float().softmax(dim=-1))
    finally:
        model.set_active(*active)
    return torch.stack(found).amax(dim=0)


class Ensemble(nn.Module):
    """A model whose answer is the elementwise maximum of the probabilities of several of its adapters, (B, K).

    Args:
        model: with these adapters, which share its head.
        experts: their names.
    """

    def __init__(self, model: Model, experts: tuple[str, ...]) -> None:
        super().__init__()
        for name in experts:
            model._known(name)
        self.model, self.experts = model, tuple(experts)

    def forward(self, inputs: Any) -> Tensor:
        """Inputs of the model -> probabilities, whose sum may exceed 1."""
        return ensemble(self.model, self.experts, inputs)


class LocalClassify(Classify):
    """Cross-entropy over the logits of classes `start` and up; measured over all classes, by the ensemble of `experts`."""

    grows = True

    def __init__(self, start: int, experts: tuple[str, ...] = ()) -> None:
        self.start, self.experts = start, experts

    def loss(self, model: Host, inputs: Any, targets: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """(loss, outputs over all classes)."""
        if not model.training and len(self.experts) > 1:
            outputs = ensemble(model, self.experts, inputs).clamp_min(1e-30).log()
            return F.nll_loss(outputs, targets), outputs
        outputs = model(inputs).float()
        own = outputs[:, self.start :]
        return F.cross_entropy(own, targets - self.start, label_smoothing=label_smoothing), outputs


class FrozenAtFirst:
    """A callback: parameters of one adapter are frozen for the first epochs of a fit."""

    def __init__(self, owner: str, epochs: int) -> None:
        self.owner, self.epochs = owner, epochs

    def fit_start(self, model: Any, optimizer: Any, total_steps: int) -> None:
        """Remember the optimizer."""
        self.optimizer = optimizer

    def epoch_start(self, model: Any, epoch: int) -> None:
        """Freeze at first, let go later; which it is now is in the optimizer's checkpoint."""
        names = [n for n in self.optimizer.parameters if n.startswith(f"{self.owner}/")]
        if epoch == 0 and self.epochs > 0:
            self.optimizer.freeze(names)
        if epoch == self.epochs:
            self.optimizer.unfreeze(names)


@register_regime("lae")
@dataclass(eq=False)
class LAE(Regime):
    """Class-incremental learning by two adapters.

    `zoo.run(model, "lae", data=sessions, test=sessions)`: data sets of disjoint classes in the order in which they come
    (`zoo.data.by_class`), and test data of the same sessions. The model has one adapter in use, or none: then `form` is attached.
    It begins without a head. Afterwards its head knows all classes; the adapters `<name>` and `<name>-offline` are the experts.

    Args:
        form: "adapter", "lora" or "prefix", for a model that has no adapter in use.
        epochs: of each session. frozen_epochs: the first of them in which the adapter stands still (from session 1).
        decay: a. lr, batch_size: of the fits.
        offline: with the offline expert; false is sequential tuning. joint: train on all sessions so far (the upper bound).
    """

    form: str = "adapter"
    epochs: int = 5
    frozen_epochs: int = 3
    decay: float = 0.9999
    lr: float = 2.8125e-3
    batch_size: int = 24
    offline: bool = True
    joint: bool = False

    paper = "Gao et al. 2023"
    needs_head = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.form in FORMS, f"form is {self.form!r}; expected one of {', '.join(FORMS)}.")
        self.check(self.epochs >= 1, f"epochs is {self.epochs}; expected 1 or more.")
        self.check(
            0 <= self.frozen_epochs < self.epochs,
            f"frozen_epochs is {self.frozen_epochs} of {self.epochs} epochs; the adapter would never learn.",
        )
        self.check(0 <= self.decay <= 1, f"decay is {self.decay}; expected a number from 0 to 1.")
        self.check(
            not (self.joint and self.offline), "joint is the bound without an offline expert; set offline=False."
        )

    def prepare(self, run: Run) -> None:
        """Sessions of classes that are new each time, their test data, a model without a head."""
        check_sessions("lae", run)
        if len(run.model.active) > 1:
            raise ConfigError(
                f"lae learns with one adapter; in use are {', '.join(run.model.active)}. model.set_active(one)."
            )
        if run.model.num_classes:
            raise ConfigError("lae grows the head from nothing: load the model with num_classes=0.")

    def phases(self, run: Run) -> Iterator[Phase]:
        """One phase for each session; measured on every session so far behind each."""
        model, sessions = run.model, run.data
        if not model.active:
            model.add_adapter(FORMS[self.form]())
        name = model.active[0]
        slow = f"{name}-offline"
        for number, session in enumerate(sessions):
            start = 0 if self.joint else model.num_classes
            model.grow_head(session.classes, std=0.001)
            classes = list(model.classes or ())
            callbacks: list[Any] = []
            if self.offline and number:
                if number == 1:
                    model.copy_adapter(name, slow)
                callbacks = [FrozenAtFirst(name, self.frozen_epochs), MovingAverage(name, slow, self.decay)]
            data = with_classes(session, classes)
            if self.joint and number:
                data = _together([with_classes(s, classes) for s in sessions[: number + 1]], classes)
            yield Phase(
                f"session-{number}",
                data,
                task=LocalClassify(start),
                callbacks=callbacks,
                fit={
                    "epochs": self.epochs,
                    "lr": self.lr,
                    "batch_size": self.batch_size,
                    "optimizer": "adam",
                    "weight_decay": 0.0,
                    "schedule": "constant",
                    "warmup": 0.0,
                    "clip": None,
                },
            )
            experts = (name, slow) if callbacks else (name,)
            for past in range(number + 1):
                test = with_classes(run.test[past], classes)
                run.evaluate(test, f"session {past} after {number}", task=LocalClassify(0, experts))
                if callbacks:  # what each expert knows alone
                    run.evaluate(test, f"session {past} after {number}, online", task=LocalClassify(0))
                    model.set_active(slow)
                    run.evaluate(test, f"session {past} after {number}, offline", task=LocalClassify(0))
                    model.set_active(name)

    def summary(self, run: Run) -> dict[str, Any]:
        """Accuracy matrix (row: after session, column: on session), last, mean incremental accuracy, forgetting."""
        count = len(run.data)
        found: dict[str, Any] = {}
        for kind in ("", ", online", ", offline"):
            matrix, seen = accuracies(run, kind)
            key = kind.removeprefix(", ")
            if not key:
                found |= {"matrix": matrix, "seen": seen, "classes": [t.classes for t in run.test]}
                found |= {"last": seen[-1], "average": sum(seen) / count, "forgetting": forgetting(matrix)}
            elif self.offline and count > 1:
                found |= {f"last_{key}": seen[-1], f"forgetting_{key}": forgetting(matrix)}
        return found

    def table(self, report: RunReport) -> tuple[list[str], list[list[Any]]]:
        """The accuracy matrix."""
        return matrix_table(report.summary)

    def draw(self, figure: Any, report: RunReport) -> None:
        """The accuracy matrix, and the accuracy over all classes seen so far."""
        draw_matrix(figure, report.summary)


def _together(parts: list[ImageDataset], classes: list[str]) -> ImageDataset:
    """Data sets of the same classes one behind the other."""
    from zoo.data.joined import ConcatRows

    return ImageDataset(ConcatRows(parts), classes, on_error=parts[0].on_error)
