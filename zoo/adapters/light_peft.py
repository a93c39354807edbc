"""Light-PEFT: in a short first phase, learn what of the backbone and of LoRA a task can do without; then train what is left.

Idea: heads and neurons get coefficients that are drawn to zero, while each low-rank module and each of its ranks is scored; both
are decided early, and the rest of the training runs on a smaller backbone with fewer parameters.
Points: `linear` points, all six of a block, and all that read heads (o) and neurons (down), where the coefficients stand.

    x <- c * x                      at o one c for each head, at down one for each neuron      (`zoo.adapters.parts.gates`)
    y = W x + b + s B A drop(x)                           A (r, i), B (o, r), s = alpha / r
    loss + l1 * sum |c|

Scores, as means over the second half of the steps (a step that gives NaN or Inf counts as 0):

    of a module      mean over tokens of ||s B A drop(x)||_2 / ||W x + b||_2
    of its rank j    |mean_i (A * dA)_ji| + |mean_o (B * dB)_oj|                    d: the gradients of the step

What stays (`decisions`; a quantile is that of numpy, and what equals it goes):

    heads       c above the quantile `heads` of their block           neurons     c above the quantile `neurons` of all blocks
    modules     scores above the quantile `modules` of all            ranks       scores above the quantile `ranks` of all ranks
                                                                                  of these modules; without any, the module goes

c is compared with its sign: a large negative one goes. The regime `light-peft` then takes heads and neurons out, drops the
coefficients, and puts a plain `lora` with the values, ranks and s of what stays in the place of this adapter.

A ~ Kaiming-uniform(a = sqrt 5), B = 0, c = 1: the start is the pretrained function, to the bit.
Defaults: r = 8, alpha = 16, dropout 0.05, l1 = 1e-4; a third of the heads and of the neurons, 3/4 of the modules, half of the
ranks. Counts: r (i + o) for each point and 12 + 3072 for each block of ViT-B/16, 1,364,112; afterwards 18 of 72 modules and 72 of
576 ranks, an eighth of the rows.
Merged: W <- (W + s B A) diag(c).
Source: Gu et al., "Light-PEFT: Lightening Parameter-Efficient Fine-Tuning via Early Pruning", Findings of ACL 2024
(gccnlp/Light-PEFT).
Deviations: scores are taken once for each optimizer step, theirs once for each part of an accumulated batch. Where all heads or
neurons of a block would go (all equal the quantile), the strongest stays; coefficients that did not move are refused. The head
goes on with what it learned in the first phase. Its form with bottleneck adapters in the place of LoRA is not here.

The paper finds similar accuracy; `vit-micro` does not keep it after few steps: 49.5 +- 2.4 % of CIFAR-10 where LoRA on the whole
network has 57.1 +- 0.9 (4 epochs of 400 images), 51.1 and 55.5 after 12, at 0.67 x the operations and 1.36 x the images/s of one
core (`benchmarks/pruned.py`).

In memory: as LoRA; the gated input is recomputed. A step on ViT-B/16 takes 1.17 x that of LoRA on the same points, and 1.18 x
while it measures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.adapters.base import Adapter
from zoo.adapters.lora import LoRA
from zoo.adapters.parts.estimated import Estimated
from zoo.adapters.parts.gates import block_of, readers
from zoo.adapters.parts.low_rank import check_rank
from zoo.arguments import number, typed
from zoo.errors import AttachError, ConfigError
from zoo.host import Host
from zoo.points import LinearPoint, Points
from zoo.points.merger import Merger
from zoo.registry import register_adapter


@register_adapter("light-peft")
@dataclass
class LightPEFT(Adapter):
    """The first phase of Light-PEFT: a LoRA that is measured, on a backbone whose heads and neurons have coefficients.

    Args:
        rank: r. alpha: numerator of the scale alpha / rank.
        targets: roles or names of linear points that get a low-rank change.
        dropout: on its input, while training.
        l1: of the coefficients.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str | tuple[str, ...] = "all-linear"
    dropout: float = 0.05
    l1: float = 1e-4

    plans_steps = True
    default_lr = 3e-4
    default_weight_decay = 0.0
    paper = "Gu et al. 2024"
    taxonomy = "hybrid"
    trial = {"rank": 2, "dropout": 0.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.rank >= 1, f"rank is {self.rank}; expected 1 or more.")
        self.check(self.alpha != 0, "alpha is 0; what is learned is multiplied by it, so it could never act.")
        self.check(0 <= self.dropout < 1, f"dropout is {self.dropout}; expected 0 <= dropout < 1.")
        self.check(self.l1 >= 0, f"l1 is {self.l1}; expected 0 or more.")
        self._first: int | None = None  # the first step that is measured, of the fit in progress

    def attach(self, points: Points) -> None:
        """Add a low-rank change at every target, and coefficients where heads and neurons are read."""
        changed = {p.name for p in points.linears(self.targets)}
        check_rank(self, ((point, self.rank) for point in points.linears(self.targets)))
        heads, neurons = readers(points, self.method)
        counts = {**{p.name: p.num_heads for p in heads}, **{p.name: p.dim_in for p in neurons}}
        for point in [p for p in points if p.kind == "linear" and p.name in changed | counts.keys()]:
            assert isinstance(point, LinearPoint)
            count = counts.get(point.name, 0)
            if count and not point.whole:
                raise AttachError(
                    f"'{point.name}' shares its input with other slices of '{point.fused}': no coefficients there."
                )
            rank = self.rank if point.name in changed else 0
            made = Estimated(point.dim_in, point.dim_out, rank, self.alpha / self.rank, self.dropout, count)
            point.reparametrize(made)

    def parts(self) -> dict[str, Estimated]:
        """The modules by their points."""
        return {n: m for n, m in self.named_modules() if isinstance(m, Estimated)}

    def merge(self, merger: Merger) -> None:
        """W <- (W + s B A) diag(c)."""
        for (
            name,
            part,
        ) in self.parts().items():  # as the live model: what others add reads the input without coefficients
            point = merger.points[name]
            weight = merger.weight(point).float()
            weight = weight + part.delta().float() if part.low_rank else weight
            merger.set_weight(point, weight if part.gate is None else weight * part.scale)

    # -- training ---------------------------------------------------------------------------------------------------

    def fit_start(self, model: Host, optimizer: Any, total_steps: int) -> None:
        """Measure anew, in the second half of this fit."""
        self._first = total_steps // 2
        for part in self.parts().values():
            if part.low_rank:
                part.module_score.zero_()
                part.rank_score.zero_()

    def step_start(self, model: Host, step: int) -> None:
        """Measure from the middle on."""
        for part in self.parts().values():
            part.measuring = self._first is not None and step >= self._first

    def extra_loss(self, model: Host, outputs: Any, targets: Any) -> Tensor | None:
        """l1 sum |c|."""
        found = [p.gate for p in self.parts().values() if p.gate is not None and p.gate.requires_grad]
        return self.l1 * torch.cat([*found]).abs().sum() if self.l1 and found else None

    def after_backward(self, model: Host, step: int) -> None:
        """Take the scores of the step in."""
        for part in self.parts().values():
            if part.measuring and part.low_rank:
                part.close_step()

    def fit_end(self, model: Host) -> None:
        """Sum what each process measured on its own samples."""
        measured = [p for p in self.parts().values() if p.low_rank]
        service = self.training_service
        if service is not None and measured:
            together = service.reduce(torch.stack([p.module_score for p in measured]))
            for part, score in zip(measured, together):
                part.module_score.copy_(score)
        for part in self.parts().values():
            part.measuring = False
        self._first = None

    # -- what stays -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    @typed(heads=number(), neurons=number(), modules=number(), ranks=number())
    def decisions(
        self, model: Host, heads: float = 1 / 3, neurons: float = 1 / 3, modules: float = 0.75, ranks: float = 0.5
    ) -> dict[str, Any]:
        """What goes and what stays, as JSON.

        Args:
            heads, neurons, modules, ranks: quantiles of what goes; 0 takes nothing.

        Returns:
            "heads", "neurons": block -> indices that go. "ranks": point -> indices of the ranks that stay; others have none.

        Raises:
            ConfigError: a quantile that is not in 0 <= q < 1, coefficients or scores that do not tell anything.
        """
        for name, q in (("heads", heads), ("neurons", neurons), ("modules", modules), ("ranks", ranks)):
            self.check(0 <= q < 1, f"{name} is {q}; expected 0 <= {name} < 1.")
        parts = self.parts()
        of_heads, of_neurons = (
            {block_of(model.points, p): parts[p.name].gate for p in r} for r in readers(model.points, self.method)
        )
        return {
            "heads": self._gone(of_heads, heads, "heads", each=True),
            "neurons": self._gone(of_neurons, neurons, "neurons", each=False),
            "ranks": self._ranks({n: p for n, p in parts.items() if p.low_rank}, modules, ranks),
        }

    def sizes(self, model: Host) -> dict[str, dict[str, int]]:
        """How many "heads" and "neurons" each block has."""
        found = zip(("heads", "neurons"), readers(model.points, self.method), strict=True)
        parts = self.parts()
        return {kind: {block_of(model.points, p): len(parts[p.name].gate) for p in read} for kind, read in found}

    def _gone(self, gates: Mapping[str, Tensor], q: float, what: str, each: bool) -> dict[str, list[int]]:
        """The indices that are not above the quantile, of their block or of all blocks."""
        if not q or not gates:
            return {}
        values = {block: gate.detach().double().cpu() for block, gate in gates.items()}
        everything = torch.cat([*values.values()])
        self.check(
            bool((everything != everything[0]).any()),
            f"all coefficients of {what} are {float(everything[0]):g}: nothing was learned that tells them apart. "
            "Train the first phase, or give 0.",
        )
        found = {}
        for block, value in values.items():
            stays = value > (value if each else everything).quantile(q)
            stays[value.argmax()] = True
            found[block] = (~stays).nonzero()[:, 0].tolist()
        return {block: gone for block, gone in found.items() if gone}

    def _ranks(self, parts: Mapping[str, Estimated], modules: float, ranks: float) -> dict[str, list[int]]:
        steps = [float(p.module_score[1]) for p in parts.values()]
        self.check(
            not parts or min(steps) > 0,
            "no step was measured: the scores of the low-rank modules are taken in the second half of a fit. Train it first.",
        )
        score = torch.stack([p.module_score[0] / p.module_score[1] for p in parts.values()]).double().cpu()
        kept = score > score.quantile(modules) if modules else torch.ones_like(score, dtype=torch.bool)
        chosen = [name for name, stays in zip(parts, kept.tolist()) if stays]
        self.check(
            bool(chosen),
            "all low-rank modules have one score, so none is above the quantile. Train longer, or modules=0.",
        )
        table = torch.stack([parts[name].rank_score for name in chosen]).double().cpu()
        high = table > table.quantile(ranks) if ranks else torch.ones_like(table, dtype=torch.bool)
        self.check(
            bool(high.any()), "all ranks have one score, so none is above the quantile. Train longer, or ranks=0."
        )
        return {name: row.nonzero()[:, 0].tolist() for name, row in zip(chosen, high) if row.any()}

    def plain(self, model: Host, ranks: Mapping[str, list[int]]) -> tuple[LoRA, dict[str, Tensor]]:
        """A `lora` of the ranks that stay at these points, with the same s, and its tensors."""
        names = [p.name for p in model.points if p.name in ranks]
        counts = {name: len(ranks[name]) for name in names}
        if not names:
            raise ConfigError("light-peft: no low-rank module stays.")
        scale, parts, tensors = self.alpha / self.rank, self.parts(), {}
        for name in names:
            index = torch.tensor(ranks[name], device=parts[name].lora_a.device)
            tensors[f"{name}.lora_a"] = parts[name].lora_a.detach().index_select(0, index)
            tensors[f"{name}.lora_b"] = parts[name].lora_b.detach().index_select(1, index)
        alphas = {name: scale * count for name, count in counts.items()}
        most = max(counts.values())
        lora = LoRA(
            rank=most, alpha=scale * most, targets=tuple(names), dropout=self.dropout, ranks=counts, alphas=alphas
        )
        return lora, tensors
