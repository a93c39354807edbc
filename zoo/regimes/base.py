"""What a regime is: a dataclass of settings whose `phases` says what is trained, one fit after the other.

    @register_regime("two-stage")
    @dataclass(eq=False)
    class TwoStage(Regime):
        epochs: int = 5

        def phases(self, run):
            yield Phase("head", run.data, trained="head", fit={"epochs": 1})
            run.model.add_adapter("lora")
            yield Phase("all", run.data, fit={"epochs": self.epochs})
            run.evaluate(run.test, "test")

Each phase is an ordinary `zoo.fit`. Between two phases the generator may do with the model what it likes: attach, remove, rewind,
grow, average, evaluate.

**How a killed regime goes on.** A generator cannot be written to disk, so it is run again from its beginning: a phase that was
finished is not trained a second time, but the model is put into the state that it had at its end, and what was measured is read
back. So everything that `phases` decides must follow from the settings, the data, the model, and what `run.once` and
`run.evaluate` gave; random numbers are seeded for it anew behind each phase. The phase in which the kill came goes on from its
own checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from zoo.data.dataset import ImageDataset
from zoo.errors import ConfigError, DataError, nearest
from zoo.fields import check_fields, fits, hints_of

if TYPE_CHECKING:
    from pathlib import Path

    from zoo.model import Model
    from zoo.regimes.report import RunReport
    from zoo.regimes.work import Run

__all__ = ["Outside", "Phase", "Regime"]


class Outside(Protocol):
    """What trains in a phase instead of `zoo.fit`."""

    def about(self) -> dict[str, Any]:
        """What makes it this training and no other, as JSON; a run that goes on compares it."""

    def train(self, model: Model, data: Any, place: Path | None, options: Mapping[str, Any]) -> dict[str, Any]:
        """Train what the model has to train, and go on from `place`/last.safetensors, if it is there.

        `options`: arguments of `zoo.fit` that the user gave for all phases. Returns the phase's entry: "epochs", "steps",
        "seconds", "parameters", "metrics" and "history", as those of a fit.
        """


@dataclass(eq=False)
class Phase:
    """One fit of a regime.

    Args:
        name: of letters, digits, '-', '_' and '.'; no two of a run are alike.
        data, val: as for `zoo.fit`.
        task: as for `zoo.fit`; None: what the model is for.
        trained: which of the trainable parameters are trained in this phase, by adapter ("lora"), "head", or pattern
            ("lora/blocks.0.*"); None: all.
        streams: further data beside the training data, by name; see `zoo.fit`.
        sampler: which items make a batch; see `zoo.train.samplers`.
        fit: further arguments of `zoo.fit`.
        callbacks: objects with hooks, as for `zoo.fit`.
        by: what trains instead of `zoo.fit`: the trainer of another library (`Outside`). It takes the data alone.
    """

    name: str
    data: Any
    val: Any = None
    task: Any = None
    trained: str | Sequence[str] | None = None
    streams: Mapping[str, Any] = field(default_factory=dict)
    sampler: Any = None
    fit: Mapping[str, Any] = field(default_factory=dict)
    callbacks: Sequence[Any] = ()
    by: Outside | None = None


@dataclass(eq=False)
class Regime:
    """Base of all regimes. Subclasses are `@register_regime("name") @dataclass(eq=False)` with JSON types as fields.

    Args:
        seed: of what happens between the phases, and of the phases.
    """

    seed: int = 0

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    needs_head: ClassVar[bool] = True  # the command line gives the model a head for the classes of the data
    opens: ClassVar[bool] = False  # the command line opens data by `read`, since they are of the regime's own kind
    items: ClassVar[tuple[type, ...]] = ()  # a list of these is one data set; other lists are lists of data sets

    def __post_init__(self) -> None:
        """Check the settings; a subclass calls `super().__post_init__()` first."""
        check_fields(self, f"The regime '{self.name or type(self).__name__}': setting '{{}}'")
        self.check(self.seed >= 0, f"seed is {self.seed}; expected 0 or more.")

    def phases(self, run: Run) -> Iterator[Phase]:
        """The phases, one after the other."""
        raise TypeError(f"{type(self).__name__} does not implement phases(run).")

    def prepare(self, run: Run) -> None:
        """Raise a ZooError if model and data are not what this regime needs; before anything is done or written."""

    def check_data(self, run: Run, classes: bool = False) -> None:
        """Raise DataError unless `data` is one data set, and `test` another or none; with `classes`, of known classes."""
        for what, given in (("data", run.data), ("test", run.test)):
            if given is None and what == "test":
                continue
            if not isinstance(given, ImageDataset) or (classes and not given.classes):
                raise DataError(f"{self.name}: {what}= is one data set{' with known classes' if classes else ''}.")

    def check_unadapted(self, run: Run, *names: str) -> None:
        """Raise ConfigError if an adapter is in use, or one of these `names`, which the regime attaches, is taken."""
        if run.model.active or set(names) & set(run.model.adapters):
            what = "its own adapter" if len(names) == 1 else "its own adapters"
            raise ConfigError(
                f"{self.name} attaches {what}; the model has {', '.join(run.model.adapters)}. Load it without adapters."
            )

    def open(self, model: Model, source: Any) -> Any:
        """A data set of what was given to `zoo.run`; by default as the family opens its kind of data."""
        return model.family.open_dataset(source)

    def read(self, source: str, split: str | None) -> Any:
        """A data set of what was named on the command line, where `opens` is true."""
        raise ConfigError(f"The regime '{self.name}' reads no data of its own kind.")

    def summary(self, run: Run) -> dict[str, Any]:
        """What the run found, as JSON; it becomes `RunReport.summary`."""
        return {}

    def table(self, report: RunReport) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows of the result's table; by default one row for each phase."""
        return report.phase_table()

    def draw(self, figure: Any, report: RunReport) -> None:
        """The result's picture, into a matplotlib figure; by default the curves of the phases, one behind the other."""
        report.draw_phases(figure)

    # -- settings ---------------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """The settings as JSON types."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Regime:
        """A regime with these settings.

        Raises:
            ConfigError: an unknown setting, or one of the wrong type.
        """
        hints, known = hints_of(cls), {f.name for f in dataclasses.fields(cls)}
        for name, value in config.items():
            if name not in known:
                raise ConfigError(f"The regime '{cls.name}' has no setting '{name}'. {nearest(name, known)}")
            if not fits(value, hints[name]):
                raise ConfigError(
                    f"The regime '{cls.name}': setting '{name}' is {value!r} ({type(value).__name__}); expected "
                    f"{str(hints[name]).replace('typing.', '')}."
                )
        return cls(**config)

    def check(self, condition: bool, message: str) -> None:
        """Raise ConfigError with the regime's name in front unless `condition` holds."""
        if not condition:
            raise ConfigError(f"{self.name or type(self).__name__}: {message}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.config().items())})"


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
