"""What all sites of one model share: who is active, for which rows of the batch, and with which values of the forward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zoo.engine.context import Context, Frame
from zoo.engine.memory import Saver
from zoo.engine.swaps import Risen, Swap
from zoo.errors import ConfigError

__all__ = ["Place", "State"]

# active adapters, the route, its batch, the adapter served alone, whether prompts are under way, values of the forward pass
Place = tuple[tuple[str, ...], "dict[str, Tensor] | None", int, "str | None", bool, "Frame | None"]


@dataclass(eq=False)
class State:
    """What all sites of one model share: the memory saver, and which adapter serves which rows of the batch."""

    saver: Saver
    active: tuple[str, ...] = ()
    # adapter name ("": the bare backbone) -> row indices (n,); None: every active adapter serves all rows
    route: dict[str, Tensor] | None = None
    batch: int = 0
    serving: str | None = None  # within a routed batch: what runs now belongs to this adapter alone (its prompts)
    watching: set[str] | None = None  # points whose ops ran, while a probe listens
    aside: bool = False  # prompts pass through a module on their own: ops that only watch the token stream do not run
    context: Context = field(default_factory=Context)
    swaps: tuple[Swap, ...] = ()  # of the active adapters
    risen: Risen | None = None  # what stands in now: a pass is under way
    # Device and precision of a half-precision backbone, whose adapters are in float32: their ops run in an autocast region
    narrow: tuple[str, torch.dtype] | None = None
    damping: object | None = None  # which `zoo.damped` ops are scaled for now
    switch: Callable[[Place], None] = field(
        default=lambda place: None, repr=False
    )  # the model's: all sites go to a place

    def place(self) -> Place:
        """Who is active, for which rows, and with which values."""
        frame = self.context.frame
        return (*self.here()[:5], None if frame is None else frame.kept())

    def here(self) -> Place:
        """As `place`, for the time being: with the live values."""
        return (self.active, self.route, self.batch, self.serving, self.aside, self.context.frame)

    def put(self, place: Place) -> None:
        """Set what `place` gave; the sites stay as they are."""
        self.active, self.route, self.batch, self.serving, self.aside, self.context.frame = place

    # -- trained copies of the backbone's parameters (`zoo.engine.swaps`) ---------------------------------------------

    def rise(self) -> Risen | None:
        """A pass begins: trained copies stand in. None: they do already, or there are none."""
        if self.risen is not None or not self.swaps:
            return None
        self.risen = risen = [(swap, swap.put()) for swap in self.swaps]
        return risen

    def settle(self, risen: Risen | None) -> None:
        """The end of what `rise` began."""
        if risen is None or self.risen is None:
            return
        self.risen = None
        for swap, before in reversed(risen):
            swap.take(before)

    def stand(self, swaps: tuple[Swap, ...]) -> None:
        """Other copies stand in from now on; what a pass that broke off has left is taken away."""
        under_way, self.risen = self.risen is not None, None
        for swap in self.swaps:
            swap.take()
        self.swaps = swaps
        if under_way:
            self.rise()

    # -- adapters that are wider than the backbone ----------------------------------------------------------------------

    def run(self, fn: Callable[..., Any], *args: Any) -> Any:
        """What an adapter computes; its parameters are cast at each product where the backbone is in half precision."""
        if self.narrow is None:
            return fn(*args)
        with torch.autocast(*self.narrow):
            return fn(*args)

    def change(self, fn: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """As `run`, in the precision of the last tensor, which `fn` changes."""
        return fn(*tensors) if self.narrow is None else self.run(fn, *tensors).to(tensors[-1].dtype)

    def tokens(self, fn: Callable[..., Tensor], *args: Any) -> Tensor:
        """Tokens that an adapter makes, in the precision of the backbone that they are going to pass."""
        return fn(*args) if self.narrow is None else self.run(fn, *args).to(self.narrow[1])

    def around(self, fn: Callable[..., Any], run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`fn(run, ...)`: an adapter's module in place of a part of the backbone that it calls as `run`."""
        if self.narrow is None:
            return fn(run, *args, **kwargs)
        device, dtype = self.narrow

        def frozen(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast(device, enabled=False):
                return run(*(_to(a, dtype) for a in args), **{k: _to(a, dtype) for k, a in kwargs.items()})

        output = self.run(functools.partial(fn, **kwargs), frozen, *args)
        return (_to(output[0], dtype), *output[1:]) if isinstance(output, tuple) else _to(output, dtype)

    def run_at(self, place: Place, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`run` with the adapters of another time: recomputation in backward, after a switch or a routed batch."""
        frame = place[5]
        if frame is not None and frame.first:  # the forward pass itself: what is put must stay
            frame.first = False
            return run(*args, **kwargs)
        here = self.here()
        if here[1] is place[1] and (here[0], *here[2:5]) == (place[0], *place[2:5]):
            self.context.frame = None if frame is None else frame.kept()  # it may be run with again
            try:
                return self._standing(run, *args, **kwargs)
            finally:
                self.context.frame = here[5]
        self.switch((*place[:5], None if frame is None else frame.kept()))
        try:
            return self._standing(run, *args, **kwargs)
        finally:
            self.switch(here)

    def _standing(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        risen = self.rise()  # None during a forward pass
        try:
            return run(*args, **kwargs)
        finally:
            self.settle(risen)

    def steady(self, damping: object | None, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`run`, if effects are still scaled as when the forward pass ran."""
        if self.damping is not damping:
            raise ConfigError(
                "A block is run again for backward, and `zoo.damped` was entered or left since its forward pass: its "
                "gradients would be those of another model. Call backward inside of the context, or use memory='low'."
            )
        return run(*args, **kwargs)

    def rows(self, name: str, leading: int) -> Tensor | None:
        """Rows of a tensor with `leading` = batch * k rows (k windows per image) that adapter `name` serves."""
        assert self.route is not None
        rows = self.route.get(name)
        if rows is None or leading == self.batch:
            return rows
        per = leading // self.batch
        return (rows[:, None] * per + torch.arange(per, device=rows.device)).reshape(-1)


def _to(value: Any, dtype: torch.dtype) -> Any:
    """A floating tensor in another precision; anything else as it is."""
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
