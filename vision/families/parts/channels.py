"""Maps with their channels in front, (B, C, H, W): what adapters see of them is (B, H, W, C), as everywhere else.

Convolutional networks hand such maps from block to block. A site made by `channels_last` turns the tensor that the ops of a
module see and turns it back behind them; nothing of this runs where no adapter acts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from zoo.engine.sites import Site

__all__ = ["Sides", "channels_last"]

Sides = tuple[bool, bool]  # whether the input, and whether the output of a module has its channels in front


def _last(x: Tensor) -> Tensor:
    return x.movedim(1, -1)


def _first(x: Tensor) -> Tensor:
    return x.movedim(-1, 1)


def _as(x: Tensor, other: Tensor | None) -> Tensor:
    """x laid out in memory as another tensor: a convolution's last bits depend on that."""
    if other is None or x.shape != other.shape or x.dim() != 4:
        return x
    layout = torch.channels_last if other.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    return x.contiguous(memory_format=layout)


@cache  # type: ignore[arg-type]
def channels_last(kind: type[Site], sides: Sides = (True, True)) -> type[Site]:
    """A site of this kind whose ops see maps with their channels last, at the input and the output as `sides` says."""

    class Turned(kind):  # type: ignore[valid-type,misc]
        def read_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            x = super().read_input(args, kwargs)
            return _last(x) if sides[0] else x

        def write_input(
            self, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor | None
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if not sides[0] or x is None:
                return super().write_input(args, kwargs, x)  # type: ignore[arg-type]
            return super().write_input(args, kwargs, _as(_first(x), super().read_input(args, kwargs)))

        def read_output(self, output: Any) -> Tensor:
            y = super().read_output(output)
            return _last(y) if sides[1] else y

        def write_output(self, output: Any, y: Tensor) -> Any:
            return super().write_output(output, _as(_first(y), super().read_output(output)) if sides[1] else y)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            # what runs instead of the module is handed maps with channels last, and the module as a function of these
            inside = any(op.verb == "replace" for op in self.forwards)
            return self._around(super().forward, *args, **kwargs) if inside else super().forward(*args, **kwargs)

        def original(self, *args: Any, **kwargs: Any) -> Any:
            if not any(op.verb == "replace" for op in self.forwards):
                return super().original(*args, **kwargs)
            x, *rest = args
            y = super().original(_first(x) if sides[0] else x, *rest, **kwargs)
            return _last(y) if sides[1] else y

        def surrounded(self, *args: Any, **kwargs: Any) -> Any:
            def run(x: Tensor, *rest: Any, **more: Any) -> Tensor:
                y: Tensor = self.forward(_first(x) if sides[0] else x, *rest, **more)
                return _last(y) if sides[1] else y

            chain: Callable[..., Any] = run
            for op in self.arounds:
                self._seen(op)
                chain = partial(op.fn, chain)
            return self._around(chain, *args, **kwargs)

        def _around(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            x, *rest = args
            y = run(_last(x) if sides[0] else x, *rest, **kwargs)
            return _first(y) if sides[1] else y

        def __reduce_ex__(self, protocol: Any) -> Any:  # a class made on the way is found again by what made it
            return _empty, (kind, sides), self.__dict__

    Turned.__name__ = f"ChannelsLast{kind.__name__}"
    return Turned


def _empty(kind: type[Site], sides: Sides) -> Site:
    made = channels_last(kind, sides)  # type: ignore[arg-type]
    return made.__new__(made)
