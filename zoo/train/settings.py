"""The settings of a run, checked before anything begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from zoo.arguments import ANYTHING, FLAG, FUNCTION, NOTHING, TEXT, Kind, mapping, number, one_of, whole
from zoo.data.functions import about_function, about_object
from zoo.errors import ConfigError
from zoo.train.evaluation import PRECISIONS
from zoo.train.optimizers import OPTIMIZERS, MakeOptimizer
from zoo.train.schedule import check_schedule

__all__ = ["CHANGEABLE", "KINDS", "Settings"]

_OPTIMIZER = Kind(
    f"one of {', '.join(OPTIMIZERS)}, or a function from param groups to a torch optimizer",
    (one_of(*OPTIMIZERS) | FUNCTION).take,
)
_RATES = Kind(
    "numbers above 0: one for all, a dict of them by adapter, 'head' or pattern, 'auto', or None",
    (number(above=0) | mapping("", number(above=0), least=1) | one_of("auto") | NOTHING).take,
)

# what each setting may be (`zoo.arguments`)
KINDS: dict[str, Kind] = {
    "epochs": whole(1),
    "steps": whole(1) | NOTHING,
    "batch_size": whole(1),
    "lr": _RATES,
    "weight_decay": number(0) | NOTHING,
    "optimizer": _OPTIMIZER,
    "optimizer_options": mapping("a dict of the optimizer's further arguments", ANYTHING),
    "schedule": TEXT,
    "warmup": number(0),
    "layer_decay": number(above=0, most=1) | NOTHING,
    "clip": number(above=0) | NOTHING,
    "accumulate": whole(1),
    "precision": one_of(*PRECISIONS),
    "label_smoothing": number(0, below=1),
    "mixup": number(0),
    "cutmix": number(0),
    "augment": TEXT | FUNCTION | NOTHING,
    "seed": whole(0),
    "patience": whole(1) | NOTHING,
    "monitor": TEXT,
    "keep": one_of("best", "last"),
    "val_fraction": number(above=0, below=1),
    "drop_last": FLAG,
    "ema": number(0, below=1) | NOTHING,
    "cache_features": Kind("True, False, or a whole number of bytes >= 1", (FLAG | whole(1)).take),
}

# what a run that goes on may be given anew, if it is asked for (`zoo.train.resuming`)
CHANGEABLE = (
    *(
        "epochs",
        "steps",
        "batch_size",
        "accumulate",
        "lr",
        "schedule",
        "warmup",
        "clip",
        "patience",
        "precision",
        "memory",
    ),
    *("label_smoothing", "mixup", "cutmix", "augment", "drop_last"),
)


@dataclass
class Settings:
    """See `zoo.fit`."""

    epochs: int = 10
    steps: int | None = None
    batch_size: int = 64
    lr: float | Mapping[str, float] | str | None = None
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
    augment: Any = None
    seed: int = 0
    patience: int | None = None
    monitor: str = "accuracy"
    keep: str = "last"
    val_fraction: float = 0.1
    drop_last: bool = False
    sampler: Any = None
    ema: float | None = None
    cache_features: bool | int = False

    def __post_init__(self) -> None:
        for name, kind in KINDS.items():
            setattr(self, name, kind.of(name, getattr(self, name)))
        if self.batch_size < self.accumulate:
            raise ConfigError(f"accumulate is {self.accumulate}; expected at most batch_size ({self.batch_size}).")
        check_schedule(self.schedule)

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON types."""
        values = asdict(self)
        if callable(self.augment):
            values["augment"] = about_object(self.augment)
        values["cache_features"] = True if self.cache_features else None  # how much they may take changes nothing
        values["sampler"] = None if self.sampler is None else repr(self.sampler)
        if callable(self.optimizer):
            values["optimizer"] = about_function(self.optimizer)
        return {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}
