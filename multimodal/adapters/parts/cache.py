"""Pieces of Tip-Adapter: embeddings of the training images, what a file says of them, and the search for alpha and beta."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ConfigError, DataError
from zoo.host import Host

__all__ = ["ALPHAS", "BETAS", "Grid", "counted", "embed"]

ALPHAS, BETAS = 20, 200  # values that a search tries
LEAST = 0.1


@torch.no_grad()
def embed(model: Host, batches: Iterable[Any], passes: int) -> tuple[Tensor, Tensor]:
    """(n, d) mean embeddings over all passes, of length 1, and (n,) labels.

    Raises:
        DataError: no batch, no classes, passes that differ, or embeddings that are not finite.
    """
    total: Tensor | None = None
    labels: Tensor | None = None
    training = model.training
    model.eval()
    try:
        for number in range(passes):
            found, named = [], []
            for inputs, targets in _view(batches, number):
                if not isinstance(targets, Tensor) or targets.ndim != 1 or targets.is_floating_point():
                    raise DataError("the cache needs images with one class each; these have other targets.")
                found.append(model.features(inputs))
                named.append(targets)
            if not found:
                if number:
                    break  # an iterator, which can be read once only
                raise DataError("there are no images to fill the cache with.")
            if labels is not None and not torch.equal(labels, torch.cat(named)):
                raise DataError(
                    "the batches come in another order each time, so no mean over augmentations of an image can be taken. Do not "
                    "shuffle them, or set passes=1."
                )
            labels, this = torch.cat(named), torch.cat(found).double()
            total = this if total is None else total + this
    finally:
        model.train(training)
    assert total is not None and labels is not None
    keys = F.normalize(total, dim=-1).float()
    if not keys.isfinite().all() or not total.any(dim=-1).all():
        raise DataError("embeddings of training images are not finite, or zero. Check the images and the precision.")
    if int(labels.min()) < 0 or int(labels.max()) >= model.num_classes:
        raise DataError(f"a label is outside the model's {model.num_classes} classes (0..{model.num_classes - 1}).")
    return keys, labels


def _view(batches: Any, number: int) -> Iterator[Any]:
    return batches.view(number) if hasattr(batches, "view") else iter(batches)


def counted(plan: Any, method: str) -> list[int]:
    """How many keys each class has, as a plan says; raises ConfigError for one that is damaged."""
    counts = plan.get("counts") if isinstance(plan, dict) else None
    names = plan.get("classes") if isinstance(plan, dict) else None
    good = isinstance(counts, list) and all(type(c) is int and c >= 0 for c in counts) and sum(counts) > 0
    if not good or not (names is None or (isinstance(names, list) and len(names) == len(counts or ()))):
        raise ConfigError(
            f"The plan of '{method}' is damaged: {plan!r:.100}. Load it as it was saved, or fill the cache anew "
            "(zoo.calibrate)."
        )
    assert counts is not None
    return counts


class Grid:
    """Hits of every alpha and beta over the batches of an evaluation; a metric of `zoo.evaluate`."""

    def __init__(self, adapter: Any) -> None:
        self.adapter = adapter
        self.alphas = [LEAST + i * (adapter.alpha_most - LEAST) / ALPHAS for i in range(ALPHAS)]
        self.betas = [LEAST + i * (adapter.beta_most - LEAST) / BETAS for i in range(BETAS)]
        self.reset()

    def reset(self) -> None:
        """Nothing seen."""
        self.hits = torch.zeros(BETAS, ALPHAS, dtype=torch.long)
        self.count = 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """One batch: its zero-shot logits and embeddings lie in `adapter._seen`."""
        logits, features = (torch.cat(part) for part in zip(*self.adapter._seen))
        self.adapter._seen.clear()
        cache, alphas = self.adapter.module_at("cache"), torch.tensor(self.alphas, device=logits.device)
        for row, beta in enumerate(self.betas):
            votes = cache(features, beta, logits.shape[1])
            found = (logits + alphas[:, None, None] * votes).argmax(-1)  # (alphas, B)
            self.hits[row] += (found == targets).sum(1).cpu()
        self.count += len(targets)

    def compute(self) -> Tensor:
        """The best accuracy."""
        return self.hits.max() / max(self.count, 1)

    def best(self) -> dict[str, float]:
        """Of the best, the one with the smallest beta, then alpha: the first that the search meets."""
        place = int(self.hits.flatten().argmax())
        row, column = divmod(place, ALPHAS)
        accuracy = int(self.hits[row, column]) / max(self.count, 1)
        return {"alpha": self.alphas[column], "beta": self.betas[row], "accuracy": accuracy}
