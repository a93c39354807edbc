"""Polyhistor-Lite: one decomposed hypernetwork for a whole hierarchical backbone, its templates stretched to the wider stages.

Idea: what Polyhistor makes for the narrowest stage is enough for all. A layer that is s times as wide gets s templates of the
narrowest width, each stretched by a small kernel, and their sum is its weight.
Points: `sublayer` (verb `after`, or `parallel` with insert="parallel"). Context: `task`, one for the batch.

    y <- y + LN(W_up f(W_down y + b_down) + b_up; gamma, beta)     y the sublayer's output, in front of the residual sum
    e_j = W_2 relu(W_1 [task; layer_j; kind] + b_1) + b_2          (p,), j = 1 .. s = d / d_0; `kind` only where there are several
    T_j = P_j Q_j, t_j                                             templates (b_0, d_0), (d_0, b_0) and vectors, linear in e_j
    W = sum_j K_j (x) T_j                                          (b, d) and (d, b), b = s b_0; K (s, s, s), one for up and down
    b_down = sum_j k_j (x) t_j, b_up alike, k (s, s);  gamma and beta alike with a kernel (s, s) of their own

d_0 is the narrowest width of the chosen points (of their tower); s must be whole. K, k and the kernel of the norm belong to a
point, for all tasks; where s = 1 there are none, so that on a backbone of one width this is `polyhistor` with per="stage".
`order="template"` takes T_j (x) K_j instead, which mixes neighbouring channels in the place of groups of d_0. Start: rows and
kernels N(0, 1), matrices of the network and the maps N(0, 0.01^2), biases 0; gamma and beta are some 0.01 at first, so the start
is close to the pretrained function, not equal to it. `embedding_norm=True` is e_j = LN(...), with which it is far from it.

The weights are made once for each forward pass and task, and kept in evaluation. A batch has one task: `model(x, context={"task":
"edges"})`; with a single task it need not be said. One task's adapters are taken out as a plain `adapter` (`extract`), which
needs no hypernetwork and no kernels.

Defaults: m = 512, h = 128, p = 64, f = SiLU, b_0 = d_0 / 2, q = 12, behind the MLP, K in front.
Counts: h (z + 1) + p (h + 1) with z = 2 m, or 3 m (with the norm 2 p more); (p + 1) (2 q (d_0 + b_0) + b_0 + 3 d_0); m for each
task, for each kind if there are several, and s times for each layer; s^3 + 2 s^2 for each point with s > 1.
Swin-T, 4 tasks: 139,456 + 65 * 3,792 + 512 (4 + 2 + 2 * 2 + 6 * 4 + 2 * 8) + 2 * 16 + 6 * 96 + 2 * 640 = 139,456 + 246,480 +
25,600 + 1,888 = 413,424. The paper's table says 0.41 M and not at which sizes; several give it, and these are those of its plain
adapter (behind the MLP, b = d / 2) with q = b_0 / 4, as in `polyhistor`. ViT-B/16, one task: 2,117,952.
Source: Liu, Ma, Tian, He and Kira, "Polyhistor: Parameter-Efficient Multi-Task Adaptation for Dense Vision Tasks", NeurIPS 2022;
their training code, as it circulates in public.
Deviations: the LayerNorm of e is off, as in `polyhistor`. s is what the widths say; theirs is 1, 2, 4, 8 by the number of the
stage, which is the same on Swin. The LayerNorm in front of the bottleneck that their code has as a further switch is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vision.adapters.parts.decomposed import Decomposed
from zoo import Points, SublayerPoint, register_adapter
from zoo.adapters.parts.hypernetwork import BottleneckMaker, HyperNetwork, Projector, Weights, kind_of
from zoo.adapters.parts.kronecker import kronecker_sum
from zoo.errors import AttachError, MergeError


class Stretch(nn.Module):
    """What belongs to the points that are s times as wide as the narrowest: rows of their layers, and kernels.

    Args:
        points: P of one width, in L layers. width: of a row. kinds: of sublayers, of the tower. front: K in front of T.
    """

    def __init__(self, points: list[SublayerPoint], s: int, width: int, kinds: list[str], front: bool) -> None:
        super().__init__()
        blocks = sorted({p.block or 0 for p in points})
        self.s, self.front = s, front
        self.names = [p.name for p in points]
        self.layer_of = [blocks.index(p.block or 0) for p in points]
        self.kind_of = [kinds.index(kind_of(p)) for p in points]
        self.layers = nn.Parameter(torch.randn(len(blocks), s, width))
        for name, size in (("kernel", (s, s, s)), ("bias_kernel", (s, s)), ("norm_kernel", (s, s))):
            self.register_parameter(name, nn.Parameter(torch.randn(len(points), *size)) if s > 1 else None)

    def rows(self, task: Tensor, kinds: Tensor | None) -> Tensor:
        """[task; layer_j; kind] of every point: (P, s, z)."""
        parts = [task.expand(len(self.names), self.s, -1), self.layers[self.layer_of]]
        if kinds is not None:
            parts.append(kinds[self.kind_of][:, None].expand(-1, self.s, -1))
        return torch.cat(parts, dim=-1)

    def forward(self, templates: Weights) -> Weights:
        """Templates with axes (P, s) in front -> the weights of P points."""
        if self.s == 1:
            return Weights(*(t.squeeze(1) for t in templates))
        down, down_bias, up, up_bias, norm, norm_bias = templates
        return Weights(
            self._sum("kernel", down),
            self._sums("bias_kernel", down_bias),
            self._sum("kernel", up),
            self._sums("bias_kernel", up_bias),
            self._sums("norm_kernel", norm),
            self._sums("norm_kernel", norm_bias),
        )

    def _sum(self, name: str, templates: Tensor) -> Tensor:
        """Matrices (P, s, rows, columns) -> (P, s rows, s columns)."""
        kernels = self.get_parameter(name)
        return kronecker_sum(kernels, templates) if self.front else kronecker_sum(templates, kernels)

    def _sums(self, name: str, templates: Tensor) -> Tensor:
        """Vectors (P, s, n) -> (P, s n)."""
        pair = (self.get_parameter(name)[..., None], templates[..., None])
        return kronecker_sum(*(pair if self.front else pair[::-1])).squeeze(-1)


class LiteStack(nn.Module):
    """What makes the bottlenecks of all points of a tower."""

    def __init__(self, config: PolyhistorLite, points: list[SublayerPoint]) -> None:
        super().__init__()
        m, dim = config.task_dim, min(p.dim_out for p in points)
        kinds = list(dict.fromkeys(map(kind_of, points)))
        groups: dict[int, list[SublayerPoint]] = {}
        for point in points:
            if point.dim_out % dim:
                raise AttachError(
                    f"polyhistor-lite: '{point.name}' is {point.dim_out} wide, no multiple of the narrowest width {dim}, so no "
                    "template can be stretched to it. Choose other targets, or take 'polyhistor'."
                )
            groups.setdefault(point.dim_out // dim, []).append(point)
        several = len(kinds) > 1
        self.kinds = nn.Parameter(torch.randn(len(kinds), m)) if several else None
        self.projector = Projector(m * (2 + several), config.hidden, config.projected, config.embedding_norm)
        size = config.bottleneck_at(dim)
        self.maker = BottleneckMaker(config.projected, dim, size, config.inner_at(dim, size))
        self.stretches = nn.ModuleList(Stretch(g, s, m, kinds, config.order == "kernel") for s, g in groups.items())

    def forward(self, task: Tensor) -> dict[str, Weights]:
        """The row of a task (m,) -> the weights of every point, by name."""
        found: dict[str, Weights] = {}
        stretch: Any
        for stretch in self.stretches:
            made = stretch(self.maker(self.projector(stretch.rows(task, self.kinds))))
            found |= dict(zip(stretch.names, made.points(), strict=True))
        return found


@register_adapter("polyhistor-lite")
@dataclass
class PolyhistorLite(Decomposed):
    """Polyhistor-Lite.

    Args:
        tasks: their names.
        rank: b_0, of the narrowest points. reduction: instead, b_0 = d_0 / reduction (at least 1).
        inner: q. inner_reduction: instead, q = min(b_0, d_0) / inner_reduction, rounded down (at least 1).
        task_dim: m, width of the rows. hidden: h. projected: p.
        targets: roles or names of sublayer points; None takes MLPs, or all but cross-attention where there are none.
        order: what stands in front in the products, the "kernel" or the "template".
        insert: "serial" behind the sublayer, "parallel" beside it.
        activation: f.
        embedding_norm: the LayerNorm that makes e_j.
    """

    tasks: tuple[str, ...] = ("default",)
    rank: int | None = None
    reduction: float | None = None
    inner: int | None = None
    inner_reduction: float | None = None
    task_dim: int = 512
    hidden: int = 128
    projected: int = 64
    targets: str | tuple[str, ...] | None = None
    order: Literal["kernel", "template"] = "kernel"
    insert: Literal["serial", "parallel"] = "serial"
    activation: Literal["relu", "gelu", "gelu_new", "silu", "tanh", "none"] = "silu"
    embedding_norm: bool = False

    default_lr = 1e-3
    paper = "Liu et al. 2022"
    taxonomy = "additive"
    trial = {"rank": 4, "inner": 2, "task_dim": 4, "hidden": 8, "projected": 8, "targets": ["attn", "mlp"]}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_settings(2.0, "task_dim", "hidden", "projected")
        self.check_inner()
        self.check(self.order in ("kernel", "template"), f"order is {self.order!r}; expected 'kernel' or 'template'.")
        if self.inner is None and self.inner_reduction is None:
            self.inner = 12

    def hypernetwork(self, chosen: Sequence[SublayerPoint]) -> HyperNetwork:
        """What makes the bottlenecks of these points: one network for each tower."""
        return HyperNetwork(self.tasks, self.task_dim, chosen, lambda p: p.tower, lambda group: LiteStack(self, group))

    def attach(self, points: Points) -> None:
        """The hypernetwork; at every selected sublayer the bottleneck that it makes."""
        chosen = self.chosen(points, roles=("mlp",))
        self.place(points, chosen, self.hypernetwork(chosen))

    def widths(self) -> dict[str, Any]:
        """b = s b_0 is d by d_0 / b_0."""
        ratios = {stack.maker.dim / stack.maker.bottleneck for stack in self.hyper.stacks}  # type: ignore[union-attr]
        if len(ratios) > 1:
            raise MergeError(
                "polyhistor-lite: the towers of this backbone have bottlenecks of different shares of their widths, which no "
                "single 'adapter' has. Give reduction= a number that divides the narrowest width of each."
            )
        return {"reduction": ratios.pop()}
