"""What differs between releases of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

CACHE_NAMES = ("cache", "past_key_values")  # the argument's name since transformers 5.24, and before


def cache_name(forward: Callable[..., Any]) -> str | None:
    """What a forward of the library calls its key-value cache; None: it has none of the known names."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)
