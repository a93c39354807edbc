"""The settings of a run, checked before anything begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from zoo.errors import ConfigError
from zoo.train.evaluation import PRECISIONS
from zoo.train.optimizers import OPTIMIZERS, MakeOptimizer
from zoo.train.schedule import check_schedule

__all__ = ["Settings"]


@dataclass
class Settings:
    """See `zoo.fit`."""

    epochs: int = 10
    steps: int | None = None
    batch_size: int = 64
    lr: float | Mapping[str, float] | None = None
    weight_decay: float | None = None
    optimizer: str | MakeOptimizer = "adamw"
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    schedule: str = "cosine"
    warmup: float = 0.05
    layer_decay: float | None = None
    clip: float | None = 1.0
    accumulate: int = 1
    precision: str = "fp32"
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    augment: str | None = None
    seed: int = 0
    patience: int | None = None
    monitor: str = "accuracy"
    keep: str = "last"
    val_fraction: float = 0.1
    drop_last: bool = False
    sampler: Any = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate"):
            self._whole(name, 1)
        for name in ("steps", "patience"):
            if getattr(self, name) is not None:
                self._whole(name, 1)
        self._whole("seed", 0)
        for name in ("mixup", "cutmix", "weight_decay"):
            self._check(getattr(self, name) is None or getattr(self, name) >= 0, name, "a number of at least 0")
        self._check(0 <= self.label_smoothing < 1, "label_smoothing", "a number from 0 to below 1")
        self._check(self.clip is None or self.clip > 0, "clip", "a number above 0, or None")
        self._check(self.precision in PRECISIONS, "precision", f"one of {', '.join(PRECISIONS)}")
        self._check(self.keep in ("best", "last"), "keep", "'best' or 'last'")
        self._check(0 < self.val_fraction < 1, "val_fraction", "a number between 0 and 1")
        self._check(
            callable(self.optimizer) or self.optimizer in OPTIMIZERS, "optimizer", f"one of {', '.join(OPTIMIZERS)}"
        )
        self._check(self.batch_size >= self.accumulate, "accumulate", f"at most batch_size ({self.batch_size})")
        rates = self.lr.values() if isinstance(self.lr, Mapping) else [self.lr]
        self._check(all(r is None or (isinstance(r, (int, float)) and r > 0) for r in rates), "lr", "numbers above 0")
        check_schedule(self.schedule)

    def _whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        self._check(
            isinstance(value, int) and not isinstance(value, bool) and value >= least,
            name,
            f"a whole number >= {least}",
        )

    def _check(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise ConfigError(f"{name} is {getattr(self, name)!r}; expected {expected}.")

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON types."""
        values = asdict(self)
        values["sampler"] = None if self.sampler is None else repr(self.sampler)
        if callable(self.optimizer):
            values["optimizer"] = getattr(self.optimizer, "__name__", type(self.optimizer).__name__)
        return {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}
