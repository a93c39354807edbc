"""Prototypes of classes in a frozen network, as rows to start prompts with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

import zoo
from zoo.errors import DataError
from zoo.tasks import call

__all__ = ["centres", "prototypes"]

ROUNDS = 20  # of k-means; it ends before where nothing changes


def prototypes(model: Any, batches: Iterable[Any], task: Any, method: str) -> Tensor:
    """The mean of the pooled features of each class that occurs, without adapters: (classes, d) float64, on the CPU.

    Raises:
        DataError: no batch, or targets that are no labels of classes.
    """
    sums: dict[int, Tensor] = {}
    counts: dict[int, int] = {}
    with zoo.probing(model, task) as probe, model.disable(), torch.no_grad():
        for inputs, targets in batches:
            if not isinstance(targets, Tensor) or targets.dim() != 1 or targets.is_floating_point():
                raise DataError(
                    f"'{method}' starts from means of classes, and the targets of this data are not one label for each sample. "
                    "Take another start."
                )
            features = call(model.features, probe.moved(inputs, cast=True)).double().cpu()
            for label, row in zip(targets.tolist(), features):
                sums[label] = sums.get(label, 0) + row
                counts[label] = counts.get(label, 0) + 1
    if not sums:
        raise DataError(f"'{method}' got no batch to find its prototypes in; give it training data.")
    return torch.stack([sums[label] / counts[label] for label in sorted(sums)])


def centres(rows: Tensor, count: int) -> Tensor:
    """Rows (n, d) as `count` centres of k-means, if there are more; without chance.

    It begins with the row next to the mean of all, then each time that which is farthest from those that are chosen.
    """
    if len(rows) <= count:
        return rows
    distance = torch.cdist(rows, rows.mean(0, keepdim=True))[:, 0]
    chosen = [int(distance.argmin())]
    while len(chosen) < count:
        nearest = torch.cdist(rows, rows[chosen]).min(1).values
        chosen.append(int(nearest.argmax()))
    found, owner = rows[chosen].clone(), None
    for _ in range(ROUNDS):
        now = torch.cdist(rows, found).argmin(1)
        if owner is not None and torch.equal(now, owner):
            break
        owner = now
        for i in range(count):
            if (owner == i).any():  # one that lost all its rows stays where it was
                found[i] = rows[owner == i].mean(0)
    return found
