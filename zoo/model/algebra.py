"""Adapters as vectors: flat states that can be added, scaled, averaged, measured, and put back.

    a, b = model.adapter_state("a"), model.adapter_state("b")
    model.set_adapter_state("a", 0.7 * a + 0.3 * b)
    model.set_adapter_state("a", average([a, b, c], weights=[2, 1, 1]))
    print((a - b).norm(), a.nbytes)

A state holds every parameter and buffer of one adapter under its name there (`blocks.3.attn.q.lora_a`), detached copies on the
device of the adapter. Two states go together if they have the same names with the same shapes; where they do not, the first
name that differs is told and nothing happens. Arithmetic is on floating tensors; what else an adapter holds (masks, counters)
must be equal in both, or is taken from the first of a sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.engine.sharded import spread, whole
from zoo.errors import ConfigError, MismatchError

__all__ = ["AdapterState", "average", "move_towards", "put", "state_of"]


class AdapterState(Mapping[str, Tensor]):
    """The tensors of one adapter by name; `+`, `-`, `*` with numbers and with each other, `norm`, `nbytes`.

    Args:
        tensors: by name.
        origin: whose they are, for messages.
    """

    def __init__(self, tensors: Mapping[str, Tensor], origin: str = "a state") -> None:
        self._tensors, self.origin = dict(tensors), origin

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self._tensors.values())

    @property
    def numel(self) -> int:
        """How many numbers."""
        return sum(t.numel() for t in self._tensors.values())

    def norm(self) -> float:
        """Euclidean length over all floating tensors."""
        return float(sum(t.double().square().sum() for t in self._tensors.values() if t.is_floating_point()) ** 0.5)

    def to(self, *place: Any, **options: Any) -> AdapterState:
        """Moved or cast, as `Tensor.to`; whole numbers keep their type."""

        def moved(t: Tensor) -> Tensor:
            new = t.to(*place, **options)
            return new if t.is_floating_point() else new.to(t.dtype)

        return AdapterState({n: moved(t) for n, t in self._tensors.items()}, self.origin)

    def check(self, other: Mapping[str, Tensor], what: str = "a state") -> None:
        """Raise MismatchError, naming the first key that differs, unless `other` has the same names and shapes."""
        for name in dict.fromkeys([*self._tensors, *other]):
            mine = tuple(self._tensors[name].shape) if name in self._tensors else "none"
            theirs = tuple(other[name].shape) if name in other else "none"
            if mine != theirs:
                raise MismatchError(
                    f"{self.origin} and {what} do not go together: '{name}' has shape {mine} in the first and {theirs} in the "
                    "second. States go together if their adapters have the same method and settings on the same backbone."
                )

    def _with(self, other: Any, sign: float) -> AdapterState:
        if not isinstance(other, AdapterState):
            return NotImplemented
        self.check(other, other.origin)
        found = {}
        for name, value in self._tensors.items():
            their = other[name].to(value.device)
            found[name] = value + sign * their.to(value.dtype) if value.is_floating_point() else value.clone()
        return AdapterState(found, self.origin)

    def __add__(self, other: Any) -> AdapterState:
        return self._with(other, 1.0)

    def __sub__(self, other: Any) -> AdapterState:
        return self._with(other, -1.0)

    def __mul__(self, factor: Any) -> AdapterState:
        """Every number times a number."""
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            return NotImplemented
        return AdapterState(
            {n: t * factor if t.is_floating_point() else t.clone() for n, t in self._tensors.items()}, self.origin
        )

    __rmul__ = __mul__

    def __truediv__(self, factor: Any) -> AdapterState:
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            return NotImplemented
        if factor == 0:
            raise ConfigError(f"{self.origin} cannot be divided by 0.")
        return self * (1.0 / factor)

    def __neg__(self) -> AdapterState:
        return self * -1.0

    def __repr__(self) -> str:
        return f"AdapterState({self.origin}: {len(self)} tensors, {self.numel:,} numbers, {self.nbytes:,} bytes)"


def average(states: Sequence[AdapterState], weights: Sequence[float] | None = None) -> AdapterState:
    """sum_i w_i S_i / sum_i w_i, added up in float32 at least; by default all w_i are 1.

    Raises:
        ConfigError: no state, something else, not one weight for each, or weights that sum to 0.
        MismatchError: states that do not go together.
    """
    if not states:
        raise ConfigError("average needs at least one state.")
    weights = [1.0] * len(states) if weights is None else [float(w) for w in weights]
    total = sum(weights)
    if len(weights) != len(states) or total == 0 or not math.isfinite(total):
        raise ConfigError(
            f"{len(states)} states and the weights {weights}; give one finite number for each, with a sum other than 0."
        )
    for state in states:
        _is_state(state)
    first = states[0]
    for other in states[1:]:
        first.check(other, other.origin)
    found: dict[str, Tensor] = {}
    for name, value in first.items():
        if not value.is_floating_point():
            found[name] = value.clone()
            continue
        wide = torch.promote_types(value.dtype, torch.float32)
        mean = torch.zeros_like(value, dtype=wide)
        for state, weight in zip(states, weights, strict=True):
            mean.add_(state[name].to(value.device, wide), alpha=weight / total)
        found[name] = mean.to(value.dtype)
    return AdapterState(found, "an average")


def _is_state(given: object) -> None:
    if not isinstance(given, AdapterState):
        raise ConfigError(
            f"expected a state (model.adapter_state(name), or what was computed of states), not a {type(given).__name__}."
        )


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of an adapter by name, those too that are not saved."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def state_of(module: nn.Module, origin: str) -> AdapterState:
    """Copies of an adapter's tensors."""
    return AdapterState({n: whole(t.detach()).clone() for n, t in tensors_of(module).items()}, origin)


@torch.no_grad()
def put(module: nn.Module, state: AdapterState, what: str) -> None:
    """Copy a state into an adapter, all of it or (MismatchError) nothing."""
    _is_state(state)
    own = tensors_of(module)
    state.check(own, what)
    given = spread(state, own)
    for name, tensor in own.items():
        tensor.copy_(given[name])


@torch.no_grad()
def move_towards(slow: nn.Module, fast: nn.Module, decay: float, what: str) -> None:
    """slow <- decay * slow + (1 - decay) * fast, for every parameter and floating buffer; other buffers are copied.

    Raises:
        MismatchError: they have not the same tensors, naming the first that differs; nothing is changed.
    """
    ours, theirs = tensors_of(slow), tensors_of(fast)
    if [(n, t.shape) for n, t in ours.items()] != [(n, t.shape) for n, t in theirs.items()]:
        AdapterState(ours, what).check(theirs, "what it averages")
    averaged = [n for n, t in ours.items() if t.is_floating_point()]
    if averaged:
        torch._foreach_mul_([ours[n] for n in averaged], decay)
        torch._foreach_add_([ours[n] for n in averaged], [theirs[n] for n in averaged], alpha=1 - decay)
    for name in ours.keys() - set(averaged):
        ours[name].copy_(theirs[name])
