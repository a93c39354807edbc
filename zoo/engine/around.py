"""What surrounds a sublayer: a module in its place that calls it (`replace`), one in front of it and in the sum (`enter`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["Around", "Entering"]


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


@dataclass(eq=False)
class Entering:
    """Changes the residual stream in front of a sublayer: in front of its norm, and in the sum behind it."""

    module: nn.Module
    held: Tensor | None = None

    def enter(self, x: Tensor) -> Tensor:
        """`x + module(x)`; what was added is kept until the exit."""
        self.held = self.module(x)
        return x + self.held

    def join(self, y: Tensor) -> Tensor:
        """`y` and what was added in front."""
        added, self.held = self.held, None
        assert added is not None, "the sublayer's exit ran without its entry"
        return y + added
