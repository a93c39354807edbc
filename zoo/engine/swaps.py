"""Stand-ins: parameters of the backbone that an adapter trains as copies of its own, for the time of a forward pass.

The frozen parameter stays where the library registered it, and the trained one stands in the adapter. So whatever saves, shards,
counts or averages parameters finds each tensor in one place, and loading values into a model changes no others. For the time of
a pass the trained tensor is an attribute of the module under the frozen one's name, which Python finds before the registered one.

Under a half-precision backbone the adapter's copy is in float32; each pass is given a cast of it, and gradients reach the copy
through the cast. Blocks that somebody calls by hand, outside of a pass of the model (checkpointing of a library, `zoo.blocks`),
have hooks that do the same for one call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

__all__ = ["ByHand", "Risen", "Swap", "held"]

Risen = list[tuple["Swap", Any]]  # what stands in, and what stood there before


@dataclass(eq=False)
class Swap:
    """A trained copy that takes the place of a frozen parameter while its adapter is active."""

    owner: str
    module: nn.Module
    name: str
    holder: nn.Module  # the module of the adapter that holds the copy, under `key`
    key: str

    @property
    def frozen(self) -> nn.Parameter:
        """The backbone's own."""
        return self.module._parameters[self.name]  # type: ignore[return-value]

    @property
    def trained(self) -> nn.Parameter:
        """The adapter's copy."""
        return self.holder._parameters[self.key]  # type: ignore[return-value]

    def value(self) -> Tensor:
        """What the module is to read: the copy, in the precision of the backbone."""
        trained, frozen = self.trained, self.frozen
        return trained if trained.dtype == frozen.dtype else trained.to(frozen.dtype)

    def put(self) -> Any:
        """Stand in; returns what stood there before."""
        before = self.module.__dict__.get(self.name)
        self.module.__dict__[self.name] = self.value()
        return before

    def take(self, before: Any = None) -> None:
        """The end of what `put` began."""
        if before is not None:
            self.module.__dict__[self.name] = before
        elif self.name in self.module.__dict__:
            self.module.__dict__.pop(self.name)


def held(module: nn.Module) -> dict[str, Any]:
    """A module's parameters as its forward reads them now."""
    own = module.__dict__
    return {name: own.get(name, parameter) for name, parameter in module._parameters.items()}


class Standing(Protocol):
    """Of a model's state (`zoo.engine.state`), what these hooks use."""

    risen: Risen | None

    @property
    def switch(self) -> Callable[..., None]:
        """The model's."""

    def rise(self) -> Risen | None:
        """A pass begins."""

    def settle(self, risen: Risen | None) -> None:
        """It is over."""


class ByHand:
    """Hooks on a module that may be called outside of a pass of the model."""

    def __init__(self, state: Standing | None) -> None:
        self.state = state
        self._risen: Risen | None = None

    def before(self, module: nn.Module, args: Any) -> None:
        """The call begins."""
        if self.state is not None and self.state.risen is None:
            self._risen = self.state.rise()

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """The call is over."""
        if self.state is not None and self._risen is not None:
            risen, self._risen = self._risen, None
            self.state.settle(risen)

    def __deepcopy__(self, memo: dict[int, Any]) -> ByHand:
        """In a copy of the whole model hooks of that model; a block that is copied alone is the library's own."""
        owner = None if self.state is None else getattr(self.state.switch, "__self__", None)
        here = self.state is not None and (owner is None or id(owner) in memo)
        twin = memo[id(self)] = ByHand(None)
        if here:
            twin.state = copy.deepcopy(self.state, memo)
        return twin
