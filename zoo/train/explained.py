"""Errors of others while a batch runs, said in words of the data: images of another shape, a loss that gives no gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.data.dataset import ImageDataset
from zoo.errors import CallError, ConfigError, DataError, MismatchError, ZooError

if TYPE_CHECKING:
    from zoo.model import Model

__all__ = ["check_gradient", "explained"]


@contextmanager
def explained(model: Model, dataset: ImageDataset, inputs: Any) -> Iterator[None]:
    """While inside, a network's own error over images of a shape that it is not made for becomes one that names both.

    Raises:
        DataError: the items have another shape than the backbone takes. What breaks for other reasons is left as it is.
    """
    try:
        yield
    except (AssertionError, RuntimeError, ValueError) as error:
        # families say so of images by the one, the model of any batch by the other
        ours = isinstance(error, ZooError) and not isinstance(error, (MismatchError, CallError))
        if ours or isinstance(error, torch.OutOfMemoryError):
            raise
        wanted = model.family.data_config().get("input_size")
        if not isinstance(inputs, Tensor) or inputs.ndim < 3 or wanted is None:
            raise
        found = tuple(inputs.shape[1:])
        if found == tuple(wanted):
            raise
        raise DataError(
            f"{dataset.where(0)}: an item of the batch has the shape {found}, and '{model.backbone_name}' takes {tuple(wanted)} "
            f"({type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}). Give PIL images or uint8 tensors, which "
            "are preprocessed, or bring your own tensors to this shape."
        ) from error


def check_gradient(loss: Tensor) -> None:
    """Raise ConfigError for a loss that nothing can be learnt from."""
    if not loss.requires_grad:
        raise ConfigError(
            "The loss has no gradient, so nothing could be trained by it. Compute it from the model's outputs with torch, "
            "without detach(), item() or numpy, and do not freeze all that it depends on."
        )
