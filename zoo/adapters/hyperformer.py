"""Hyperformer: bottleneck adapters of all layers and tasks, made by one hypernetwork from embeddings of task, layer and place.

Idea: tasks share what makes their adapters, not the adapters. A row for the task, one for the layer (and one for the kind of
sublayer) go through a small network, and linear maps of its output are the weights of an ordinary bottleneck.
Points: `sublayer` (verb `after`); `norm` (verb `train`) with `train_norms`. Context: `task`, one for the batch.

    y <- y + LN(W_up f(W_down y + b_down) + b_up; gamma, beta)             y the sublayer's output, in front of the residual sum
    e = LN(W_2 relu(W_1 z + b_1) + b_2)                                    (p,), W_1 (h, z), W_2 (p, h)
    [W_down (b, d), b_down, W_up (d, b), b_up, gamma (d,), beta (d,)] = six linear maps of e

| form          | z                                        | linear maps                              |
| ------------- | ---------------------------------------- | ---------------------------------------- |
| `hyperformer` | [task; layer], each (m,)                 | a set for each kind of sublayer          |
| `++`          | [task; layer; kind of sublayer]          | one set                                  |

A stack (encoder, decoder, tower; on hierarchical backbones the blocks of one width) has its own network, maps and rows of
layers and kinds; the rows of tasks are common to all. f is the GELU by tanh. Start: rows N(0, 1), all matrices N(0, 0.01^2),
biases 0: close to the pretrained function, since gamma is small, not equal to it.

The weights are made once for each forward pass, in front of the backbone, and kept in evaluation (`points.generate`). A batch
has one task: `model(x, context={"task": "mnli"})`, or `with model.context(task="mnli"):`; with a single task it need not be
said. What a task's adapters have become can be taken out as a plain `adapter` (`extract`), which needs no hypernetwork.

Defaults: m = 64, h = 128, p = 64, b = d / 32, self-attention and MLP, no cross-attention. Their T5 trains its LayerNorms too
(`train_norms=True`); the default leaves them frozen.
Counts: for each stack and set (p + 1) (2 d b + b + 3 d), its network h (z + 1) + p (h + 1) + 2 p, m (layers + kinds); m for
each task. T5-base with its norms and 8 tasks: ++ 5,211,056 (0.29 % of T5 for each task), hyperformer 10,289,376. ViT-B/16, one
task: ++ 2,581,528, hyperformer 5,120,688.
Source: Karimi Mahabadi, Ruder, Dehghani and Henderson, "Parameter-efficient Multi-task Fine-tuning for Transformers via Shared
Hypernetworks", ACL 2021 (rabeehk/hyperformer).
Deviations: b is d / reduction rounded, theirs is rounded down (32 divides 768). The rows of all tasks are one table, so an
optimizer with momentum also moves rows of tasks that were not in the batch, as theirs does once their gradients exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.adapters.adapter import BottleneckAdapter
from zoo.adapters.base import Adapter
from zoo.adapters.parts.bottleneck import ACTIVATIONS, bottleneck
from zoo.adapters.parts.hypernetwork import BottleneckMaker, Projector, Weights, normed
from zoo.errors import MergeError, UnknownNameError, nearest
from zoo.host import Host
from zoo.points import Points, SublayerPoint
from zoo.points.merger import Merger
from zoo.registry import register_adapter


class Stack(nn.Module):
    """What makes the adapters of the points of one tower and width."""

    def __init__(self, config: Hyperformer, points: list[SublayerPoint]) -> None:
        super().__init__()
        dim, m = points[0].dim_out, config.task_dim
        blocks = sorted({p.block or 0 for p in points})
        kinds = list(dict.fromkeys(map(_kind, points)))
        self.plus = config.form == "++"
        self.layers = nn.Parameter(torch.randn(len(blocks), m))
        self.kinds = nn.Parameter(torch.randn(len(kinds), m)) if self.plus else None
        self.projector = Projector(m * (3 if self.plus else 2), config.hidden, config.projected)
        makers = 1 if self.plus else len(kinds)
        size = config.bottleneck_at(dim)
        self.makers = nn.ModuleList(BottleneckMaker(config.projected, dim, size) for _ in range(makers))
        self.names = [p.name for p in points]
        # of each point: its row of layers and of kinds
        self.places = [(blocks.index(p.block or 0), kinds.index(_kind(p))) for p in points]

    def forward(self, task: Tensor) -> dict[str, Weights]:
        """The row of a task (m,) -> the weights of every point, by name."""
        rows = [task.expand(len(self.layers), -1), self.layers]
        if self.kinds is not None:
            layer, kind = (list(column) for column in zip(*self.places))
            rows = [task.expand(len(self.places), -1), self.layers[layer], self.kinds[kind]]
        embedded = self.projector(torch.cat(rows, dim=-1))
        made = [maker(embedded).points() for maker in self.makers]
        chosen = made[0] if self.plus else [made[kind][layer] for layer, kind in self.places]
        return dict(zip(self.names, chosen, strict=True))


class HyperNetwork(nn.Module):
    """The rows of all tasks, and the stacks that make adapters from them."""

    def __init__(self, config: Hyperformer, points: list[SublayerPoint]) -> None:
        super().__init__()
        self.names = config.tasks
        self.tasks = nn.Parameter(torch.randn(len(config.tasks), config.task_dim))
        groups: dict[tuple[str, int], list[SublayerPoint]] = {}
        for point in points:
            groups.setdefault((point.tower, point.dim_out), []).append(point)
        self.stacks = nn.ModuleList(Stack(config, group) for group in groups.values())

    def forward(self, task: str | None) -> dict[str, Weights]:
        """A task's name (None: the only one) -> the weights of every point, by name."""
        row = self.tasks[0 if task is None else self.names.index(task)]
        return {name: weights for stack in self.stacks for name, weights in stack(row).items()}


class MadeBottleneck(nn.Module):
    """`y (..., d) -> y + LN(W_up f(W_down y + b_down) + b_up)` with the weights that were made for this pass."""

    def __init__(self, made: Any, hyper: HyperNetwork, name: str, activation: str) -> None:
        super().__init__()
        self.made, self.shared = made, (hyper,)
        self.point, self.activation = name, activation

    def forward(self, y: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        weights: Weights = self.made.get()[self.point]
        return y + normed(bottleneck(y, *weights[:4], self.activation), weights)


@register_adapter("hyperformer")
@dataclass
class Hyperformer(Adapter):
    """Hyperformer and Hyperformer++.

    Args:
        tasks: their names.
        form: "hyperformer" or "++", see the table above.
        rank: b, the same everywhere. reduction: instead, b = d / reduction at each point (at least 1).
        task_dim: m, width of the rows. hidden: h. projected: p.
        targets: roles or names of sublayer points; None takes all but cross-attention.
        activation: f.
        train_norms: train the scale and shift of every normalisation of the backbone too, for all tasks together.
    """

    tasks: tuple[str, ...] = ("default",)
    form: Literal["hyperformer", "++"] = "hyperformer"
    rank: int | None = None
    reduction: float | None = None
    task_dim: int = 64
    hidden: int = 128
    projected: int = 64
    targets: str | tuple[str, ...] | None = None
    activation: Literal["relu", "gelu", "gelu_new", "silu", "tanh", "none"] = "gelu_new"
    train_norms: bool = False

    default_lr = 3e-4
    paper = "Karimi Mahabadi et al. 2021"
    taxonomy = "additive"
    identity = False
    merges = False
    trial = {"rank": 2, "task_dim": 4, "hidden": 8, "projected": 8}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tasks = tuple(self.tasks)
        if self.rank is None and self.reduction is None:
            self.reduction = 32.0
        self.check(bool(self.tasks), "tasks is empty; name at least one.")
        self.check(len(set(self.tasks)) == len(self.tasks), f"tasks names one twice: {', '.join(self.tasks)}.")
        self.check(self.rank is None or self.reduction is None, "rank and reduction are both given; give one of them.")
        for name in ("rank", "task_dim", "hidden", "projected"):
            value = getattr(self, name)
            self.check(value is None or value >= 1, f"{name} is {value}; expected 1 or more.")
        self.check(self.reduction is None or self.reduction > 0, f"reduction is {self.reduction}; expected above 0.")
        self.check(
            self.activation in ACTIVATIONS, f"activation is {self.activation!r}; known: {', '.join(ACTIVATIONS)}."
        )

    def bottleneck_at(self, dim: int) -> int:
        """b at a point of width `dim`."""
        return self.rank if self.rank is not None else max(1, round(dim / (self.reduction or 1)))

    def attach(self, points: Points) -> None:
        """One hypernetwork; at every selected sublayer the bottleneck that it makes."""
        points.require("sublayer", "hyperformer")
        roles = [r for r in points.roles("sublayer") if r != "cross"]
        chosen: list[SublayerPoint] = (
            points.select(kind="sublayer", role=roles)
            if self.targets is None
            else points.select(self.targets, kind="sublayer")
        )
        many = len(self.tasks) > 1
        task = points.context("task", "batch", required=many, choices=self.tasks, example=self.tasks[0])
        hyper = HyperNetwork(self, chosen)
        made = points.generate("hyper", hyper, task)
        for point in chosen:
            point.after(MadeBottleneck(made, hyper, point.name, self.activation))
        if self.train_norms:
            for norm in points.require("norm", "hyperformer with train_norms"):
                norm.train(*(n for n in ("weight", "bias") if norm.module._parameters.get(n) is not None))

    def extract(self, model: Host, task: str, name: str | None = None) -> tuple[str, ...]:
        """Attach a task's bottlenecks to the model as a plain `adapter` (switched off), and return its name in the model.

        With `train_norms`, the trained norms come as a second adapter, `norm`, whose name is returned too. Together they give
        what this adapter gives for the task; `model.save_adapter(folder, adapters=names)` writes them.

        Raises:
            UnknownNameError: this adapter has no such task.
        """
        if task not in self.tasks:
            raise UnknownNameError(f"'{self.method}' has no task '{task}'. {nearest(task, self.tasks)}")
        hyper: Any = self.hyper
        with torch.no_grad():
            made: dict[str, Weights] = hyper(task)
        if name is None and task != "default":  # which is no name for an adapter: it becomes "adapter"
            name = task
        plain = BottleneckAdapter(
            form="houlsby",
            rank=self.rank,
            reduction=self.reduction,
            targets=tuple(made),
            activation=self.activation,
            norm="out",
        )
        with model.all_or_nothing(), torch.no_grad():
            twin = model.add_adapter(plain, name, activate=False)
            names = [next(n for n, one in model.adapters.items() if one is twin)]
            for point, weights in made.items():
                part = twin.module_at(point)
                parts = (part.adapter_down, part.adapter_up, part.adapter_norm)
                for layer, weight, bias in zip(parts, weights[::2], weights[1::2], strict=True):
                    layer.weight.copy_(weight)
                    layer.bias.copy_(bias)
            if self.train_norms:
                names.append(f"{names[0]}-norm")
                norms = model.add_adapter("norm", names[1], activate=False)
                trained = dict(self.named_parameters())
                for key, parameter in norms.named_parameters():
                    parameter.copy_(trained[key])
        return tuple(names)

    def merge(self, merger: Merger) -> None:
        """Never.

        Raises:
            MergeError: always.
        """
        raise MergeError(
            "'hyperformer' cannot be merged: it is a network of its own behind the sublayer, not a change of the weights. Take a "
            "task out as a plain adapter (extract), or keep the model as it is."
        )


def _kind(point: SublayerPoint) -> str:
    """What a block calls its sublayer: `attn`, `mlp`, `text.attn`; two of one role are two kinds."""
    parts = point.name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :] if numbers else parts)
