"""Looking into a model's passes: what a block is called with and gives, and the hidden states at the end."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.model import Model
from zoo.points import Point
from zoo.tasks.base import call

__all__ = ["Call", "Seen", "call_of", "distance", "replaced", "seen", "tokens_of"]


@dataclass(frozen=True)
class Call:
    """What a block was called with, and the tokens that it gave."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor

    def run(self, block: nn.Module) -> Tensor:
        """The tokens that another block gives."""
        return tokens_of(block(*self.args, **self.kwargs))


class _Reached(Exception):
    """The pass has come to where it was to come."""


def tokens_of(output: Any) -> Tensor:
    """The tokens out of what a block gives."""
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


@torch.no_grad()
def call_of(model: Model, block: nn.Module, inputs: Any) -> Call:
    """How a pass calls a block; what stands behind it is not run."""
    found: list[Call] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        found.append(Call(args, dict(kwargs), tokens_of(output)))
        raise _Reached

    handle = block.register_forward_hook(stop, with_kwargs=True)
    try:
        call(model, inputs)
    except _Reached:
        return found[0]
    finally:
        handle.remove()
    raise ConfigError("these inputs do not reach all blocks; give those of the blocks' tower.")


@dataclass
class Seen:
    """Of one pass: tokens behind each block, by name, and the final hidden states, which the head or the words' scores stand
    on."""

    blocks: dict[str, Tensor] = field(default_factory=dict)
    final: Tensor | None = None
    scores: Tensor | None = None


@contextmanager
def _hooks(model: Model, found: Seen, blocks: Collection[str]) -> Iterator[None]:
    handles = []

    def behind(name: str) -> Any:
        def take(module: nn.Module, args: Any, output: Any) -> None:
            found.blocks.setdefault(name, tokens_of(output))  # what is run again in backward is not looked at

        return take

    def final(module: nn.Module, args: Any, output: Any) -> None:
        found.final = output if found.final is None else found.final

    points: list[Point] = list(model.points)
    handles += [p.module.register_forward_hook(behind(p.name)) for p in points if p.name in blocks]
    if not model.family.pools:
        norms = [p for p in points if p.kind == "norm" and p.block is None]
        handles.append(norms[-1].module.register_forward_hook(final))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def seen(model: Model, inputs: Any, blocks: Collection[str] = ()) -> Seen:
    """One pass, with the tokens behind these blocks; `final` is (B, d) of a network that pools, else (B, T, d) of the places
    that `scores` are of."""
    found = Seen()
    heads: list[Any] = []
    if model.family.pools and model.num_classes:
        head = model.head
        heads.append(head.register_forward_pre_hook(lambda module, args: setattr(found, "final", args[0])))
    try:
        with _hooks(model, found, blocks):
            output = call(model, inputs)
    finally:
        for handle in heads:
            handle.remove()
    if not model.family.pools:
        found.scores = output
        if found.final is not None:
            found.final = found.final[:, -output.shape[1] :]
    elif model.num_classes:
        found.scores = output
    else:
        found.final = output
    if found.final is None:
        raise ConfigError(
            f"'{model.backbone_name}' shows no final hidden states: it has neither pooled features nor a last norm."
        )
    return found


@contextmanager
def replaced(block: nn.Module, by: nn.Module) -> Iterator[None]:
    """A context in which another block stands in a block's place."""

    def instead(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return by(*args, **kwargs)

    handle = block.register_forward_hook(instead, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def distance(one: Tensor, other: Tensor) -> Tensor:
    """1 - cosine of what is left and what was there, of each sample (B, ...) as one vector: (B,)."""
    return 1 - torch.cosine_similarity(one.flatten(1).float(), other.flatten(1).float(), dim=1)
