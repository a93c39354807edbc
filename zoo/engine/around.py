"""A module of the backbone inside of what replaces it (`SublayerPoint.replace`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["Around"]


@dataclass(eq=False)
class Around:
    """`module(F, x)` in place of a sublayer's module, which may give (y, None) and be called with x several times."""

    module: nn.Module
    packed: bool

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """As the sublayer's own forward."""
        x = args[0] if args else kwargs[next(iter(kwargs))]
        rest: list[Any] = []

        def inner(new: Tensor) -> Tensor:
            given = [new if a is x else a for a in args]
            output = run(*given, **{k: new if a is x else a for k, a in kwargs.items()})
            if not isinstance(output, tuple):
                return output  # type: ignore[no-any-return]
            rest[:] = output[1:]
            return output[0]  # type: ignore[no-any-return]

        y = self.module(inner, x)
        return (y, *(rest or [None])) if self.packed or rest else y
