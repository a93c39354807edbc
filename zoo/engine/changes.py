"""What the ops of a session do to what passes at a site: sums, factors and other functions, of slices or of the whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(eq=False)
class AddGroup:
    """`y + f(x)` for slices of one projection; one call for all of them if the adapter's module offers `add_group`."""

    parts: tuple[tuple[nn.Module, int, int], ...]

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        group: Callable[..., Tensor] | None = getattr(type(self.parts[0][0]), "add_group", None)
        if group is not None:
            return group(self.parts, x, y)
        for module, start, stop in self.parts:
            delta = module(x).to(y.dtype)  # in a mixed-precision region a bias is wider than what it is added to
            if stop - start == y.shape[-1]:
                y = y + delta
            else:
                y = torch.cat([y[..., :start], y[..., start:stop] + delta, y[..., stop:]], dim=-1)
        return y


@dataclass(eq=False)
class LinearGroup:
    """A projection whose weight, bias or input an adapter changes by its own computation, all slices at once."""

    parts: tuple[tuple[nn.Module, int, int], ...]

    def __call__(self, run: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return type(self.parts[0][0]).linear_group(self.parts, run, x, weight, bias)  # type: ignore[operator,attr-defined]


def places(module: nn.Module) -> int:
    """Axes behind the channels of a convolution; 0 of others."""
    return len(getattr(module, "kernel_size", ()))


@dataclass(eq=False)
class RescaleGroup:
    """`module(y)` on slices of one projection's output (or on the whole output of a norm)."""

    parts: tuple[tuple[nn.Module, int, int], ...]
    channels_first: bool = False  # the output of a convolution, (B, dim_out, H, W)
    places: int = (
        0  # axes behind the channels, of a convolution that also takes (dim, H, W); 0: the channels are axis 1
    )

    def __call__(self, x: Tensor | None, y: Tensor) -> Tensor:
        axis = -1 - self.places if self.places else 1
        return self._run(y.movedim(axis, -1)).movedim(-1, axis) if self.channels_first else self._run(y)

    def _run(self, y: Tensor) -> Tensor:
        if len(self.parts) == 1 and self.parts[0][2] - self.parts[0][1] == y.shape[-1]:
            return self.parts[0][0](y)
        group: Callable[..., Tensor] | None = getattr(type(self.parts[0][0]), "rescale_group", None)
        if group is not None:
            return group(self.parts, y)
        for module, start, stop in self.parts:
            y = torch.cat([y[..., :start], module(y[..., start:stop]), y[..., stop:]], dim=-1)
        return y


@dataclass(eq=False)
class Stash:
    """Carries the source of a parallel branch from the sublayer's entry to its exit."""

    module: nn.Module
    held: Tensor | None = None

    def watch(self, x: Tensor) -> None:
        """Keep the source until the exit."""
        self.held = x

    def join(self, y: Tensor) -> Tensor:
        """`y + module(source)`."""
        source, self.held = self.held, None
        assert source is not None, "the sublayer's exit ran without its entry"
        return y + self.module(source)


@dataclass(eq=False)
class OnOutput:
    """What changes an output without looking at the input; no closure, so that a copied model keeps to its own parts."""

    fn: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return self.fn(y)


class BiasDelta(nn.Module):
    """A trained slice of a fused bias, as the difference to the frozen one (which the projection still adds)."""

    def __init__(self, frozen: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(frozen.detach().clone())
        self.register_buffer("frozen", frozen.detach(), persistent=False)

    def forward(self, x: Tensor | None) -> Tensor:
        """(dim_out,), broadcast over the tokens; x is not looked at."""
        return self.bias - self.frozen  # type: ignore[operator]


@dataclass(eq=False)
class Skip:
    """In place of a block: `module(x)` while `module.skipping`, else the block; `hand(y, args, kwargs)` is what it hands on."""

    module: Any
    hand: Callable[[Tensor, tuple[Any, ...], dict[str, Any]], Any]

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self.module.skipping:
            return run(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        return self.hand(self.module(x), args, kwargs)
