"""`Run`: what the phases of a regime work with."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from zoo.errors import ConfigError
from zoo.regimes.ledger import Ledger
from zoo.train.evaluation import evaluate

if TYPE_CHECKING:
    from zoo.model import Model

__all__ = ["Run"]


class Run:
    """What a regime works with.

    Attributes:
        model: the model. A regime that changes the backbone puts the new one here, between two phases.
        data, test: what was given to `zoo.run`, opened, in the structure in which it was given.
        fit: arguments of `zoo.fit` that the user gave for all phases.
        done: the reports of the phases so far, as `RunReport.phases`.
        values: what `evaluate` and `once` gave so far.
    """

    def __init__(self, model: Model, regime: str, data: Any, test: Any, fit: dict[str, Any], ledger: Ledger) -> None:
        self.model, self.data, self.test, self.fit = model, data, test, fit
        self.regime, self.ledger = regime, ledger
        self._asked: set[str] = set()

    @property
    def done(self) -> list[dict[str, Any]]:
        """The phases that are done."""
        return self.ledger.phases

    @property
    def values(self) -> dict[str, Any]:
        """What was measured between the phases."""
        return self.ledger.values

    @property
    def measuring(self) -> dict[str, Any]:
        """What the user gave for all phases that `zoo.evaluate` takes, too."""
        known = ("batch_size", "precision", "workers", "device", "progress")
        return {k: v for k, v in self.fit.items() if k in known}

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """The JSON value of `compute()`, which a run that goes on does not compute again but reads back.

        For what is expensive, or does not follow from the model alone.

        Raises:
            ConfigError: a name that was used already, or a value that is not JSON.
        """
        if name in self._asked:
            raise ConfigError(f"The regime '{self.regime}' uses the name '{name}' for two values; give each its own.")
        self._asked.add(name)
        if name not in self.values:
            computed = compute()
            try:
                value = json.loads(json.dumps(computed))
            except (TypeError, ValueError) as error:
                raise ConfigError(f"The value '{name}' of the regime '{self.regime}' is not JSON: {error}.") from error
            self.values[name] = value
            self.ledger.write()
        return self.values[name]

    def evaluate(self, data: Any, name: str, **options: Any) -> dict[str, Any]:
        """`zoo.evaluate`, recorded under a name; options as there."""
        given = {"record": "", **self.measuring, **options}
        return self.once(name, lambda: evaluate(self.model, data, **given))  # type: ignore[no-any-return]
