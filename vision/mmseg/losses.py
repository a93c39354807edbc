"""Losses of mmsegmentation for `zoo.fit`: `zoo.fit(model, data, task="segment", loss=vision.mmseg.loss("DiceLoss"))`."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from vision.data.dense import IGNORE
from vision.mmseg.library import mmseg_models
from zoo.errors import ConfigError, nearest

__all__ = ["MMSegLoss", "loss"]


class MMSegLoss:
    """(logits (B, K, H, W), classes (B, H, W)) -> the mean loss, as mmseg's own decode heads call it."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        models = mmseg_models()
        known = {n for n in models.module_dict if n.endswith("Loss")}
        if name not in known:
            raise ConfigError(f"mmseg has no loss '{name}'. {nearest(name, known)}")
        if options.pop("ignore_index", IGNORE) != IGNORE:
            raise ConfigError(
                f"ignore_index is {IGNORE} here: open_dense(..., ignore=...) says which values are no class."
            )
        self.about = f"{name} {sorted(options.items())!r}"  # what a checkpoint knows of it
        try:
            accepts = inspect.signature(models.get(name).__init__).parameters
            given = {**options, **({"ignore_index": IGNORE} if "ignore_index" in accepts else {})}
            self._module = models.build({"type": name, **given})
        except (TypeError, ValueError, AssertionError) as error:
            raise ConfigError(f"mmseg's '{name}' cannot be made with {options}: {error}") from error

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See the class."""
        return self._module(outputs, targets, ignore_index=IGNORE)  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return f"MMSegLoss({self.about})"


def loss(name: str, **options: Any) -> MMSegLoss:
    """A loss of mmseg's registry by its name: "CrossEntropyLoss", "DiceLoss", "FocalLoss", "LovaszLoss", "TverskyLoss" ...

    Args:
        name: its registered name.
        options: of its class, such as `loss_weight=0.5`.

    Raises:
        MissingPackageError: mmsegmentation is not installed. ConfigError: no such loss, or options that it does not take.
    """
    return MMSegLoss(name, dict(options))
