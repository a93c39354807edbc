"""Modules of which every task has one of its own, or of which all tasks have one in common; and what VL-Adapter makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.adapters.parts.bottleneck import bend, bottleneck
from zoo.adapters.parts.hypernetwork import linear

STD = 0.02  # of all that starts "normal"


@dataclass(eq=False)
class Which:
    """The number of the task of the pass under way; `value` is that of `points.context("task", "batch")`."""

    names: tuple[str, ...]
    value: Any

    def __call__(self) -> int:
        """0 .. tasks - 1; a single task need not be said."""
        return self.names.index(self.value.get()) if len(self.names) > 1 else 0


class OfTask(nn.Module):
    """One module for each task, of which that of the pass runs; `which=None`: one for all."""

    def __init__(self, make: Callable[[], nn.Module], which: Which | None) -> None:
        super().__init__()
        self.each = nn.ModuleList(make() for _ in range(1 if which is None else len(which.names)))
        self.which = which

    def own(self) -> nn.Module:
        """That of the pass."""
        return self.each[0 if self.which is None else self.which()]

    def forward(self, *args: Any) -> Any:
        """What the task's own module makes of it."""
        return self.own()(*args)


class OwnBottleneck(nn.Module):
    """`y (..., d) -> y + Up(f(Down y))`, each of the two for each task or for all."""

    def __init__(self, down: OfTask, up: OfTask, activation: str) -> None:
        super().__init__()
        self.down, self.up, self.activation = down, up, activation

    def forward(self, y: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        return y + self.up(bend(self.down(y), self.activation))


class OwnPrompts(nn.Module):
    """The prompts of a task, (1, T, d) or a copy for each sample."""

    def __init__(self, made: OfTask) -> None:
        super().__init__()
        self.made = made

    def forward(self, batch: int) -> Tensor:
        """A batch's size -> (1 or batch, T, d)."""
        tokens: Tensor = self.made()[None]
        return tokens if self.made.which is None else tokens.expand(batch, -1, -1)


class MadePrompts(nn.Module):
    """`W_2 tanh(W_1 E + b_1) + b_2` (T, d); E (T, d), W_1 (m, d), W_2 (d, m)."""

    def __init__(self, num_tokens: int, dim: int, hidden: int, normal: bool) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(num_tokens, dim) * (STD if normal else 1.0))
        self.into, self.out = plain(dim, hidden, normal), plain(hidden, dim, normal)

    def forward(self) -> Tensor:
        """(T, d)."""
        return self.out(self.into(self.embedding).tanh())


class Bare(NamedTuple):
    """A bottleneck without a norm: of one point, or of P points with one more axis in front."""

    down: Tensor  # (b, d)
    down_bias: Tensor  # (b,)
    up: Tensor  # (d, b)
    up_bias: Tensor  # (d,)

    def points(self) -> Sequence[Bare]:
        """Of P points together: each by itself."""
        return [Bare(*single) for single in zip(*(t.unbind(0) for t in self), strict=True)]


class BareMaker(nn.Module):
    """Makes a bottleneck d -> b -> d from an embedding of width p: (p + 1) (2 d b + b + d) numbers."""

    def __init__(self, embedding: int, dim: int, size: int) -> None:
        super().__init__()
        self.dim, self.size = dim, size
        self.down, self.down_bias = linear(embedding, size * dim), linear(embedding, size)
        self.up, self.up_bias = linear(embedding, dim * size), linear(embedding, dim)

    def forward(self, embeddings: Tensor) -> Bare:
        """(P, p) -> the weights of P points."""
        return Bare(
            self.down(embeddings).unflatten(-1, (self.size, self.dim)),
            self.down_bias(embeddings),
            self.up(embeddings).unflatten(-1, (self.dim, self.size)),
            self.up_bias(embeddings),
        )


class BareBottleneck(nn.Module):
    """`y (..., d) -> y + W_up f(W_down y + b_down) + b_up` with the weights that were made for this pass."""

    def __init__(self, made: Any, hyper: nn.Module, name: str, activation: str) -> None:
        super().__init__()
        self.made, self.shared, self.point, self.activation = made, (hyper,), name, activation

    def forward(self, y: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        weights: Bare = self.made.get()[self.point]
        return y + bottleneck(y, *weights, activation=self.activation)


def plain(dim_in: int, dim_out: int, normal: bool) -> nn.Linear:
    """A linear map that starts at N(0, 0.02^2) with biases 0, or as torch starts it."""
    layer = nn.Linear(dim_in, dim_out)
    if normal:
        nn.init.normal_(layer.weight, std=STD)
        nn.init.zeros_(layer.bias)
    return layer
