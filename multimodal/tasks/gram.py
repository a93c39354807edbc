"""Meta-training of prompts and of the regulator of their gradients (`multimodal.adapters.gram`), as an ordinary fit.

    loss = L_Q(theta - a R(grad L_S(theta)))        S: the first half of a batch, Q: the second; L: another task's loss

The gradient of theta and s through the inner step is exact (`zoo.second_order`); `first_order` takes g_S for a constant in theta,
which costs half and is exact in s. S and Q of a batch come from different clusters (`Episodes`): pairs are cut into groups by
their texts, and each group into clusters by its images (`clusters`), so that a step learned on one kind of images of a subject is
judged by another kind. With `accumulate=4` a step is made of four such tasks.

Evaluation is that of the other task, without an inner step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import zoo
from multimodal.adapters.gram import GRAM
from zoo.data.dataset import ImageDataset
from zoo.data.seeds import mixed_seed
from zoo.errors import ConfigError, DataError
from zoo.registry import register_task
from zoo.registry import task as make_task
from zoo.tasks.base import Task
from zoo.train.samplers import Sampled, Sampler

if TYPE_CHECKING:
    from zoo.host import Host

__all__ = ["Episodes", "Meta", "clusters"]


@register_task("gram")
class Meta(Task):
    """See the module.

    Args:
        inner: the task of which L is the loss, or its name: "classify" for prompts in front of class names, "contrast" for
            others, whose pairs are classes of each other.
        inner_lr: a. first_order: as above.
    """

    def __init__(self, inner: Task | str = "classify", inner_lr: float = 1e-2, first_order: bool = False) -> None:
        if not (math.isfinite(inner_lr) and inner_lr >= 0):
            raise ConfigError(f"inner_lr is {inner_lr}; expected 0 or more.")
        self.inner: Task = make_task(inner) if isinstance(inner, str) else inner
        self.inner_lr, self.first_order = inner_lr, first_order
        for name in ("monitor", "on_head", "labels", "noun"):
            setattr(self, name, getattr(self.inner, name))

    def open(
        self, model: Host, data: Any, *, train: bool, split: str | None = None, augment: str | None = None
    ) -> ImageDataset:
        """As the inner task.

        Raises:
            ConfigError: data to learn from, for a regulator that is learned and frozen.
        """
        if train and _regulator(model).learned:
            raise ConfigError(
                "The regulator is learned and frozen since its meta-training, so another one would leave it as it is. "
                "model.adapters['gram'].learn_again() lets it go on; to tune the prompts, fit without this task."
            )
        return self.inner.open(model, data, train=train, split=split, augment=augment)

    def check(self, model: Host, dataset: ImageDataset, what: str = "data set") -> None:
        """As the inner task, and raise ConfigError without a regulator."""
        self.inner.check(model, dataset, what)
        _regulator(model)

    def check_batch(self, model: Host, dataset: ImageDataset, targets: Any) -> None:
        """As the inner task."""
        self.inner.check_batch(model, dataset, targets)

    def example(self, model: Host, inputs: Any, targets: Any) -> Any:
        """As the inner task."""
        return self.inner.example(model, inputs, targets)

    def metrics(self, model: Host) -> Mapping[str, Any]:
        """Those of the inner task."""
        return self.inner.metrics(model)

    def loss(self, model: Host, inputs: Any, targets: Any, label_smoothing: float = 0.0) -> tuple[Tensor, Any]:
        """L_Q behind the inner step; outputs are those of S in front of it, and those of Q behind it.

        Raises:
            DataError: a batch that has no two halves.
        """
        if not model.training:
            return self.inner.loss(model, inputs, targets, label_smoothing)
        count = len(targets)
        if count < 2 or count % 2:
            raise DataError(f"A batch of {count} has no two halves, one to learn on and one to judge by.")
        parts = [(_rows(inputs, part), targets[part]) for part in (slice(count // 2), slice(count // 2, None))]
        (support, query), regulator = parts, _regulator(model)
        whole: Any = model
        with zoo.second_order(whole):
            found = list(regulator.regulated(model))
            theta: list[Any] = [holder._parameters[last] for _, holder, last, _ in found]
            first, seen = self.inner.loss(model, *support, label_smoothing)
            gradients = torch.autograd.grad(first, theta, create_graph=not self.first_order)
            moved = [
                (holder, last, p - self.inner_lr * (1 + scale) * g)
                for (_, holder, last, scale), p, g in zip(found, theta, gradients, strict=True)
            ]
            with _standing(moved):
                loss, outputs = self.inner.loss(model, *query, label_smoothing)
        if isinstance(outputs, Tensor):  # a row for each item of the batch
            outputs = torch.cat([seen.detach(), outputs])
        return loss, outputs


def _regulator(model: Host) -> GRAM:
    found = [a for n in model.active if isinstance(a := model.adapters[n], GRAM)]
    if len(found) != 1:
        raise ConfigError(
            f"The task 'gram' learns the regulator of one 'gram' adapter, and {len(found)} are in use: put one around the "
            "prompts by multimodal.adapters.gram.regulate(model, name)."
        )
    return found[0]


def _rows(inputs: Any, part: slice) -> Any:
    return tuple(x[part] for x in inputs) if isinstance(inputs, (tuple, list)) else inputs[part]


@contextmanager
def _standing(moved: list[tuple[nn.Module, str, Tensor]]) -> Iterator[None]:
    """Values with a graph in the place of parameters."""
    before = [(holder, name, holder._parameters[name]) for holder, name, _ in moved]
    try:
        for holder, name, value in moved:
            holder._parameters[name] = value  # type: ignore[assignment]
        yield
    finally:
        for holder, name, own in before:
            holder._parameters[name] = own


# -- tasks --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Episodes(Sampler):
    """Batches of `size` items: half of one cluster, half of another one of the same group.

    Args:
        groups: of each item. clusters: of each item, within its group. size: an even number that divides the batch.
    """

    groups: tuple[int, ...]
    clusters: tuple[int, ...]
    size: int

    def over(self, dataset: ImageDataset, batch_size: int, seed: int) -> Sampled:
        """See `Sampler`; raises ConfigError for other numbers of items, DataError where no group has two clusters."""
        if len(self.groups) != len(dataset) or len(self.clusters) != len(dataset):
            raise ConfigError(f"groups and clusters are of {len(self.groups)} items, and the data has {len(dataset)}.")
        if self.size < 2 or self.size % 2 or batch_size % self.size:
            raise ConfigError(f"size is {self.size}; expected an even number that divides batch_size, {batch_size}.")
        pairs = np.stack([self.groups, self.clusters], axis=1)
        members: dict[int, list[np.ndarray]] = {}
        for group, cluster in np.unique(pairs, axis=0):
            members.setdefault(int(group), []).append(np.flatnonzero((pairs == (group, cluster)).all(axis=1)))
        able = [parts for parts in members.values() if len(parts) > 1]
        if not able:
            raise DataError("No group has two clusters, so nothing judges what is learned on one. Make fewer groups.")
        half, tasks = self.size // 2, math.ceil(len(dataset) / batch_size) * (batch_size // self.size)

        def order(epoch: int) -> np.ndarray:
            random = np.random.default_rng(mixed_seed(seed, "episodes", epoch))
            rows = []
            for _ in range(tasks):
                parts = able[int(random.integers(len(able)))]
                for i in random.permutation(len(parts))[:2]:
                    rows.append(random.choice(parts[i], half, replace=len(parts[i]) < half))
            return np.concatenate(rows)

        return Sampled(tasks * self.size, order)


def clusters(
    images: Tensor, texts: Tensor, first: int = 20, second: int = 5, seed: int = 0
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Features (n, d) of images and of their texts -> (groups by texts, clusters by images within each), by k-means.

    Raises:
        DataError: not one text for each image.
    """
    if len(images) != len(texts) or not len(images):
        raise DataError(f"There are {len(images)} images and {len(texts)} texts; expected as many, and some.")
    groups = _means(texts, first, seed)
    inside = torch.zeros_like(groups)
    for group in groups.unique():
        mine = (groups == group).nonzero().flatten()
        inside[mine] = _means(images[mine], second, seed)
    return tuple(groups.tolist()), tuple(inside.tolist())


def _means(x: Tensor, k: int, seed: int, rounds: int = 50) -> Tensor:
    """k-means of directions: (n, d) -> (n,) numbers of clusters, fewer where there are fewer items."""
    x = nn.functional.normalize(x.float(), dim=-1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    centres = x[order[:k]]
    nearest = torch.zeros(len(x), dtype=torch.long)
    for _ in range(rounds):
        closest = (x @ centres.T).argmax(dim=1)
        sums = torch.zeros_like(centres).index_add_(0, closest, x)
        empty = (sums == 0).all(dim=1, keepdim=True)
        centres = nn.functional.normalize(torch.where(empty, centres, sums), dim=-1)
        if torch.equal(closest, nearest):
            break
        nearest = closest
    return nearest
