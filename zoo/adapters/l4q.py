"""L4Q: a change of low rank and the steps of rounding are trained together, and what is used is rounded as a whole.

Idea: quantisation-aware training at LoRA's cost: the sum of the frozen weight and its change is rounded to few bits in each pass,
so the change learns to correct the rounding, and afterwards there is one weight of few bits and no branch beside it.
Points: any `linear` points that read tokens; a slice of a fused q/k/v is a point of its own.

    W' = W + s_r B A                                           A (r, i), B (o, r), s_r = alpha / r
    q  = round(clamp(W' / s - z, Qn, Qp)),  y = s (q + z) x + b    s, z (o, i / g);  Qn = -2^(k-1), Qp = 2^(k-1) - 1

Gradients: straight through the rounding, `zoo.adapters.parts.stepped`; what leaves the range hands nothing to A and B.
s starts as max(min W / Qn, max W / Qp) of its group (range-covering), z at 0, B at 0, A as LoRA's: the start is W rounded to the
nearest, not the pretrained function.
Defaults: k = 4 bits, r = 4, alpha = r, groups of g = 128 inputs of one output, all projections, no z (`offset`).
Counts: r (i + o) for each point and o i / g steps; ViT-B/16 663,552 + 663,552, with `offset` 663,552 more.
Merged: W <- s (q + z). `zoo.adapters.l4q.packed(model)` keeps the whole numbers in k bits, as a backbone of its own.
Source: Jeon, Kim and Kim, "L4Q: Parameter Efficient Quantization-Aware Fine-Tuning on Large Language Models", ACL 2025; no code
of the authors is public.
Deviations: the logarithm of s is trained, so s stays positive and a step of the optimizer changes it by a part of itself; its
gradient is s ds. The offset is counted in steps, z = b / s of the paper's b, for the same reason. The paper trains one always;
the counts above are without. No weight decay of both. A group is the largest number up to g that divides the inputs, all of them
where that is below 16. What lies outside of the range by less than 1e-4 of a step counts as inside: at the start the largest
number of each group stands on its edge.

In memory: x of each projection, which LoRA needs, too; the rounded weight is made again in backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.adapters.base import Adapter
from zoo.adapters.parts.low_rank import check_rank
from zoo.adapters.parts.stepped import Levels, Stepped
from zoo.errors import AttachError, ConfigError
from zoo.host import Host
from zoo.model.model import Model
from zoo.model.packed import pack
from zoo.model.pruning import changed
from zoo.model.quantised import group_of
from zoo.points import LinearPoint, Points
from zoo.points.merger import Merger
from zoo.registry import register_adapter

__all__ = ["L4Q", "packed"]


@register_adapter("l4q")
@dataclass
class L4Q(Adapter):
    """Quantisation-aware low-rank adaptation.

    Args:
        bits: k, of the whole numbers, 2 to 8.
        rank: r. alpha: numerator of the scale of the change; None sets it to the rank, so that the scale is 1.
        group: inputs that share a step, at most.
        offset: train an offset of each group, too.
        targets: roles or names of linear points; "all-linear" is q, k, v, o, in, out, gate, up, down.
    """

    bits: int = 4
    rank: int = 4
    alpha: float | None = None
    group: int = 128
    offset: bool = False
    targets: str | tuple[str, ...] = "all-linear"

    default_lr = 1e-3
    no_weight_decay = ("*.log_step", "*.offset")
    paper = "Jeon, Kim and Kim 2025"
    taxonomy = "hybrid"
    identity = False
    straight_through = True
    trial = {"rank": 2, "bits": 6, "group": 16}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(2 <= self.bits <= 8, f"bits is {self.bits}; expected 2 to 8.")
        self.check(self.rank >= 1, f"rank is {self.rank}; expected 1 or more.")
        self.check(self.alpha != 0, "alpha is 0; what is learned is multiplied by it, so it could never act.")
        self.check(self.group >= 1, f"group is {self.group}; expected 1 or more.")

    @classmethod
    def of_size(cls, size: int) -> dict[str, Any] | None:
        """By its rank."""
        return {"rank": size}

    def attach(self, points: Points) -> None:
        """Round the weight of every selected linear point by steps of its own."""
        points.require("linear", "l4q")
        check_rank(self, ((point, self.rank) for point in self.selected(points)))
        scale = (self.rank if self.alpha is None else self.alpha) / self.rank
        for point in self.selected(points):
            weight = point.weight
            if not weight.is_meta and not bool(weight.isfinite().all()):
                raise AttachError(f"the weight of '{point.name}' holds numbers that are not finite: it has no steps.")
            group = group_of(point.dim_in, self.group)
            point.reparametrize(Stepped(weight, self.rank, scale, group, Levels(self.bits), self.offset))

    def selected(self, points: Points) -> list[LinearPoint]:
        """The target points."""
        return points.linears(self.targets)

    def merge(self, merger: Merger) -> None:
        """W <- s (q + z)."""
        for point in self.selected(merger.points):
            with torch.no_grad():
                merger.set_weight(point, self.module_at(point).rounded(merger.weight(point)))

    @torch.no_grad()
    def by_layer(self, model: Host) -> dict[str, dict[str, float]]:
        """The steps of each weight as they are now by those that it began with, the geometric mean over its groups."""
        found = {}
        for point in self.selected(model.points):
            part: Any = self.module_at(point)
            found[point.name] = part.stepped_by(point.weight)
        return {"step, by the first": found}

    def packed(self, points: Points) -> dict[str, tuple[int, dict[str, Tensor]]]:
        """Module path -> bits, and its parts: whole numbers from 0 (o, i), `scale` and `shift` (o, i / g): W = scale q + shift.

        Raises:
            ConfigError: a projection that is no plain one, of which a part only is rounded, or whose weight another one trains.
        """
        found: dict[str, tuple[int, dict[str, Tensor]]] = {}
        modules: dict[str, list[LinearPoint]] = {}
        for point in self.selected(points):
            modules.setdefault(point.path, []).append(point)
        for path, slices in modules.items():
            module = slices[0].module
            if type(module) is not nn.Linear:
                raise ConfigError(f"'{path}' is a {type(module).__name__}; only the weight of an nn.Linear is packed.")
            if sum(p.dim_out for p in slices) != module.out_features:
                raise ConfigError(
                    f"'{path}' is rounded in part ({', '.join(p.name for p in slices)}), and its rest is no whole number of "
                    "steps. Train l4q on all of its slices, or merge."
                )
            made = [self.module_at(p).whole_numbers(p.weight) for p in sorted(slices, key=lambda p: p.start)]
            q, s = (torch.cat([m[i] for m in made]) for i in (0, 1))
            low = Levels(self.bits).low
            z = torch.cat([m[2] for m in made]) if self.offset else torch.zeros(())  # type: ignore[misc]
            found[path] = self.bits, {"numbers": (q - low).to(torch.uint8), "scale": s, "shift": s * (z + low)}
        return found


def packed(model: Model) -> Model:
    """A model whose projections keep the whole numbers that L4Q has learned, in its bits, and which needs it no more.

    Its backbone is one of its own (`zoo.save_backbone`), a part of the bytes; it computes what the model does, to rounding of the
    last digits. Heads and other adapters come along.

    Raises:
        ConfigError: no active L4Q, more than one, or another adapter in use beside it.
    """
    names = [n for n in model.active if isinstance(model.adapters[n], L4Q)]
    if len(names) != 1 or len(model.active) != 1:
        raise ConfigError(
            f"packed takes a model in which one l4q is active, alone; active are: {', '.join(model.active) or 'none'}. Choose "
            "it by model.set_active(...)."
        )
    adapter: Any = model.adapters[names[0]]
    edit: dict[str, Any] = {"packed": {}}
    values: dict[str, Tensor] = {}
    for path, (bits, parts) in adapter.packed(model.points).items():
        edit["packed"][path] = {"bits": bits, "groups": parts["scale"].shape[1]}
        values[f"{path}.packed"] = pack(parts["numbers"], bits)
        values |= {f"{path}.{name}": parts[name].detach() for name in ("scale", "shift")}
    return changed(model, edit, values=values, without=names[0])
