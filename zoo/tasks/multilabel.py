"""Several classes for each item (AudioSet, tags of a picture): one yes or no for every output of the head.

    loss = mean over items and classes of -(t log s(z) + (1 - t) log(1 - s(z)))            s: the logistic function

Measured by the mean average precision: items are ranked by a class's score, the precision at the rank of each item that has
the class is averaged over these items, and then over the classes that occur. Tied scores share one rank, so a constant score has
the precision of chance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.data.sampling import tag_weights
from zoo.errors import ConfigError, DataError, MismatchError
from zoo.registry import register_task
from zoo.tasks.base import call, check_names, check_whole, seen_targets
from zoo.tasks.losses import GAMMA, Weighted, tags_of

if TYPE_CHECKING:
    from zoo.data.dataset import ImageDataset
    from zoo.host import Host

__all__ = ["MeanAveragePrecision", "MultiLabel", "average_precision"]


def average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """scores and targets (n, K), targets 0 or 1 -> (K,), NaN for classes that no item has."""
    order = scores.argsort(dim=0, descending=True)
    ranked, hits = scores.gather(0, order), targets.gather(0, order).double()
    # items of one score are one step of the ranking: only its last item has a precision
    last = torch.cat([ranked[1:] != ranked[:-1], torch.ones_like(ranked[:1], dtype=torch.bool)])
    found = hits.cumsum(0)
    ranks = torch.arange(1, len(scores) + 1, device=scores.device).unsqueeze(1)
    precision = found / ranks
    ends = torch.where(last, found, torch.zeros_like(found))
    before = torch.cat([torch.zeros_like(found[:1]), ends.cummax(0).values[:-1]])
    steps = torch.where(last, found - before, torch.zeros_like(found))
    return (precision * steps).sum(0) / found[-1]


class MeanAveragePrecision:
    """`update(outputs, targets)`, `compute()`, `reset()`; all scores are kept, those of other processes gathered at the end."""

    def __init__(self) -> None:
        self._scores: list[Tensor] = []
        self._targets: list[Tensor] = []

    def reset(self) -> None:
        """Forget all batches."""
        self._scores, self._targets = [], []

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take up a batch: scores (B, K) of any scale, targets (B, K) of 0 and 1."""
        self._scores.append(outputs.detach().float().cpu())
        self._targets.append(targets.detach().bool().cpu())

    def compute(self) -> float:
        """The mean over the classes that occur, 0..1; NaN if none does."""
        parts = [(s, t) for s, t in zip(self._scores, self._targets, strict=True)]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            everywhere: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everywhere, parts)
            parts = [part for process in everywhere for part in process]
        if not parts:
            return float("nan")
        scores, targets = (torch.cat(column) for column in zip(*parts, strict=True))
        return float(average_precision(scores, targets).nanmean())


def yes_or_no(outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """(B, K), (B, K) -> (B, K)."""
    wanted = targets.float() * (1 - label_smoothing) + label_smoothing / 2
    return F.binary_cross_entropy_with_logits(outputs, wanted, reduction="none")


def focal_yes_or_no(outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """(B, K), (B, K) -> (B, K): the terms of a yes and of a no, each times (1 - p)^2 of its own probability p."""
    wanted = targets.float() * (1 - label_smoothing) + label_smoothing / 2
    yes, no = F.logsigmoid(outputs), F.logsigmoid(-outputs)
    return -(wanted * no.exp() ** GAMMA * yes + (1 - wanted) * yes.exp() ** GAMMA * no)


@register_task("multilabel")
class MultiLabel(Weighted):
    """Any number of the head's classes for each item: binary cross-entropy, or focal loss; mean average precision ("map").

    Targets are (num_classes,) of 0 and 1 (or probabilities). Class weights are those of a yes.
    """

    losses = {"bce": yes_or_no, "focal": focal_yes_or_no}
    monitor, on_head, labels = "map", True, "tags"

    def check(self, model: Host, dataset: ImageDataset, what: str = "data set") -> None:
        """Raise unless the head and the data set have the same number of classes."""
        check_whole(model, self.name, len(dataset.classes or ()))
        if not model.num_classes:
            classes = len(dataset.classes) if dataset.classes else "<number of classes>"
            raise ConfigError(
                f"The model has no classification head (num_classes=0). Load it with num_classes={classes}."
            )
        if dataset.classes is not None and len(dataset.classes) != model.num_classes:
            raise MismatchError(
                f"The {what} '{dataset.name}' has {len(dataset.classes)} classes, the model's head {model.num_classes}. "
                f"Load the model with num_classes={len(dataset.classes)}."
            )
        check_names(model, dataset, what)

    def check_batch(self, model: Host, dataset: ImageDataset, targets: Any) -> None:
        """Raise DataError unless targets are (B, num_classes)."""
        if not isinstance(targets, Tensor) or targets.ndim != 2 or targets.shape[1] != model.num_classes:
            shape = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
            raise DataError(
                f"{dataset.name}: targets {shape}; expected (B, {model.num_classes}) of 0 and 1, several classes for each item. "
                "A data set with one label for each item is trained by task='classify'."
            )
        if targets.min() < 0 or targets.max() > 1:
            raise DataError(
                f"{dataset.name}: a target is {targets[((targets < 0) | (targets > 1)).any(1)][0].tolist()!r:.60}; expected "
                "0 or 1 for each class (or probabilities)."
            )

    def loss(self, model: Host, inputs: Any, targets: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """The mean over items and classes; smoothed targets are t (1 - e) + e / 2."""
        outputs = call(model, inputs, **seen_targets(model, targets)).float()
        return self.objective(model, outputs, targets, label_smoothing), outputs

    def weight_of(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(B, K): of a yes the class's weight, of a no 1."""
        assert self.weights is not None
        return 1 + targets.to(outputs) * (self.weights.to(outputs) - 1)

    def weighs(self, loss: Tensor, outputs: Tensor) -> bool:
        """Whether a loss is one number for each item and class."""
        return loss.shape == outputs.shape

    def balanced(self, dataset: ImageDataset, count: int) -> list[float]:
        """The weights "balanced": noes for each yes of a class; 1 of a class that no item has."""
        return [float(weight) for weight in tag_weights(tags_of(dataset))]

    def metrics(self, model: Host) -> Mapping[str, Any]:
        """Mean average precision."""
        return {"map": MeanAveragePrecision()}
