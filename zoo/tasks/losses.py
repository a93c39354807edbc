"""Losses by name, and weights of classes, for tasks that train a head.

    zoo.fit(model, train, loss="focal", class_weights="balanced")

| loss | task | of an item with logits z and target t |
| --- | --- | --- |
| `cross-entropy` | classify | -sum_c t_c log p_c, p = softmax(z) |
| `focal` | classify | -sum_c t_c (1 - p_c)^2 log p_c (Lin et al. 2017) |
| `bce` | classify | sum_c -t_c log s(z_c) - (1 - t_c) log(1 - s(z_c)), s the logistic function |
| `bce`, `focal` | multilabel | the mean of the same terms; for `focal` each times (1 - p)^2, p the probability of what is right |
| `mse`, `mae`, `huber` | regress | (z - t)^2, its absolute value, Huber's with a width of 1 |

A loss of one's own is a function of (outputs, targets), for a mean or for one number for each item. Class weights multiply the
loss of each item of a class while training; "balanced" is n / (K n_c), as scikit-learn has it: a mean of 1 over the items of the
training data. (Of several classes for an item it is the weight of a yes, the number of noes for each of them.) The mean over a
batch is over its items, so that neither the number of processes nor of parts changes it. The loss of an evaluation has neither
weights nor smoothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.data.dataset import Skipped
from zoo.data.sampling import class_weights
from zoo.errors import ConfigError, DataError, nearest
from zoo.tasks.base import Task, as_loss

if TYPE_CHECKING:
    from zoo.data.dataset import ImageDataset
    from zoo.host import Host

__all__ = ["Loss", "Weighted", "cross_entropy", "focal", "one_versus_all"]

Loss = Callable[..., Tensor]
GAMMA = 2.0


def cross_entropy(outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """(B, K), and (B,) classes or (B, K) probabilities -> (B,)."""
    return F.cross_entropy(outputs, targets, label_smoothing=label_smoothing, reduction="none")


def _soft(outputs: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Targets (B, K), smoothed as `torch.nn.functional.cross_entropy` does."""
    soft = F.one_hot(targets, outputs.shape[1]).to(outputs) if targets.ndim == 1 else targets.to(outputs)
    return soft * (1 - label_smoothing) + label_smoothing / outputs.shape[1]


def focal(outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0, gamma: float = GAMMA) -> Tensor:
    """(B, K), and (B,) classes or (B, K) probabilities -> (B,); gamma 0 is cross-entropy."""
    logs = outputs.log_softmax(1)
    return -(_soft(outputs, targets, label_smoothing) * (1 - logs.exp()) ** gamma * logs).sum(1)


def one_versus_all(outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """(B, K), and (B,) classes or (B, K) probabilities -> (B,): a yes or no for every class."""
    soft = _soft(outputs, targets, label_smoothing)
    return F.binary_cross_entropy_with_logits(outputs, soft, reduction="none").sum(1)


class Weighted(Task):
    """A task whose loss can be chosen, and in which classes may weigh differently."""

    losses: ClassVar[
        Mapping[str, Loss]
    ] = {}  # name -> (outputs, targets, label_smoothing) -> (B,); the first is the default
    chosen: str | Loss | None = None
    class_weights: str | Sequence[float] | Mapping[str, float] | None = None
    weights: Tensor | None = None  # (K,), of a run

    def with_loss(self, loss: str | Loss | None, class_weights: Any = None) -> Weighted:
        """The same task with another loss.

        Raises:
            ConfigError: no such loss, or weights that are none.
        """
        if isinstance(loss, str) and loss not in self.losses:
            raise ConfigError(f"loss is '{loss}', which '{self.name}' does not have. {nearest(loss, self.losses)}")
        twin = copy.copy(self)
        twin.chosen, twin.class_weights, twin.weights = loss, class_weights, None
        return twin

    def weigh(self, model: Host, dataset: ImageDataset) -> None:
        """Make the weights of the classes, by the training data.

        Raises:
            ConfigError: not a weight for each class, or names of other classes.
        """
        given = self.class_weights
        if given is None:
            return
        count = model.num_classes
        if isinstance(given, str):
            if given != "balanced":
                raise ConfigError(f"class_weights is '{given}'; expected 'balanced', or a weight for each class.")
            values = self.balanced(dataset, count)
        elif isinstance(given, Mapping):
            names = dataset.classes or [str(i) for i in range(count)]
            if wrong := [str(n) for n in given if str(n) not in names]:
                raise ConfigError(f"class_weights has an entry '{wrong[0]}'. {nearest(wrong[0], names)}")
            values = [float(given.get(name, 1.0)) for name in names]
        else:
            values = [float(v) for v in given]
        if len(values) != count or any(v < 0 for v in values) or not any(values):
            raise ConfigError(
                f"class_weights has {len(values)} numbers, {values[:8]}; expected one of at least 0 for each of {count} classes."
            )
        self.weights = torch.tensor(values)

    def balanced(self, dataset: ImageDataset, count: int) -> list[float]:
        """The weights "balanced": n / (K n_c) of the K classes that occur, 1 of the others."""
        return class_weights(dataset, count).tolist()

    def objective(self, model: Host, outputs: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
        """The mean loss of a batch."""
        if callable(self.chosen):
            if label_smoothing:
                raise ConfigError("label_smoothing is part of the losses that have a name; smooth inside your own.")
            loss = as_loss(self.chosen(outputs, targets))
        else:
            loss = self.losses[self.chosen or next(iter(self.losses))](outputs, targets, label_smoothing)
        if self.weights is not None and model.training:
            if not self.weighs(loss, outputs):
                raise ConfigError(
                    f"class_weights weigh the loss of each item, and this loss is of shape {tuple(loss.shape)}. Let it give one "
                    "number for each item (reduction='none')."
                )
            loss = loss * self.weight_of(outputs, targets)
        return loss.mean()

    def weighs(self, loss: Tensor, outputs: Tensor) -> bool:
        """Whether a loss has a number for each of what weighs: items."""
        return loss.shape == outputs.shape[:1]

    def weight_of(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(B,) weights of items of (B,) classes, or of (B, K) shares of classes."""
        assert self.weights is not None
        weights = self.weights.to(outputs)
        return weights[targets] if targets.ndim == 1 else targets.to(outputs) @ weights


def tags_of(dataset: ImageDataset) -> np.ndarray:
    """(n, K) targets of 0 and 1; reads every item once where the source does not tell them.

    Raises:
        DataError: an item that cannot be read.
    """
    known = getattr(dataset, "targets", None)
    if known is not None:
        return np.asarray(known, dtype=np.float64)
    plain, rows = dataset.with_transform(None), []
    for i in range(len(dataset)):
        item = plain[i]
        if isinstance(item, Skipped):
            raise DataError(f"{item.where}: {item.reason}")
        rows.append(np.asarray(item[1], dtype=np.float64))
    return np.stack(rows)
