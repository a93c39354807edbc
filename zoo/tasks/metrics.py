"""Metrics by name, of torchmetrics: `zoo.evaluate(model, test, metrics=["top3", "f1"])`.

| name | outputs, targets | number |
| --- | --- | --- |
| `accuracy` | logits (B, K), classes (B,) | share of hits |
| `top<k>` | the same | share of items whose class is among the k best |
| `mean_accuracy` | the same | accuracy of each class, averaged |
| `f1` | the same | F1 of each class, averaged |
| `map` | scores (B, K), targets (B, K) of 0 and 1 | mean average precision, as the task `multilabel` has it |
| `miou` | logits (B, K, H, W), classes (B, H, W), 255: no class | intersection over union of each class, averaged |
| `recall@<k>` | embeddings (B, d), identities (B,) | share whose k nearest others hold one of the same identity |
| `verification` | the same | `eer` and `tar@0.1`, `tar@0.01`, `tar@0.001` over all pairs (`zoo.tasks.embeddings`) |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from zoo.errors import ConfigError, nearest

__all__ = ["METRICS", "metric", "named_metrics"]

METRICS = ("accuracy", "top<k>", "mean_accuracy", "f1", "map", "miou", "recall@<k>", "verification")
_NUMBERED = re.compile(r"(top|recall@)([1-9]\d*)")


def named_metrics(metrics: Mapping[str, Any] | Iterable[str] | None, num_classes: int) -> dict[str, Any]:
    """Metrics by name as objects; a mapping of objects is left as it is.

    Raises:
        ConfigError: no such name, or one that needs classes, which the model does not have.
    """
    if metrics is None:
        return {}
    if isinstance(metrics, Mapping):
        return {name: metric(m, num_classes) if isinstance(m, str) else m for name, m in metrics.items()}
    names = [metrics] if isinstance(metrics, str) else list(metrics)
    return {name: metric(name, num_classes) for name in names}


def metric(name: str, num_classes: int = 0) -> Any:
    """A metric with `update(outputs, targets)`, `compute()` and `reset()`; see `named_metrics` for the errors."""
    numbered = _NUMBERED.fullmatch(name)
    if name not in METRICS and not numbered:
        raise ConfigError(f"there is no metric '{name}'. {nearest(name, METRICS)}")
    if name == "map":
        from zoo.tasks.multilabel import MeanAveragePrecision

        return MeanAveragePrecision()
    if name == "verification" or (numbered and numbered[1] == "recall@"):
        from zoo.tasks.embeddings import RecallAt, Verification

        return RecallAt(int(numbered[2])) if numbered else Verification()
    if num_classes < 2:
        raise ConfigError(f"the metric '{name}' is one of a classifier, and the model has {num_classes} classes.")
    from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassJaccardIndex

    if name == "miou":
        return MulticlassJaccardIndex(num_classes, ignore_index=255)
    if name == "f1":
        return MulticlassF1Score(num_classes, average="macro")
    if name == "mean_accuracy":
        return MulticlassAccuracy(num_classes, average="macro")
    top = int(numbered[2]) if numbered else 1
    if top > num_classes:
        raise ConfigError(f"'{name}' asks for the {top} best of {num_classes} classes.")
    return MulticlassAccuracy(num_classes, top_k=top, average="micro")
