"""Random numbers that depend on where in training they are drawn, and on nothing else.

Every place that draws (a sample's augmentation, a step's dropout, a hook) first sets the generators from
(seed, place, position). So a resumed run draws what the unbroken one drew, a shuffle or an augmentation is the same for
any number of processes and workers, and no generator state has to be carried along.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["kept_generators", "mixed_seed", "seed_everything"]


def mixed_seed(*parts: int | str) -> int:
    """A number below 2^63 out of a seed and a place, well mixed: neighbouring places share no stream."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_everything(*parts: int | str, cuda: bool = True) -> None:
    """Set the generators of Python, numpy and torch (with `cuda`, of the GPU too) for this place."""
    seed = mixed_seed(*parts)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)
    if cuda and torch.cuda.is_available():
        torch.cuda.manual_seed(seed)


@contextmanager
def kept_generators(cuda: bool = True) -> Iterator[None]:
    """Put the global generators back afterwards, so that training leaves the caller's own random numbers alone."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpu = torch.cuda.get_rng_state() if cuda and torch.cuda.is_available() and torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu)
