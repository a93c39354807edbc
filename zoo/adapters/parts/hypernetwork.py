"""Hypernetworks: weights of bottlenecks as linear maps of embeddings of task, layer and place (Karimi Mahabadi et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.points import SublayerPoint

STD = 0.01  # of every matrix here; biases start at 0


class Weights(NamedTuple):
    """A bottleneck with a LayerNorm behind it: of one point, or of P points with one more axis in front."""

    down: Tensor  # (b, d)
    down_bias: Tensor  # (b,)
    up: Tensor  # (d, b)
    up_bias: Tensor  # (d,)
    norm: Tensor  # (d,)
    norm_bias: Tensor  # (d,)

    def points(self) -> list[Weights]:
        """Of P points together: each by itself. One backward gathers them again."""
        return [Weights(*single) for single in zip(*(t.unbind(0) for t in self), strict=True)]


def linear(dim_in: int, dim_out: int) -> nn.Linear:
    """A linear map that starts at N(0, 0.01^2)."""
    layer = nn.Linear(dim_in, dim_out)
    nn.init.normal_(layer.weight, std=STD)
    nn.init.zeros_(layer.bias)
    return layer


class Projector(nn.Module):
    """`e = LN(W_2 relu(W_1 [z_1; z_2; ...] + b_1) + b_2)`: (P, width) -> (P, projected); `norm=False` leaves LN out."""

    def __init__(self, width: int, hidden: int, projected: int, norm: bool = True) -> None:
        super().__init__()
        self.into = linear(width, hidden)
        self.out = linear(hidden, projected)
        self.norm = nn.LayerNorm(projected, eps=1e-6) if norm else nn.Identity()

    def forward(self, rows: Tensor) -> Tensor:
        """(P, width) -> (P, projected)."""
        return self.norm(self.out(self.into(rows).relu()))


class BottleneckMaker(nn.Module):
    """Makes a bottleneck d -> b -> d and its LayerNorm from an embedding, by one linear map for each tensor.

    With `inner` = q, each matrix is a product of two of q columns and rows, which one map makes together: of rank q at most.

    Count: (p + 1) (2 d b + b + d + 2 d) for embeddings of width p; with q, 2 q (d + b) in the place of 2 d b.
    """

    def __init__(self, embedding: int, dim: int, bottleneck: int, inner: int | None = None) -> None:
        super().__init__()
        self.dim, self.bottleneck, self.inner = dim, bottleneck, inner
        matrix = bottleneck * dim if inner is None else inner * (bottleneck + dim)
        self.down = linear(embedding, matrix)
        self.down_bias = linear(embedding, bottleneck)
        self.up = linear(embedding, matrix)
        self.up_bias = linear(embedding, dim)
        self.scale = linear(embedding, dim)
        self.shift = linear(embedding, dim)

    def forward(self, embeddings: Tensor) -> Weights:
        """(P, p) -> the weights of P points."""
        return Weights(
            self._matrix(self.down(embeddings), self.bottleneck, self.dim),
            self.down_bias(embeddings),
            self._matrix(self.up(embeddings), self.dim, self.bottleneck),
            self.up_bias(embeddings),
            self.scale(embeddings),
            self.shift(embeddings),
        )

    def _matrix(self, made: Tensor, rows: int, columns: int) -> Tensor:
        """(P, ...) -> (P, rows, columns)."""
        if self.inner is None:
            return made.unflatten(-1, (rows, columns))
        left, right = made.split([rows * self.inner, self.inner * columns], dim=-1)
        return left.unflatten(-1, (rows, self.inner)) @ right.unflatten(-1, (self.inner, columns))


class Stack(nn.Module):
    """What makes the bottlenecks of some points of one width: rows of layers and kinds, a network, and linear maps.

    Args:
        points: those it makes them for. width: of a row.
        network: the width of its input -> a `Projector`. maker: a new set of linear maps.
        layers: a row for each layer. plus: a row for each kind of sublayer and one set of maps, instead of a set for each kind.
    """

    def __init__(
        self,
        points: Sequence[SublayerPoint],
        width: int,
        network: Callable[[int], Projector],
        maker: Callable[[], nn.Module],
        *,
        layers: bool = True,
        plus: bool = False,
    ) -> None:
        super().__init__()
        blocks = sorted({p.block or 0 for p in points}) if layers else [0]
        kinds = list(dict.fromkeys(map(kind_of, points)))
        self.plus = plus
        self.layers = nn.Parameter(torch.randn(len(blocks), width)) if layers else None
        self.kinds = nn.Parameter(torch.randn(len(kinds), width)) if plus else None
        self.projector = network(width * (1 + layers + plus))
        self.makers = nn.ModuleList(maker() for _ in range(1 if plus else len(kinds)))
        self.names = [p.name for p in points]
        # of each point: its row of layers and of kinds
        self.places = [(blocks.index(p.block or 0) if layers else 0, kinds.index(kind_of(p))) for p in points]

    def forward(self, task: Tensor) -> dict[str, Weights]:
        """The row of a task (m,) -> the weights of every point, by name."""
        rows = [task[None]] if self.layers is None else [task.expand(len(self.layers), -1), self.layers]
        if self.kinds is not None:
            layer, kind = (list(column) for column in zip(*self.places))
            rows = [row[layer] for row in rows] + [self.kinds[kind]]
        embedded = self.projector(torch.cat(rows, dim=-1))
        made = [maker(embedded).points() for maker in self.makers]
        chosen = made[0] if self.plus else [made[kind][layer] for layer, kind in self.places]
        return dict(zip(self.names, chosen, strict=True))


class HyperNetwork(nn.Module):
    """The rows of all tasks, and the stacks that make bottlenecks from them.

    Args:
        names: of the tasks. width: of a row.
        points: for which bottlenecks are made. group: which points have a stack in common. stack: the stack of such points.
    """

    def __init__(
        self,
        names: Sequence[str],
        width: int,
        points: Sequence[SublayerPoint],
        group: Callable[[SublayerPoint], Hashable],
        stack: Callable[[list[SublayerPoint]], nn.Module],
    ) -> None:
        super().__init__()
        self.names = tuple(names)
        self.tasks = nn.Parameter(torch.randn(len(names), width))
        groups: dict[Hashable, list[SublayerPoint]] = {}
        for point in points:
            groups.setdefault(group(point), []).append(point)
        self.stacks = nn.ModuleList(map(stack, groups.values()))

    def forward(self, task: str | None) -> dict[str, Weights]:
        """A task's name (None: the only one) -> the weights of every point, by name."""
        row = self.tasks[0 if task is None else self.names.index(task)]
        return {name: weights for stack in self.stacks for name, weights in stack(row).items()}


def kind_of(point: SublayerPoint) -> str:
    """What a block calls its sublayer: `attn`, `mlp`, `text.attn`; two of one role are two kinds."""
    parts = point.name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :] if numbers else parts)


def normed(x: Tensor, weights: Weights) -> Tensor:
    """The LayerNorm of a bottleneck: (..., d) -> (..., d)."""
    return F.layer_norm(x, x.shape[-1:], weights.norm, weights.norm_bias)
