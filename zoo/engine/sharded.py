"""Models whose parameters are spread over processes: `torch.distributed.fsdp.fully_shard`, tensor parallelism.

Each process holds a part of every parameter (a `DTensor`), except while a module runs, when FSDP registers the whole tensors in
the parameters' places, and at the root until the next backward. So what a method's own code reads in a forward pass is whole;
what reads parameters between passes (saving, fingerprints, states of adapters) gathers them here, and all processes must call it.
Nothing is imported for this: a model can be sharded only where somebody has loaded these modules of torch.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from zoo.errors import ZooError

__all__ = ["gathered", "is_sharded", "known_types", "refuse", "reshard", "spread", "whole", "with_whole_parameters"]


P = ParamSpec("P")
R = TypeVar("R")


def _dtensor() -> Any:
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())


def known_types() -> tuple[type, ...]:
    """Types of tensors whose numbers can be read: plain ones, and those of which a process has a part."""
    return (Tensor, kind) if (kind := _dtensor()) != () else (Tensor,)


def _together() -> bool:
    """Whether there are other processes at all: without them no module of a model has to be looked at."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _shards(model: nn.Module) -> list[Any]:
    """The modules of a model that FSDP shards."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return [] if kind is None or not _together() else [m for m in model.modules() if isinstance(m, kind)]


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters of a model are spread over processes."""
    kind = _dtensor() if _together() else ()
    return bool(_shards(model)) or (kind != () and any(isinstance(p, kind) for p in model.parameters()))


def reshard(model: nn.Module) -> None:
    """Let go of whole tensors that stand from the last pass; what is set on a parameter then is set on the one that stays."""
    for module in _shards(model):
        module.reshard()


def refuse(model: nn.Module, error: type[ZooError], what: str, instead: str) -> None:
    """Raise `error` for what cannot be done to a sharded model."""
    if is_sharded(model):
        raise error(f"{what}: the parameters of this model are spread over processes. {instead}")


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """A tensor of all processes' parts; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, _dtensor()) else tensor  # type: ignore[attr-defined]


@torch.no_grad()
def spread(values: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This process's part of each value that goes where a sharded tensor stands, cut from what this process has."""
    kind, found = _dtensor(), dict(values)
    for name, value in values.items():
        place: Any = like.get(name)
        if isinstance(place, kind) and not isinstance(value, kind) and place.shape == value.shape:
            from torch.distributed.tensor import distribute_tensor

            value = value.detach().to(place.device, place.dtype)
            found[name] = distribute_tensor(value, place.device_mesh, place.placements, src_data_rank=None)
    return found


@contextmanager
def gathered(model: nn.Module, *parts: nn.Module) -> Iterator[None]:
    """Whole tensors in the places of the parameters of these parts of a model; those that are spread come back at the end."""
    reshard(model)
    kind, made, stood = _dtensor(), {}, []
    try:
        for module in {m for part in parts for m in part.modules()} if kind != () else ():
            for name, parameter in module._parameters.items():
                if isinstance(parameter, kind):
                    stood.append((module, name, parameter))
        # in one order on all processes, since each of these is an exchange between them
        order = {id(p): i for i, p in enumerate(p for part in parts for p in part.parameters())}
        for module, name, parameter in sorted(stood, key=lambda found: order[id(found[2])]):
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(whole(parameter), requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
        yield
    finally:
        for module, name, parameter in stood:
            module._parameters[name] = parameter


def with_whole_parameters(fn: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """A function of a model that reads its adapters and heads, with these whole."""

    @functools.wraps(fn)
    def run(model: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with gathered(model, model.adapters, model.heads):
            return fn(model, *args, **kwargs)

    return run
