"""Children: cheaper sublayers that can stand in place of a block's attention or MLP (`zoo.substitute`).

| form | attention | MLP |
| --- | --- | --- |
| a number | so many heads; of keys and values where queries share them | so many neurons |
| "linear" | `W_o W_v x`: each token for itself | `W_down W_up x`, without activation and gate |
| "none" | nothing: the residual stream passes | nothing |

A family says how each is made of its own modules by a subclass of `Children` (`Backbone.children`). "linear" keeps the name of
the last projection, so that it stays the point that it was (`attn.o`, `mlp.down`); all other points of the sublayer are gone,
and so is the norm in front of one that is "none".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError

__all__ = ["ROLES", "Alone", "Children", "Form", "Nothing", "mixes", "product"]

Form = int | str
ROLES = ("attn", "mlp")
LINEAR, NONE = "linear", "none"


class Nothing(nn.Identity):
    """A sublayer that adds nothing: 0 for any input. It is an identity to those that look for modules, so it is no point."""

    mixes = False

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """x (B, ..., d) -> 0 (), which the residual sum spreads."""
        return hidden_states.new_zeros(())


class Alone(nn.Module):
    """A sublayer that is one projection, under the name `last` of the one that it keeps.

    Args:
        last: its name. weight: (d, d). bias: (d,) or None.
    """

    mixes = False

    def __init__(self, last: str, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.last = last
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        made.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        if bias is not None:
            made.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.add_module(last, made)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """x (B, ..., d) -> W x + b; what else the attention is called with (masks, places) is not read."""
        return self._modules[self.last](hidden_states)  # type: ignore[misc]


def mixes(module: nn.Module | None) -> bool:
    """Whether an attention lets tokens see each other."""
    return bool(getattr(module, "mixes", True))


def product(last: Any, first: Any, rows: slice = slice(None), repeat: int = 1, width: int = 1) -> tuple[Tensor, Any]:
    """Weight and bias of `last(first(x)[rows])` without what stands between them, in float64.

    Args:
        rows: of the first projection's outputs. repeat, width: each run of `width` outputs is read `repeat` times.
    """

    def spread(x: Tensor) -> Tensor:
        x = x[rows].double()
        return x if repeat == 1 else x.unflatten(0, (-1, width)).repeat_interleave(repeat, dim=0).flatten(0, 1)

    weight, bias = last.weight.detach().double(), last.bias
    offset = None if bias is None else bias.detach().double()
    if first.bias is not None:
        more = weight @ spread(first.bias.detach())
        offset = more if offset is None else offset + more
    dtype = last.weight.dtype
    return (weight @ spread(first.weight.detach())).to(dtype), None if offset is None else offset.to(dtype)


class Children(ABC):
    """What a family's blocks can have instead of their own attention and MLP."""

    blocks: ClassVar[tuple[str, ...]] = ()  # names of the classes of blocks for which this is described
    unit: ClassVar[dict[str, str]] = {"attn": "heads", "mlp": "neurons"}  # what a number counts
    divides: ClassVar[bool] = False  # a number of heads must divide the parent's

    @abstractmethod
    def parts(self, role: str) -> tuple[str, ...]:
        """Names in the block of what belongs to the sublayer: its norm, and the module itself, which is the last."""

    @abstractmethod
    def whole(self, name: str, block: Any, role: str) -> int:
        """How many heads or neurons a sublayer has.

        Raises:
            ConfigError: a sublayer of a kind that is not described.
        """

    @abstractmethod
    def reader(self, block: Any, role: str) -> tuple[nn.Linear, int]:
        """The projection that reads all heads or neurons, and how many of its channels are one of them."""

    @abstractmethod
    def shrink(self, name: str, block: Any, role: str, kept: Sequence[int]) -> None:
        """Leave these heads or neurons; of shared keys and values as many, each the mean of those that it stands for."""

    @abstractmethod
    def linear(self, block: Any, role: str) -> nn.Module:
        """The sublayer as one projection."""

    def nothing(self, block: Any, role: str) -> nn.Module:
        """The sublayer that adds nothing."""
        return Nothing()

    def size(self, name: str, block: Any, role: str) -> int:
        """As `whole`; 0 of a sublayer that is a child without heads or neurons itself.

        Raises:
            ConfigError: a block or sublayer of a kind that is not described.
        """
        if type(block).__name__ not in self.blocks:
            raise ConfigError(
                f"'{name}' is a {type(block).__name__}; cheaper sublayers are described for {', '.join(self.blocks)}."
            )
        return self.whole(name, block, role) if mixes(block._modules[self.parts(role)[-1]]) else 0

    def put(self, name: str, block: Any, role: str, form: Form, order: Sequence[int] | None = None) -> None:
        """Put a child in place of a sublayer, with weights made of those that are there.

        Args:
            name: of the block. order: heads or neurons from the most important on; by default as they come.

        Raises:
            ConfigError: a form that there is not, or that this sublayer cannot have.
        """
        size = self.size(name, block, role)
        self.check(name, role, form, size)
        if form == NONE:
            for part in self.parts(role)[:-1]:
                if part in block._modules:
                    block._modules[part] = nn.Identity()
            block._modules[self.parts(role)[-1]] = self.nothing(block, role)
        elif form == LINEAR:
            block._modules[self.parts(role)[-1]] = self.linear(block, role).train(block.training)
        elif form != size:
            kept = list(range(size)) if order is None else [int(i) for i in order]
            self.shrink(name, block, role, sorted(kept[: int(form)]))
        if role == "attn" and isinstance(form, str):
            self.unmixed(block)

    def unmixed(self, block: Any) -> None:  # noqa: B027 (most blocks stay as they are)
        """Change what is left of a block whose attention no longer mixes tokens."""

    def check(self, name: str, role: str, form: Form, size: int) -> None:
        """Raise ConfigError for a form that a sublayer of this size cannot have."""
        unit = self.unit[role]
        number = isinstance(form, int) and not isinstance(form, bool)
        if not number and form not in (LINEAR, NONE):
            raise ConfigError(
                f"'{name}.{role}': {form!r} is no form of a sublayer; expected a number of {unit}, 'linear' or 'none'."
            )
        if size == 0:
            raise ConfigError(
                f"'{name}.{role}' is a child without {unit} already; another cannot be made of it. Begin with the parent."
            )
        if isinstance(form, int) and not 1 <= form <= size:
            raise ConfigError(f"'{name}.{role}' has {size} {unit}; expected 1 to {size} of them, not {form}.")
        if isinstance(form, int) and role == "attn" and self.divides and size % form:
            raise ConfigError(
                f"'{name}.{role}': {form} {unit} do not divide its {size}, which are to be merged into them."
            )


@torch.no_grad()
def resized(linear: Any, weight: Tensor, bias: Tensor | None) -> None:
    """Give a projection another weight (o, i) and bias (o,)."""
    learns = linear.weight.requires_grad
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=learns)
    if linear.bias is not None and bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=learns)
    linear.out_features, linear.in_features = weight.shape
