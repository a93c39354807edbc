"""Which classes are taken for which: the confusion matrix, as numbers and as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from zoo.errors import ConfigError

__all__ = ["FORMATS", "confusion_matrix", "draw"]

FORMATS = ("png", "pdf", "svg")
NAMED = 40  # classes whose names and numbers can still be read


def confusion_matrix(num_classes: int) -> Any:
    """A metric with `update(logits (B, K), classes (B,))`; `compute` gives (K, K) counts, rows are the true classes.

    Raises:
        ConfigError: the model is no classifier.
    """
    if num_classes < 2:
        raise ConfigError(f"a confusion matrix is one of a classifier, and the model has {num_classes} classes.")
    from torchmetrics.classification import MulticlassConfusionMatrix

    return MulticlassConfusionMatrix(num_classes)


def draw(matrix: Sequence[Sequence[int]], classes: Sequence[str], kind: str = "png") -> bytes:
    """The picture: shares of each true class as colours, counts as numbers.

    Raises:
        ConfigError: another kind of file.
    """
    if kind not in FORMATS:
        raise ConfigError(f"a picture as '.{kind}' cannot be written; expected {', '.join('.' + f for f in FORMATS)}.")
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    counts = np.asarray(matrix)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = len(counts)
    side = min(14.0, max(3.6, 0.42 * size + 2))
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if size <= NAMED:
        axes.set_xticks(range(size), list(classes), rotation=90, fontsize=8)
        axes.set_yticks(range(size), list(classes), fontsize=8)
        for row, column in np.argwhere(counts > 0):
            colour = "white" if shares[row, column] > 0.6 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=7, color=colour)
    axes.set_xlabel("taken for")
    axes.set_ylabel("class")
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02)
    bar.set_label("share of the class")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=144)
    return buffer.getvalue()
