"""Adapters as vectors: flat states that can be added, scaled, averaged, measured, and put back.

    a, b = model.adapter_state("a"), model.adapter_state("b")
    model.set_adapter_state("a", 0.7 * a + 0.3 * b)
    model.set_adapter_state("a", average([a, b, c], weights=[2, 1, 1]))
    print((a - b).norm(), a.nbytes)

A state holds every parameter and buffer of one adapter under its name there (`blocks.3.attn.q.lora_a`), detached copies on the
device of the adapter, and its `plan`: what the method chose from data (channels, columns, a threshold), without which the numbers
mean nothing. Two states go together if they have the same names with the same shapes and the same plan; where they do not, the
first difference is told and nothing happens. Arithmetic is on floating tensors; lists of places and masks must be equal in both,
and single numbers (counters) are taken from the first of a sum.

A state that is put into an adapter brings its plan: the adapter is attached anew by it, as one that is loaded from disk. Its
parameters are new ones then, so an optimizer is made afterwards.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn

from zoo.adapters.structure import KEY
from zoo.engine.sharded import spread, whole
from zoo.errors import ConfigError, MismatchError, ZooError

__all__ = ["AdapterState", "average", "hand_over", "move_towards", "put", "state_of"]

Plan = dict[str, Any] | None | EllipsisType  # `...`: not known


class AdapterState(Mapping[str, Tensor]):
    """The tensors of one adapter by name; `+`, `-`, `*` with numbers and with each other, `norm`, `nbytes`.

    Args:
        tensors: by name.
        origin: whose they are, for messages.
        plan: of the adapter; None: it has none. `...`: not known, and taken to be that of its partner.
    """

    plan: Plan = ...

    def __init__(self, tensors: Mapping[str, Tensor], origin: str = "a state", plan: Plan = ...) -> None:
        self._tensors, self.origin = dict(tensors), origin
        self.plan = json.loads(json.dumps(plan)) if plan is not ... else ...  # a copy

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

        return AdapterState({n: moved(t) for n, t in self._tensors.items()}, self.origin, self.plan)

    def check(self, other: Mapping[str, Tensor], what: str = "a state") -> None:
        """Raise MismatchError, naming what differs first, unless `other` has these names and shapes, and plan, if known."""
        for name in dict.fromkeys([*self._tensors, *other]):
            mine = tuple(self._tensors[name].shape) if name in self._tensors else "none"
            theirs = tuple(other[name].shape) if name in other else "none"
            if mine != theirs:
                raise MismatchError(
                    f"{self.origin} and {what} do not go together: '{name}' has shape {mine} in the first and {theirs} in the "
                    "second. States go together if their adapters have the same method and settings on the same backbone."
                )
        if isinstance(other, AdapterState):
            self._check_choice(other, what)

    def _check_choice(self, other: AdapterState, what: str) -> None:
        """Raise MismatchError where what was chosen from data differs: plans, lists of places, masks."""
        where = differs(self.plan, other.plan)
        if where is None:
            for name, mine in self._tensors.items():
                if _chosen(mine) and not torch.equal(mine, other[name].to(mine.device)):
                    where = name
                    break
        if where is not None:
            raise MismatchError(
                f"{self.origin} and {what} do not go together: their methods have chosen differently from data ('{where}'), so "
                "that their numbers belong to different places. Let both have one choice: calibrate one adapter, copy it "
                "(model.copy_adapter), and train the copies."
            )

    def _with(self, other: Any, sign: float) -> AdapterState:
        if not isinstance(other, AdapterState):
            return NotImplemented
        self.check(other, other.origin)
        found = {}
        for name, value in self._tensors.items():
            their = other[name].to(value.device)
            found[name] = value + sign * their.to(value.dtype) if value.is_floating_point() else value.clone()
        return AdapterState(found, self.origin, _known(self, other))

    def __add__(self, other: Any) -> AdapterState:
        return self._with(other, 1.0)

    def __sub__(self, other: Any) -> AdapterState:
        return self._with(other, -1.0)

    def __mul__(self, factor: Any) -> AdapterState:
        """Every number times a number."""
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            return NotImplemented
        return AdapterState(
            {n: t * factor if t.is_floating_point() else t.clone() for n, t in self._tensors.items()},
            self.origin,
            self.plan,
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
    return AdapterState(found, "an average", _known(*states))


def differs(mine: Plan, theirs: Plan) -> str | None:
    """Where two plans say different things, apart from shapes (tensors have them); None: nowhere, or one is not known."""
    if mine is ... or theirs is ... or mine == theirs:
        return None
    if mine is None or theirs is None:
        return next((key for key in mine or theirs or {} if key != KEY), None)
    mine, theirs = ({k: v for k, v in json.loads(json.dumps(p)).items() if k != KEY} for p in (mine, theirs))
    return _path(mine, theirs)


def _path(mine: Any, theirs: Any) -> str | None:
    if not (isinstance(mine, dict) and isinstance(theirs, dict)):
        return None if mine == theirs else ""
    for key in dict.fromkeys([*mine, *theirs]):
        inside = _path(mine[key], theirs[key]) if key in mine and key in theirs else ""
        if inside is not None:
            return f"{key}: {inside}" if inside else key
    return None


def _chosen(tensor: Tensor) -> bool:
    """Whether it is a list of places or a mask, not a number."""
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.dim() > 0 and not tensor.is_meta


def _known(*states: AdapterState) -> Plan:
    return next((s.plan for s in states if s.plan is not ...), ...)


def _is_state(given: object) -> None:
    if not isinstance(given, AdapterState):
        raise ConfigError(
            f"expected a state (model.adapter_state(name), or what was computed of states), not a {type(given).__name__}."
        )


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of an adapter by name, those too that are not saved."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def state_of(module: nn.Module, origin: str) -> AdapterState:
    """Copies of an adapter's tensors and plan."""
    tensors = {n: whole(t.detach()).clone() for n, t in tensors_of(module).items()}
    return AdapterState(tensors, origin, getattr(module, "plan", None))


def hand_over(model: Any, name: str, state: AdapterState) -> None:
    """Put a state into an adapter of a model, which is attached anew where the state brings another plan; all or nothing.

    Raises:
        MismatchError: other tensors than such an adapter has, a plan that cannot be taken here, or a fit that is under way.
    """
    _is_state(state)
    adapter, what = model.adapters[name], f"'{name}'"
    plan = state.plan
    # What an adapter with a head of its own kind says in its plan is its head's, which stays.
    if plan is ... or plan == adapter.plan or adapter.head_kind or _fits(adapter, state):
        return put(adapter, state, what)
    if adapter.training_service is not None:
        state.check(AdapterState(tensors_of(adapter), what, adapter.plan), what)
        return put(adapter, state, what)

    before = adapter.feature_dim(model.family.feature_dim)

    def check(twin: Any) -> None:
        state.check(tensors_of(twin), what)
        head = dict(model.heads.items()).get(name, model.head if name in model.active else None)
        after = twin.feature_dim(model.family.feature_dim)
        if before != after and getattr(head, "in_features", None) is not None:
            raise MismatchError(
                f"with the plan of {state.origin}, {what} would give its head {after} features, and the head reads {before}. "
                "Give both adapters the same choice, or save the first with its head: model.save_adapter(folder)."
            )

    former, adapter.plan = adapter.plan, plan
    try:
        model.reattach(name, check)
    except BaseException as error:
        adapter.plan = former
        if isinstance(error, ZooError) and not isinstance(error, MismatchError):
            raise MismatchError(f"{what} cannot take what {state.origin} has chosen (its plan): {error}") from error
        raise
    put(adapter, state, what)


def _fits(adapter: Any, state: AdapterState) -> bool:
    """Whether plans differ in shapes alone, and these are there already."""
    own = tensors_of(adapter)
    return differs(adapter.plan, state.plan) is None and {n: t.shape for n, t in own.items()} == {
        n: t.shape for n, t in state.items()
    }


@torch.no_grad()
def put(module: nn.Module, state: AdapterState, what: str) -> None:
    """Copy a state into an adapter, all of it or (MismatchError) nothing."""
    _is_state(state)
    own = tensors_of(module)
    # Where a state does not say its plan, its lists of places must be those that the adapter's plan means.
    silent = state.plan is ... and getattr(module, "plan", None) is not None
    state.check(AdapterState(own, what) if silent else own, what)
    given = spread(state, own)
    for name, tensor in own.items():
        tensor.copy_(given[name])


@torch.no_grad()
def move_towards(slow: nn.Module, fast: nn.Module, decay: float, what: str) -> None:
    """slow <- decay * slow + (1 - decay) * fast, for every parameter and floating buffer; other buffers are copied.

    Raises:
        MismatchError: they have not the same tensors or plan, naming the first that differs; nothing is changed.
    """
    ours, theirs = tensors_of(slow), tensors_of(fast)
    plans: list[Any] = [getattr(m, "plan", None) for m in (slow, fast)]
    if differs(*plans) is not None:
        AdapterState(ours, what, plans[0]).check(AdapterState(theirs, "", plans[1]), "what it averages")
    if [(n, t.shape) for n, t in ours.items()] != [(n, t.shape) for n, t in theirs.items()]:
        AdapterState(ours, what).check(theirs, "what it averages")
    averaged = [n for n, t in ours.items() if t.is_floating_point()]
    if averaged:
        torch._foreach_mul_([ours[n] for n in averaged], decay)
        torch._foreach_add_([ours[n] for n in averaged], [theirs[n] for n in averaged], alpha=1 - decay)
    for name in ours.keys() - set(averaged):
        ours[name].copy_(theirs[name])
