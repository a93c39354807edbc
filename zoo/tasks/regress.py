"""To regress: numbers instead of classes, one for each output of the head.

    zoo.fit(zoo.load("vit-b16", "lora", num_classes=1), train, val, task="regress")

Targets are (B,) with one output, else (B, K). Losses are `mse`, `mae` and `huber` (`zoo.tasks.losses`); measured by the mean
absolute error ("mae"), the root of the mean squared error ("rmse") and the share of the variance that is explained ("r2"), of
several outputs their means. The best epoch is that with the least rmse.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ConfigError, DataError
from zoo.registry import register_task
from zoo.tasks.base import call, check_whole, seen_targets
from zoo.tasks.losses import Weighted
from zoo.tasks.metrics import metric

if TYPE_CHECKING:
    from zoo.data.dataset import ImageDataset
    from zoo.host import Host

__all__ = ["Regress"]


def _each(function: Any) -> Any:
    def loss(outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        if label_smoothing:
            raise ConfigError("label_smoothing is of classes; numbers have none.")
        return function(outputs, targets, reduction="none").flatten(1).mean(1)  # type: ignore[no-any-return]

    return loss


@register_task("regress")
class Regress(Weighted):
    """Numbers: one for each output of the head."""

    monitor, labels = "rmse", "numbers"
    losses = {"mse": _each(F.mse_loss), "mae": _each(F.l1_loss), "huber": _each(F.huber_loss)}

    def check(self, model: Host, dataset: ImageDataset, what: str = "data set") -> None:
        """Raise unless there is a head."""
        check_whole(model, self.name, None)
        if not model.num_classes:
            raise ConfigError(
                "The model has no head (num_classes=0). Load it with num_classes=1, or as many as there are numbers."
            )
        if self.class_weights is not None:
            raise ConfigError("class_weights are of classes; numbers have none.")

    def check_batch(self, model: Host, dataset: ImageDataset, targets: Any) -> None:
        """Raise DataError unless targets are (B,) numbers with one output, else (B, num_classes)."""
        wanted = model.num_classes
        if isinstance(targets, Tensor) and (targets.shape[1:] == (wanted,) or (wanted == 1 and targets.ndim == 1)):
            return
        shape = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
        raise DataError(
            f"{dataset.name}: targets {shape}; the model has {wanted} outputs, so expected {'(B,) or ' if wanted == 1 else ''}"
            f"(B, {wanted}) numbers. Load it with num_classes= the numbers of an item."
        )

    def loss(self, model: Host, inputs: Any, targets: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """The mean over items and outputs; the outputs are (B,) if there is one for each item."""
        outputs = call(model, inputs, **seen_targets(model, targets)).float()
        numbers = targets.float().reshape(len(outputs), -1)
        loss = self.objective(model, outputs, numbers, label_smoothing)
        return loss, outputs.reshape(targets.shape)

    def metrics(self, model: Host) -> Mapping[str, Any]:
        """Errors, and the share of the variance."""
        return {name: metric(name, model.num_classes) for name in ("mae", "rmse", "r2")}
