"""Supervised: one fit, as a regime; what the others are compared with.

Phases: "train" on the data, with everything that the model trains. If there are test data they are measured at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from zoo.regimes.base import Phase, Regime
from zoo.regimes.work import Run
from zoo.registry import register_regime


@register_regime("supervised")
@dataclass(eq=False)
class Supervised(Regime):
    """One fit.

    Args:
        epochs: of it.
    """

    epochs: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.epochs >= 1, f"epochs is {self.epochs}; expected 1 or more.")

    def phases(self, run: Run) -> Iterator[Phase]:
        """Train, measure."""
        yield Phase("train", run.data, fit={"epochs": self.epochs})
        if run.test is not None:
            run.evaluate(run.test, "test")

    def summary(self, run: Run) -> dict[str, Any]:
        """The test's numbers."""
        return dict(run.values.get("test", {}))
