"""What stands around the items of an object: a loader, of which the data set counts, and a stream, which is read once."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, default_collate

from zoo.errors import DataError

__all__ = ["held", "unwrapped"]

STREAM_BYTES = 2 << 30  # so much of a stream is held


def unwrapped(loader: Any) -> Any:
    """The data set of a DataLoader that does nothing that `zoo.fit` would not do itself.

    Raises:
        DataError: a sampler or a collate function of its own.
    """
    from torch.utils.data import RandomSampler, SequentialSampler

    from zoo.data.dataset import collate

    sampler = loader.sampler
    plain = isinstance(sampler, SequentialSampler) or (
        isinstance(sampler, RandomSampler) and not sampler.replacement and sampler._num_samples is None
    )
    if isinstance(loader.dataset, IterableDataset):
        plain = True
    if not plain:
        raise DataError(
            f"The DataLoader has a sampler of its own ({type(sampler).__name__}). Give the data set, and the sampler beside it: "
            "zoo.fit(model, loader.dataset, sampler=loader.sampler)."
        )
    if loader.collate_fn not in (
        default_collate,
        collate,
        getattr(torch.utils.data._utils.collate, "default_convert", None),
    ):
        raise DataError(
            "The DataLoader has a collate function of its own. Give the data set: zoo.fit(model, loader.dataset, "
            "batch_size=...); what the function does to single items can be the data set's transform."
        )
    if loader.batch_size is not None:
        warnings.warn(
            f"Of the DataLoader its data set is taken: batches (of {loader.batch_size} there) and their order are made here, by "
            "batch_size= and seed=.",
            stacklevel=3,
        )
    return loader.dataset


def held(stream: Any, name: str) -> list[Any]:
    """All items of a stream, so that they can be shuffled, skipped and resumed.

    Raises:
        DataError: it yields nothing, or more than is held.
    """
    items: list[Any] = []
    size = 0
    if not hasattr(stream, "__iter__"):
        raise DataError(f"{name} has no length, cannot be indexed and yields nothing; expected a data set of pairs.")
    for item in stream:
        items.append(item)
        size += _bytes(item)
        if size > STREAM_BYTES:
            raise DataError(
                f"{name} has no length, and its first {len(items)} items take more than {STREAM_BYTES >> 30} GiB of memory. "
                "Store them, as Parquet files or as shards (webdataset.ShardWriter), and give their paths: "
                "zoo.open_dataset('data/*.tar')."
            )
    if not items:
        raise DataError(
            f"{name} has no length, and yields nothing: expected pairs. (A generator yields its items only once.)"
        )
    return items


def _bytes(value: Any) -> int:
    """About how much memory a value takes."""
    if isinstance(value, (bytes, bytearray, str)):
        return len(value) + 64
    if isinstance(value, (Tensor, np.ndarray)):
        return int(value.nbytes) + 64
    if isinstance(value, Image.Image):
        return value.width * value.height * len(value.getbands()) + 64
    if isinstance(value, Mapping):
        return sum(_bytes(v) for v in value.values()) + 64
    return sum(_bytes(v) for v in value) + 64 if isinstance(value, (list, tuple)) else 64
