"""Polyhistor: adapters of several dense tasks from decomposed hypernetworks, one hypernetwork for each block.

Idea: tasks on one frozen hierarchical backbone share what makes their adapters. The linear maps of a hypernetwork are its cost,
(p + 1) d b for one matrix; here they make two thin factors, and the matrix is their product.
Points: `sublayer` (verb `after`, or `parallel` with insert="parallel"). Context: `task`, one for the batch.

    y <- y + LN(W_up f(W_down y + b_down) + b_up; gamma, beta)             y the sublayer's output, before the residual sum
    h <- h + F(LN h) + LN(W_up f(W_down h + b_down) + b_up; gamma, beta)   instead, parallel: beside it, from its residual stream
    e = W_2 relu(W_1 z + b_1) + b_2                                        (p,), W_1 (h, z), W_2 (p, h)
    W_down = P_1 Q_1, W_up = P_2 Q_2                                       P_1 (b, q), Q_1 (q, d), P_2 (d, q), Q_2 (q, b)
    [P_i; Q_i], b_down (b,), b_up (d,), gamma (d,), beta (d,): six linear maps of e

| `per`   | z, rows of m                       | one network for        | one set of maps for     | theirs         |
| ------- | ---------------------------------- | ---------------------- | ----------------------- | -------------- |
| `block` | [task]                             | each block             | each of its sublayers   | hyperlowrank   |
| `stage` | [task; layer], and kind if several | the blocks of a width  | all of their sublayers  | hyperlowrank++ |

`decomposed=False` makes whole matrices: what the paper compares with as Hyperformer. Rows of tasks are common to all blocks.
Start: rows N(0, 1), matrices N(0, 0.01^2), biases 0; gamma and beta are made as well and about 0.002 at first, so the start is
close to the pretrained function, not equal to it. `embedding_norm=True` is e = LN(...), which makes them 0.08: far from it.

The weights are made once for each forward pass and task, and kept in evaluation. A batch has one task: `model(x, context={"task":
"edges"})`; with a single task it need not be said. One task's adapters are taken out as a plain `adapter` (`extract`), which
needs no hypernetwork.

Defaults: per block, m = 512, h = 128, p = 64, f = SiLU, b = d / 16, q = b / 4 (rounded down), behind the MLP.
Counts: h (m + 1) + p (h + 1) for each block, (p + 1) (2 q (d + b) + b + 3 d) for each of its points, and m for each task.
Swin-T, 4 tasks: 12 * 73,920 + 65 sum (2 q (d + b) + b + 3 d) + 4 * 512 = 887,040 + 5,520,060 + 2,048 = 6,409,148; the sum is
over 2 blocks of d = 96 (b = 6, q = 1: 498), 2 of 192 (12, 3: 1,812), 6 of 384 (24, 6: 6,072) and 2 of 768 (48, 12: 21,936). The
paper's table says 6.41 M and not at which sizes; its plain adapter (behind the MLP) speaks for these. Its row of Hyperformer,
72.77 M, is `decomposed=False, reduction=8, targets=("attn", "mlp")`: 72,770,768. The norm is 2 p more for each network.
ViT-B/16, one task: 17,997,632, and per stage (which is one for all blocks) 1,571,952.
Source: Liu, Ma, Tian, He and Kira, "Polyhistor: Parameter-Efficient Multi-Task Adaptation for Dense Vision Tasks", NeurIPS 2022;
their training code, as it circulates in public.
Deviations: the LayerNorm of e is off; their class has it on, their counts agree with both, and only without it is the start
what it is meant to be. b is d / reduction rounded, theirs rounded down (16 divides the widths of Swin). The LayerNorm in front
of the bottleneck that their code has as a further switch is left out, so is their scale of the branch (1), and so are norms of
each task behind the stages: a head's affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vision.adapters.parts.decomposed import Decomposed
from zoo import Points, SublayerPoint, register_adapter
from zoo.adapters.parts.hypernetwork import BottleneckMaker, HyperNetwork, Projector, Stack, kind_of


@register_adapter("polyhistor")
@dataclass
class Polyhistor(Decomposed):
    """Polyhistor.

    Args:
        tasks: their names.
        per: a hypernetwork for each "block" or for each "stage", see the table above.
        rank: b, the same everywhere. reduction: instead, b = d / reduction at each point (at least 1).
        inner: q, the same everywhere. inner_reduction: instead, q = min(b, d) / inner_reduction, rounded down (at least 1).
        decomposed: make factors of the matrices; otherwise the matrices themselves.
        task_dim: m, width of the rows. hidden: h. projected: p.
        targets: roles or names of sublayer points; None takes MLPs, or all but cross-attention where there are none.
        insert: "serial" behind the sublayer, "parallel" beside it.
        activation: f.
        embedding_norm: the LayerNorm that makes e.
    """

    tasks: tuple[str, ...] = ("default",)
    per: Literal["block", "stage"] = "block"
    rank: int | None = None
    reduction: float | None = None
    inner: int | None = None
    inner_reduction: float | None = None
    decomposed: bool = True
    task_dim: int = 512
    hidden: int = 128
    projected: int = 64
    targets: str | tuple[str, ...] | None = None
    insert: Literal["serial", "parallel"] = "serial"
    activation: Literal["relu", "gelu", "gelu_new", "silu", "tanh", "none"] = "silu"
    embedding_norm: bool = False

    default_lr = 1e-3
    paper = "Liu et al. 2022"
    taxonomy = "additive"
    trial = {"rank": 4, "inner": 2, "task_dim": 4, "hidden": 8, "projected": 8, "targets": ["attn", "mlp"]}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_settings(16.0, "task_dim", "hidden", "projected")
        self.check(self.per in ("block", "stage"), f"per is {self.per!r}; expected 'block' or 'stage'.")
        self.check_inner()
        given = self.inner is not None or self.inner_reduction is not None
        self.check(self.decomposed or not given, "inner is for decomposed=True; whole matrices have no factors.")
        if self.decomposed and not given:
            self.inner_reduction = 4.0

    def hypernetwork(self, chosen: Sequence[SublayerPoint]) -> HyperNetwork:
        """What makes the bottlenecks of these points: a stack for each block, or for each tower and width."""
        staged = self.per == "stage"

        def stack(group: list[SublayerPoint]) -> Stack:
            dim = group[0].dim_out
            bottleneck = self.bottleneck_at(dim)
            return Stack(
                group,
                self.task_dim,
                lambda width: Projector(width, self.hidden, self.projected, self.embedding_norm),
                lambda: BottleneckMaker(
                    self.projected, dim, bottleneck, self.inner_at(dim, bottleneck) if self.decomposed else None
                ),
                layers=staged,
                plus=staged and len(set(map(kind_of, group))) > 1,
            )

        return HyperNetwork(
            self.tasks, self.task_dim, chosen, lambda p: (p.tower, p.dim_out, None if staged else p.block), stack
        )

    def attach(self, points: Points) -> None:
        """The hypernetworks; at every selected sublayer the bottleneck that they make."""
        chosen = self.chosen(points, roles=("mlp",))
        self.place(points, chosen, self.hypernetwork(chosen))
