"""Where the numbers of every epoch go besides the report: TensorBoard, Weights & Biases, MLflow ..., by accelerate's trackers.

    zoo.fit(model, train, val, loggers="tensorboard", out="run/")          # then: tensorboard --logdir run/
    zoo.fit(model, train, val, loggers=["wandb", "mlflow"])
    zoo.fit(model, train, val, loggers=WandBTracker("my project"))          # an accelerate tracker of one's own making

Each gets the settings once, and after every epoch its numbers at the number of steps that are done. The main process alone logs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.arguments import Kind
from zoo.errors import ConfigError, MissingPackageError, nearest

__all__ = ["LOGGERS", "Logger", "make_loggers"]

NAME = "zoo"  # of the project, where a tracker has projects


def _take(value: Any) -> list[Any]:
    found = list(value) if isinstance(value, (list, tuple)) else [value]
    if not all(
        isinstance(one, str) or (hasattr(one, "log") and hasattr(one, "store_init_configuration")) for one in found
    ):
        raise TypeError
    return found


LOGGERS = Kind("names of loggers ('tensorboard', 'wandb', 'mlflow' ...) or trackers of accelerate", _take)


class Logger:
    """One tracker in a run."""

    def __init__(self, tracker: Any) -> None:
        self.tracker = tracker

    def begin(self, settings: Mapping[str, Any]) -> None:
        """The settings of the run: plain values, everything else as text."""
        plain = {
            k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in settings.items() if v is not None
        }
        self.tracker.store_init_configuration(plain)

    def log(self, record: Mapping[str, Any]) -> None:
        """The numbers of an epoch."""
        numbers = {k: v for k, v in record.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        self.tracker.log(numbers, step=int(record["step"]))

    def end(self) -> None:
        """The run is over, or broke off."""
        self.tracker.finish()


def make_loggers(wanted: Sequence[Any] | None, folder: Path | None) -> list[Logger]:
    """The trackers that are meant, started.

    Args:
        folder: where those write that write files; by default `runs`.

    Raises:
        ConfigError: no such logger. MissingPackageError: its package is not installed.
    """
    return [Logger(_start(one, folder or Path("runs")) if isinstance(one, str) else one) for one in wanted or ()]


def _start(name: str, folder: Path) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers

    if name not in LOGGER_TYPE_TO_CLASS:
        raise ConfigError(f"There is no logger '{name}'. {nearest(name, LOGGER_TYPE_TO_CLASS)}")
    try:
        chosen = filter_trackers([name], folder)
    except (ImportError, ValueError) as error:
        raise MissingPackageError(f"The logger '{name}' needs its package: {error} Try pip install {name}.") from error
    if not chosen:  # the library only warns
        raise MissingPackageError(f"The logger '{name}' needs its package, which is not installed: pip install {name}.")
    kind = LOGGER_TYPE_TO_CLASS[name]
    tracker = kind(NAME, folder) if kind.requires_logging_directory else kind(NAME)
    if hasattr(tracker, "start"):
        tracker.start()
    return tracker
