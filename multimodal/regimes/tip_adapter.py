"""Tip-Adapter's procedure: fill the cache, train its keys if that is wanted, choose alpha and beta on validation data, test once.

A part of the data (`val_fraction`, at least one image of each class, drawn with the seed) is set aside, or the "val" of the data
is taken. The cache is filled with the rest. `train=True` attaches `tip-adapter-f`, whose one phase "keys" trains them and keeps
the epoch that is best on validation data; without it `tip-adapter`, and there is no phase. Then alpha and beta are searched, and
the test data measured if there are any.

Defaults: the authors' (gaopengcuhk/Tip-Adapter): 10 passes, AdamW at 1e-3 with eps 1e-4, 20 epochs, batch 256.
Source: Zhang et al. 2022, see `multimodal/adapters/tip_adapter.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from zoo.data.dataset import ImageDataset
from zoo.data.sampling import split_train_val
from zoo.errors import ConfigError, DataError
from zoo.regimes.base import Phase, Regime
from zoo.regimes.work import Run
from zoo.registry import adapter, register_regime
from zoo.train.calibration import calibrate

PARTS = ("train", "val")
OF_EVALUATE = ("precision", "workers", "device")


@register_regime("tip-adapter")
@dataclass(eq=False)
class TipAdapterRun(Regime):
    """A cache of few images beside CLIP's zero-shot classifier, with everything chosen on validation data.

    `zoo.run(model, "tip-adapter", data, test)`: one data set, or {"train": ..., "val": ...}; a CLIP with a head for its classes
    and no adapter in use.

    Args:
        train: whether the keys are trained (`tip-adapter-f`).
        passes, alpha, beta, alpha_most, beta_most: of the adapter.
        epochs, lr, batch_size: of the training. val_fraction: share of the data that is set aside.
    """

    train: bool = False
    passes: int = 10
    alpha: float = 1.17
    beta: float = 1.0
    alpha_most: float = 3.0
    beta_most: float = 7.0
    epochs: int = 20
    lr: float = 1e-3
    batch_size: int = 256
    val_fraction: float = 0.2

    paper = "Zhang et al. 2022"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "batch_size"):
            self.check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; expected 1 or more.")
        self.check(self.lr > 0, f"lr is {self.lr}; expected more than 0.")
        self.check(0 < self.val_fraction < 1, f"val_fraction is {self.val_fraction}; expected between 0 and 1.")
        self._adapter()

    def _adapter(self) -> Any:
        settings = {n: getattr(self, n) for n in ("passes", "alpha", "beta", "alpha_most", "beta_most")}
        return adapter("tip-adapter-f" if self.train else "tip-adapter", **settings)

    def prepare(self, run: Run) -> None:
        """Data with classes, and a model without adapters."""
        given = run.data if isinstance(run.data, dict) else {"train": run.data}
        if not set(given) <= set(PARTS) or "train" not in given:
            raise DataError(
                f"tip-adapter: data= is one data set, or a dict of 'train' and 'val'; it has {', '.join(given)}."
            )
        for what, part in (*given.items(), ("test", run.test)):
            if part is not None and (not isinstance(part, ImageDataset) or not part.classes):
                raise DataError(f"tip-adapter: {what} is no data set with known classes.")
        if run.model.active:
            raise ConfigError(
                f"tip-adapter attaches its own adapter; the model has {', '.join(run.model.active)}. Load it without adapters."
            )

    def phases(self, run: Run) -> Iterator[Phase]:
        """The cache, its keys, alpha and beta, the test."""
        given = run.data if isinstance(run.data, dict) else {"train": run.data}
        train, val = given["train"], given.get("val")
        if val is None:
            train, val = split_train_val(train, self.val_fraction, self.seed)
        own: Any = run.model.add_adapter(self._adapter())
        calibrate(
            *(run.model, train),
            batch_size=min(self.batch_size, 64),
            seed=self.seed,
            workers=run.fit.get("workers"),
            device=run.fit.get("device"),
        )
        if self.train:
            options = {"epochs": self.epochs, "lr": self.lr, "batch_size": self.batch_size}
            yield Phase("keys", train, val, fit={**options, "optimizer_options": {"eps": 1e-4}})
        known = {k: v for k, v in run.fit.items() if k in OF_EVALUATE}
        found = run.once("search", lambda: own.search(run.model, val, **known))
        own.alpha, own.beta = found["alpha"], found["beta"]
        if run.test is not None:
            run.evaluate(run.test, "test")

    def summary(self, run: Run) -> dict[str, Any]:
        """alpha, beta, accuracy on validation data with them and before, the test's numbers."""
        tested = {f"test_{n}": v for n, v in run.values.get("test", {}).items() if isinstance(v, float)}
        return {**run.values["search"], **tested}

    def table(self, report: Any) -> tuple[list[str], list[list[Any]]]:
        """What was chosen, and what it gives."""
        return ["what", "value"], [[name, f"{value:.4f}"] for name, value in report.summary.items()]
