"""VQT's second stage: of all features that the queries bring, those that a group lasso weighs most, with a head of their own.

Idea: a linear head on the answers of every block is most of what VQT trains; a penalty on whole columns of it says which features
are worth their weights.

    "queries"   queries and head are trained; the queries stay as they are from here on
    "lasso"     a new head W (K, f), by its loss + lasso sum_j ||W[:, j]||_2
    "retrain"   the columns of largest norm are kept, a fraction of f, and a new head on them is trained without the penalty

With several `fractions` the head is trained for each on the larger part of the data, and the one with the best accuracy on the
rest (`val_fraction`; of equals the smallest) is kept. Test data are read once, at the end. The choice is in the adapter's plan.

Defaults: T = 1, lasso 1e-4, 0.7 of the features.
Source: Tu, Mai, Chao, "Visual Query Tuning", CVPR 2023 (andytu28/VQT), with the selection of Evci et al., "Head2Toe", 2022.
Deviations: the fractions and the weight of the penalty are ours to choose from; theirs are searched for each data set.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from zoo import Phase, Regime
from zoo.data.sampling import split_train_val
from zoo.errors import ConfigError
from zoo.regimes import Run, RunReport
from zoo.registry import adapter, register_regime

__all__ = ["FeatureSelection"]

NAME = "vqt"


@register_regime("vqt-select")
@dataclass(eq=False)
class FeatureSelection(Regime):
    """Query tuning, a choice among its features, and a head on the chosen ones.

    `zoo.run(model, "vqt-select", data, test)`: a data set with classes, a model with a head for them and no adapter in use.
    Afterwards it has the adapter `vqt` and the narrower head.

    Args:
        num_tokens, combine, dropout: of `vqt`.
        lasso: weight of the penalty. fractions: of the features that are kept; several are compared.
        epochs, lr: of the queries. head_epochs, head_lr: of each of the heads; None: the method's own rate.
        val_fraction: share of the data on which several fractions are compared.
        batch_size: of all phases.
    """

    num_tokens: int = 1
    combine: str = "concat"
    dropout: float = 0.1
    lasso: float = 1e-4
    fractions: tuple[float, ...] = (0.7,)
    epochs: int = 100
    lr: float | None = None
    head_epochs: int = 100
    head_lr: float | None = None
    val_fraction: float = 0.2
    batch_size: int = 64

    paper = "Tu, Mai and Chao 2023"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.fractions = tuple(self.fractions)
        for name in ("epochs", "head_epochs", "batch_size"):
            self.check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; expected 1 or more.")
        for name in ("lr", "head_lr"):
            given = getattr(self, name)
            self.check(given is None or given > 0, f"{name} is {given}; expected more than 0, or None.")
        self.check(self.lasso > 0, f"lasso is {self.lasso}; expected more than 0: without a penalty nothing is chosen.")
        whole = all(0 < fraction <= 1 for fraction in self.fractions)
        self.check(
            bool(self.fractions) and whole and len(set(self.fractions)) == len(self.fractions),
            f"fractions are {list(self.fractions)}; expected different numbers, each above 0 and at most 1.",
        )
        self.check(0 < self.val_fraction < 1, f"val_fraction is {self.val_fraction}; expected between 0 and 1.")
        self._adapter()  # its own settings are checked now

    def _adapter(self) -> Any:
        return adapter(NAME, num_tokens=self.num_tokens, combine=self.combine, dropout=self.dropout)

    def prepare(self, run: Run) -> None:
        """One data set with classes, a model with a head and without an adapter in use."""
        self.check_data(run, classes=True)
        self.check_unadapted(run, NAME)
        if not run.model.num_classes:
            raise ConfigError("vqt-select needs a head: load the model with num_classes= of the data.")

    def phases(self, run: Run) -> Iterator[Phase]:
        """The queries, the penalised head, perhaps a head for each fraction, the head that is left."""
        model = run.model
        width, classes = model.num_classes, list(model.classes) if model.classes else None
        vqt: Any = model.add_adapter(self._adapter(), NAME)
        model.reset_head(width, classes)
        first = {"batch_size": self.batch_size, "epochs": self.epochs, **_rate(self.lr)}
        later = {"batch_size": self.batch_size, "epochs": self.head_epochs, **_rate(self.head_lr)}
        yield Phase("queries", run.data, fit=first)
        model.reset_head(width, classes)
        vqt.lasso = self.lasso
        yield Phase("lasso", run.data, trained="head", fit=later)
        vqt.lasso = 0.0
        order = vqt.order(model)
        counts = {fraction: max(1, int(fraction * len(order))) for fraction in self.fractions}
        best = self.fractions[0]
        if len(self.fractions) > 1:
            train, val = split_train_val(run.data, self.val_fraction, self.seed)
            found: dict[float, float] = {}
            for fraction in sorted(self.fractions):
                vqt.keep(model, order[: counts[fraction]])
                yield Phase(f"fraction-{fraction:g}", train, trained="head", fit=later)
                found[fraction] = run.evaluate(val, f"val-{fraction:g}")["accuracy"]
            best = max(found, key=lambda fraction: found[fraction])  # the first of equals
        vqt.keep(model, order[: counts[best]])
        run.once("chosen", lambda: {"fraction": best, "features": counts[best], "of": len(order)})
        yield Phase("retrain", run.data, trained="head", fit=later)
        if run.test is not None:
            run.evaluate(run.test, "test")

    def summary(self, run: Run) -> dict[str, Any]:
        """How many features are kept, what each fraction gave on validation data, and the accuracy on test data."""
        compared = {
            f"{f:g}": run.values[f"val-{f:g}"]["accuracy"] for f in self.fractions if f"val-{f:g}" in run.values
        }
        tested = {f"test_{n}": v for n, v in run.values.get("test", {}).items() if n in ("accuracy", "loss")}
        return {**run.values["chosen"], "val_accuracy": compared, **tested}

    def table(self, report: RunReport) -> tuple[list[str], list[list[Any]]]:
        """What was kept, and what it gave."""
        found = report.summary
        accuracy = f"{100 * found['test_accuracy']:.1f}" if "test_accuracy" in found else ""
        return ["fraction", "features", "of", "test accuracy, %"], [
            [f"{found['fraction']:g}", found["features"], found["of"], accuracy]
        ]


def _rate(lr: float | None) -> dict[str, float]:
    return {} if lr is None else {"lr": lr}
