"""Which epoch is the best one: what is monitored, and whether more of it is better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["NO_METRICS", "is_better_low", "score_of"]

NO_METRICS = ("images", "seconds", "images_per_second", "skipped")  # of an evaluation
# names of numbers that should be small, as words within a name
_LOW = ("loss", "error", "mae", "mse", "rmse", "eer", "wer", "cer", "hamming", "ece", "perplexity")


def is_better_low(monitor: str, metrics: Mapping[str, Any]) -> bool:
    """Whether less of it is better: it says so ("-name"), a metric of torchmetrics does, or its name is known for it."""
    if monitor.startswith("-"):
        return True
    says = getattr(metrics.get(monitor), "higher_is_better", None)
    if says is not None:
        return not says
    return "loss" in monitor or "error" in monitor or any(word in monitor.split("_") for word in _LOW)


def score_of(record: Mapping[str, Any], monitor: str, metrics: Mapping[str, Any]) -> list[float]:
    """What epochs are compared by, more is better: the monitored number, then the loss. NaN is worse than everything."""
    value = record[f"val_{monitor.removeprefix('-')}"]
    found = [-value if is_better_low(monitor, metrics) else value, -record["val_loss"]]
    return [-math.inf if math.isnan(x) else float(x) for x in found]
