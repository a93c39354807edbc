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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from zoo.adapters.parts.hypernetwork import BottleneckMaker, HyperNetwork, Projector, Stack
from zoo.adapters.parts.of_tasks import OfTasks
from zoo.points import Points, SublayerPoint
from zoo.registry import register_adapter


@register_adapter("hyperformer")
@dataclass
class Hyperformer(OfTasks):
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
    trial = {"rank": 2, "task_dim": 4, "hidden": 8, "projected": 8}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_settings(32.0, "task_dim", "hidden", "projected")

    def hypernetwork(self, chosen: Sequence[SublayerPoint]) -> HyperNetwork:
        """What makes the bottlenecks of these points: a stack for each tower and width."""

        def stack(group: list[SublayerPoint]) -> Stack:
            dim = group[0].dim_out
            return Stack(
                group,
                self.task_dim,
                lambda width: Projector(width, self.hidden, self.projected),
                lambda: BottleneckMaker(self.projected, dim, self.bottleneck_at(dim)),
                plus=self.form == "++",
            )

        return HyperNetwork(self.tasks, self.task_dim, chosen, lambda p: (p.tower, p.dim_out), stack)

    def attach(self, points: Points) -> None:
        """One hypernetwork; at every selected sublayer the bottleneck that it makes."""
        chosen = self.chosen(points)
        self.place(points, chosen, self.hypernetwork(chosen))
        if self.train_norms:
            for norm in points.require("norm", "hyperformer with train_norms"):
                norm.train(*(n for n in ("weight", "bias") if norm.module._parameters.get(n) is not None))
