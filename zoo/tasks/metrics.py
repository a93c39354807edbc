"""Metrics by name, of torchmetrics: `zoo.evaluate(model, test, metrics=["top3", "f1"])`.

| name | outputs, targets | number |
| --- | --- | --- |
| `accuracy` | logits (B, K), classes (B,) | share of hits |
| `top<k>` | the same | share of items whose class is among the k best |
| `mean_accuracy` | the same | accuracy of each class, averaged |
| `f1` | the same | F1 of each class, averaged |
| `map` | scores (B, K), targets (B, K) of 0 and 1 | mean average precision, as the task `multilabel` has it |
| `miou` | logits (B, K, H, W), classes (B, H, W), 255: no class | intersection over union of each class, averaged |
| `auroc` | logits (B, K), classes (B,) | area under the ROC curve of each class against the others, averaged |
| `multilabel_f1`, `multilabel_auroc` | logits (B, K), targets (B, K) of 0 and 1 | of each class, averaged |
| `hamming` | the same | share of wrong yes and no |
| `mae`, `mse`, `rmse` | numbers (B,) or (B, K), the same | absolute, squared error; the root of the squared one |
| `r2`, `pearson`, `spearman` | the same | explained variance, correlation, that of ranks; of several numbers averaged |
| `recall@<k>` | embeddings (B, d), identities (B,) | share whose k nearest others hold one of the same identity |
| `nmi` | the same | mutual information of identities and k-means clusters, as many as identities; 0 to 1 |
| `verification` | the same | `eer` and `tar@0.1`, `tar@0.01`, `tar@0.001` over all pairs (`zoo.tasks.embeddings`) |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from zoo.errors import ConfigError, nearest

__all__ = ["METRICS", "metric", "named_metrics"]

_REGRESSION = ("mae", "mse", "rmse", "r2", "pearson", "spearman")
_TAGS = ("multilabel_f1", "multilabel_auroc", "hamming")
METRICS = (
    *(
        "accuracy",
        "top<k>",
        "mean_accuracy",
        "f1",
        "auroc",
        "map",
        "miou",
        "calibration",
        "recall@<k>",
        "nmi",
        "verification",
    ),
    *_TAGS,
    *_REGRESSION,
)
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
    if name == "nmi":
        from zoo.tasks.embeddings import Clusters

        return Clusters()
    if name == "verification" or (numbered and numbered[1] == "recall@"):
        from zoo.tasks.embeddings import RecallAt, Verification

        return RecallAt(int(numbered[2])) if numbered else Verification()
    if name in _REGRESSION:
        return _regression(name, max(1, num_classes))
    if name in _TAGS and num_classes:
        return _tags(name, num_classes)
    if num_classes < 2:
        raise ConfigError(f"the metric '{name}' is one of a classifier, and the model has {num_classes} classes.")
    from torchmetrics.classification import (
        MulticlassAccuracy,
        MulticlassAUROC,
        MulticlassF1Score,
        MulticlassJaccardIndex,
    )

    if name == "calibration":
        from torchmetrics.classification import MulticlassCalibrationError

        return _OfProbabilities(MulticlassCalibrationError(num_classes, n_bins=15, norm="l1"))
    if name == "auroc":
        return MulticlassAUROC(num_classes, average="macro")
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


def _regression(name: str, outputs: int) -> Any:
    from torchmetrics import regression

    if name in ("mae", "mse", "rmse"):
        return regression.MeanAbsoluteError() if name == "mae" else regression.MeanSquaredError(squared=name == "mse")
    if name == "r2":
        return _Explained(regression.R2Score())
    kind = regression.PearsonCorrCoef if name == "pearson" else regression.SpearmanCorrCoef
    return _Averaged(kind(num_outputs=outputs))


class _Around:
    """A metric of torchmetrics, given or asked in another way."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.higher_is_better = inner, inner.higher_is_better

    def to(self, device: Any) -> _Around:
        """Moved."""
        self.inner = self.inner.to(device)
        return self

    def reset(self) -> None:
        """Forget all batches."""
        self.inner.reset()

    def update(self, outputs: Any, targets: Any) -> None:
        """Add a batch."""
        self.inner.update(outputs, targets)

    def compute(self) -> Any:
        """The number."""
        return self.inner.compute()


class _OfProbabilities(_Around):
    """Of probabilities, which torchmetrics would take logits for that all happen to lie between 0 and 1."""

    def update(self, outputs: Any, targets: Any) -> None:
        """Add a batch of logits."""
        self.inner.update(outputs.float().softmax(-1), targets)


class _Averaged(_Around):
    """Of several numbers, averaged."""

    def compute(self) -> Any:
        """The mean over the numbers."""
        return self.inner.compute().mean()


class _Explained(_Around):
    """The share of the variance, which a single item does not have."""

    def compute(self) -> Any:
        """NaN of less than two items."""
        return self.inner.compute() if int(self.inner.total) > 1 else float("nan")


def _tags(name: str, classes: int) -> Any:
    from torchmetrics import classification

    kind = {
        "multilabel_f1": classification.MultilabelF1Score,
        "multilabel_auroc": classification.MultilabelAUROC,
        "hamming": classification.MultilabelHammingDistance,
    }[name]
    return _Rounded(kind(classes))


class _Rounded(_Around):
    """One that wants targets of whole numbers."""

    def update(self, outputs: Any, targets: Any) -> None:
        """Add a batch."""
        self.inner.update(outputs, targets.round().long())
