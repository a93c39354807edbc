"""What data hold, as one short text: equal texts mean the same items with the same labels, as far as that is looked at.

All labels and class names; the sizes of all files; and the contents of `LOOKED_AT` items (of tensors in memory: of all), evenly
spaced over the data set, before any transform. Reading draws no random numbers of the caller's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from zoo.data.dataset import ImageDataset
from zoo.data.functions import about_object
from zoo.data.seeds import kept_generators, seed_everything
from zoo.errors import DataError

__all__ = ["LOOKED_AT", "content"]

LOOKED_AT = 512
FILES = 100_000  # of which the sizes are looked at


def content(dataset: ImageDataset) -> dict[str, Any]:
    """What makes data these and no others, as JSON: "items", "labels", "classes", "contents", "transform"."""
    if (source := getattr(dataset.rows, "stands_for", None)) is not None:  # kept features of other data
        dataset = source.select(dataset.indices)
    labels = dataset.labels if dataset.targets is None else dataset.targets
    return {
        "items": len(dataset),
        "labels": None if labels is None else _short(hashlib.blake2b(np.ascontiguousarray(labels).tobytes())),
        "classes": dataset.classes,
        "contents": _contents(dataset),
        "transform": about_object(dataset.transform),
    }


def _contents(dataset: ImageDataset) -> str:
    digest = hashlib.blake2b()
    count = len(dataset)
    for i in _spaced(count, FILES):
        place = dataset.where(i)
        if not os.path.isfile(place):
            break
        digest.update(str(os.path.getsize(place)).encode())
    for file in getattr(dataset.rows, "files", ()):
        digest.update(str(os.path.getsize(file)).encode())
    held = getattr(dataset.rows, "dataset", None)
    if isinstance(held, TensorDataset):
        for tensor in held.tensors:
            _take(digest, tensor[torch.as_tensor(dataset.indices)])
        return _short(digest)
    chosen = _spaced(count, LOOKED_AT)
    with kept_generators(cuda=False):
        if count and _item(dataset, 0) != _item(dataset, 0):
            return "random"  # a source that draws its items anew: there is nothing to compare
        for i in chosen:
            digest.update(_item(dataset, i))
    return _short(digest)


def _spaced(count: int, most: int) -> list[int]:
    return list(range(count)) if count <= most else np.linspace(0, count - 1, most).astype(int).tolist()  # type: ignore[no-any-return]


def _item(dataset: ImageDataset, index: int) -> bytes:
    """The digest of an item as it is stored: a file's bytes, else what is read."""
    digest = hashlib.blake2b()
    place = dataset.where(index)
    seed_everything("content", index, cuda=False)
    try:
        if os.path.isfile(place):
            with open(place, "rb") as file:
                digest.update(file.read())
        else:
            _take(digest, dataset.rows.read(int(dataset.indices[index])))
    except (DataError, OSError) as error:
        digest.update(type(error).__name__.encode())
    return digest.digest()


def _take(digest: Any, value: Any) -> None:
    """Everything that an item is made of."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(repr(value.tolist()).encode() if value.dtype == object else np.ascontiguousarray(value).tobytes())
    elif hasattr(value, "tobytes") and hasattr(value, "mode"):  # an image
        digest.update(f"{value.mode}{value.size}".encode())
        digest.update(value.tobytes())
    elif isinstance(value, Mapping):
        for key, part in value.items():
            digest.update(repr(key).encode())
            _take(digest, part)
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}".encode())
        for part in value:
            _take(digest, part)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        _take(digest, {f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    elif isinstance(value, (bytes, bytearray)):
        digest.update(bytes(value))
    else:
        digest.update(re.sub(r" at 0x[0-9a-f]+", "", repr(value)).encode())


def _short(digest: Any) -> str:
    return str(digest.hexdigest()[:16])
