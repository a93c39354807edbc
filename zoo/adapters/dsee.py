"""DSEE: a low-rank change and a few free entries beside it, on a backbone that is pruned by what the change says.

Idea: what low rank cannot express stands in few entries of W; with these, a pruned network is tuned as well as a whole one.
Points: `linear` points, q and v; a slice of a fused q/k/v is a point of its own.

    y = (M . W) x + b + s (B A + S) x         A (r, i), B (o, r), S: N entries at places Omega, s = alpha / r
    Omega: the entries of W that are furthest from low rank (`zoo.adapters.parts.outliers`), or the largest |W|, or drawn

A ~ N(0, 0.02^2), B = 0, S = 0: the start is the pretrained function, to the bit. M is all ones at first. After a fit

    masks   entries of q and v by |s (B A + S)| over all of them together, of the other projections (k, o, up, down) by |W|
    heads   of each block those with the smallest sum of |B A + S| in their rows of q and v
    neurons (and heads) with the smallest |c|, with `coefficients=True`: c multiplies each head's output and each neuron's,
            starts at 1, and  l1 * sum |c|  is added to the loss

`zoo.sparsify(model, masks=adapter.masks(model))` and `zoo.prune(model, heads=adapter.heads(model))` make the pruned backbone, on
which the adapter is tuned again; the regime `dsee` does all three. M belongs to that backbone: no step can move it.
Defaults: r = N = 16, alpha = 32 as in the authors' scripts (where they are left out: r = 4, N = 128); 100 rounds of the
decomposition; pruned: 20 % of both groups, or 3 of 12 heads. Learning rate 2e-4 (SST-2) to 5e-4 (RTE).
Counts: r (i + o) + N for each point. ViT-B/16 on q, v 590,208; coefficients 12 + 3072 more for each block.
Merged: W <- W + s (B A + S), which has no zeros: on a backbone with zeros merging is refused.
Source: Chen et al., "DSEE: Dually Sparsity-embedded Efficient Tuning of Pre-trained Language Models", ACL 2023
(VITA-Group/DSEE). Their paper's experiments on GPT-2 are not in that repository, nor is the training of coefficients, whose
pieces are there; what we do with them follows the paper.
Deviations: exactly N places for each matrix. Theirs, where fewer than N entries survive the threshold, or tie, takes all that
tie, which can be every entry of a small matrix. Only N numbers are trained: theirs hold a dense S behind a mask. W and S by
`by="sum"` is |W + s (B A + S)|, in which theirs multiplies S alone by s. The pruning of a pooler is left out: it has none here.

The paper finds comparable accuracy; `vit-micro` with half of all entries at zero has 46.6 +- 3.7 % of CIFAR-10, LoRA on the whole
network 57.1 +- 0.9 (4 epochs of 400 images, LoRA's learning rate; `benchmarks/pruned.py`).

Attaching decomposes the weights: 4 s for one of 768 x 768 on one CPU core, so 90 s for ViT-B/16. Loading does not.
In memory: backward needs x and r + N numbers of each token. A step on ViT-B/16 takes 1.02 x that of LoRA of the same rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from zoo.adapters.base import Adapter
from zoo.adapters.parts.entries import index_of
from zoo.adapters.parts.gates import Gates, add_gates, block_of, readers, taken
from zoo.adapters.parts.highest import highest
from zoo.adapters.parts.low_rank import check_rank
from zoo.adapters.parts.lowest import lowest
from zoo.adapters.parts.outliers import outliers
from zoo.adapters.parts.pictured import filled
from zoo.adapters.parts.pruning import zeros_of
from zoo.adapters.parts.sparse_low_rank import SparseLowRank
from zoo.arguments import number, typed
from zoo.errors import ConfigError, MergeError
from zoo.host import Host
from zoo.points import LinearPoint, Points
from zoo.points.merger import Merger
from zoo.registry import register_adapter


@register_adapter("dsee")
@dataclass
class DSEE(Adapter):
    """Sparse and low-rank tuning of a backbone that is pruned.

    Args:
        rank: r. alpha: numerator of the scale alpha / rank. entries: N, of each point.
        targets: roles or names of linear points. The default is `in` on a backbone without attention.
        places: how the entries are chosen: by the "decomposition" of W, its "magnitude", or at "random".
        rounds: of the decomposition. seed: of its start, or of the drawing.
        coefficients: on heads and neurons, too. l1: lambda, of the sum of their magnitudes in the loss.
    """

    rank: int = 16
    alpha: float = 32.0
    entries: int = 16
    targets: str | tuple[str, ...] = ("q", "v")
    places: Literal["decomposition", "magnitude", "random"] = "decomposition"
    rounds: int = 100
    seed: int = 0
    coefficients: bool = False
    l1: float = 1e-4

    default_lr = 5e-4
    paper = "Chen et al. 2023"
    taxonomy = "hybrid"
    trial = {"rank": 2, "entries": 5, "rounds": 3}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "entries", "rounds"):
            self.check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; expected 1 or more.")
        self.check(self.alpha != 0, "alpha is 0; what is learned is multiplied by it, so it could never act.")
        self.check(self.seed >= 0, f"seed is {self.seed}; expected 0 or more.")
        self.check(self.l1 >= 0, f"l1 is {self.l1}; expected 0 or more.")
        kinds = ("decomposition", "magnitude", "random")
        self.check(self.places in kinds, f"places is {self.places!r}; expected {', '.join(kinds)}.")
        self._indices: dict[str, Tensor] = {}  # known before attaching

    def fresh(self) -> Adapter:
        """An unattached adapter with the same settings, plan and places."""
        twin = super().fresh()
        assert isinstance(twin, DSEE)
        twin._indices = self._indices or {
            n: p.entry_index for n, p in self.parts().items() if p.entry_index is not None
        }
        return twin

    # -- attaching --------------------------------------------------------------------------------------------------

    def attach(self, points: Points) -> None:
        """Find the places of the entries, unless a plan says how many were found, and add the change at every target."""
        chosen = self.selected(points)
        check_rank(self, ((point, self.rank) for point in chosen))
        if self.coefficients:
            gated = {p.name for found in readers(points, self.method) for p in found}
            both = [p.name for p in chosen if p.name in gated]
            self.check(
                not both, f"'{both[0] if both else ''}' has coefficients on its input; leave it out of the targets."
            )
        for point in chosen:
            size = point.dim_in * point.dim_out
            self.check(self.entries <= size, f"entries is {self.entries:,}, and '{point.name}' has {size:,}.")
        known = self._counts(points, chosen)
        made = {}
        for point in chosen:
            if known is not None:
                places = index_of(self._indices.get(point.name), known.get(point.name, 0))
            elif point.weight.is_meta:
                places = index_of(None, self.entries)
            else:
                places = self._places(point)
            made[point.name] = places
            point.add(SparseLowRank(point.dim_in, point.dim_out, self.rank, self.alpha / self.rank, places, point.name))
        if self.coefficients:
            add_gates(points, self.method)
        if known is None and not any(p.weight.is_meta for p in chosen):
            self.plan = {"entries": {name: len(places) for name, places in made.items()}}

    def selected(self, points: Points) -> list[LinearPoint]:
        """The target points."""
        points.require("linear", self.method)
        return points.linears(self.targets, DSEE.targets)  # type: ignore[arg-type]

    def _counts(self, points: Points, chosen: list[LinearPoint]) -> dict[str, int] | None:
        """How many entries the plan has at each target, checked against the backbone; None: there is no plan."""
        if self.plan is None:
            return None
        found = self.plan.get("entries")
        names = {p.name for p in chosen}
        if not isinstance(found, dict) or not all(type(n) is int and 0 <= n <= self.entries for n in found.values()):
            raise ConfigError(f"The plan of 'dsee' is damaged ({self.plan!r:.80}). Load the adapter as it was saved.")
        if set(found) != names:
            odd = sorted(set(found) ^ names)[0]
            raise ConfigError(
                f"The plan of 'dsee' has other targets than {points.backbone} ('{odd}'): it was made for another backbone. "
                "Attach a fresh adapter."
            )
        return found

    def _places(self, point: LinearPoint) -> Tensor:
        weight = point.weight
        if not bool(weight.isfinite().all()):
            raise ConfigError(f"dsee: the weight of '{point.name}' holds numbers that are not finite.")
        generator = torch.Generator().manual_seed(self.seed)
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if self.places == "decomposition":
            start = torch.randn(1, point.dim_in, generator=generator, dtype=torch.float32)
            found = outliers(wide, self.entries, self.rounds, start.to(wide.dtype))
        else:
            random = self.places == "random"
            score = torch.rand(weight.numel(), generator=generator) if random else wide.abs().flatten()
            found = highest([score], self.entries)[1].sort().values
        return found.to(weight.device)

    def parts(self) -> dict[str, SparseLowRank]:
        """The modules of the change, by their points."""
        return {m.name: m for m in self.modules() if isinstance(m, SparseLowRank)}

    def gates(self) -> dict[str, Gates]:
        """The coefficients, by their points."""
        return {n: m for n, m in self.named_modules() if isinstance(m, Gates)}

    def extra_loss(self, model: Host, outputs: Any, targets: Any) -> Tensor | None:
        """lambda sum |c|."""
        found = [g.gate for g in self.gates().values() if g.gate.requires_grad]
        return self.l1 * torch.cat([*found]).abs().sum() if self.l1 and found else None

    def merge(self, merger: Merger) -> None:
        """W <- W + s (B A + S), and coefficients into the columns of o and down."""
        for name, part in self.parts().items():
            point = merger.points[name]
            if merger.module(point)._buffers.get("weight_mask") is not None:
                raise MergeError(
                    f"'dsee' cannot be merged: the weight of '{name}' is sparse, and its change has no zeros. Keep the backbone "
                    "(zoo.save_backbone) and the adapter (model.save_adapter) apart; what is taken out as a whole (heads, "
                    "neurons) can be merged."
                )
            merger.add_weight(point, part.delta())
        for name, gates in self.gates().items():
            merger.rescale_input(merger.points[name], gates.scale)

    def by_layer(self, model: Host) -> dict[str, dict[str, float]]:
        """The part of each weight of the blocks that a pruned backbone has left."""
        masks = {p.name: mask for p in model.points.linears("all-linear") if (mask := zeros_of(p)) is not None}
        return {"part left": {name: filled(mask) for name, mask in masks.items()}}

    # -- what is pruned -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    @typed(sparsity=number(), others=number())
    def masks(
        self, model: Host, sparsity: float = 0.2, others: float = 0.2, by: Literal["update", "weight", "sum"] = "update"
    ) -> dict[str, Tensor]:
        """Which entries of the weights stay, (dim_out, dim_in) by point, for `zoo.sparsify(model, masks=...)`.

        Args:
            sparsity: part of the targets' entries that becomes zero: the smallest |s (B A + S)|, |W| or |W + s (B A + S)|.
            others: part of the entries of the other projections, the smallest |W|. 0 leaves a group whole.

        Raises:
            ConfigError: a part that is not in 0 <= part < 1, nothing to prune, or a change that is 0.
        """
        self.check(0 <= sparsity < 1, f"sparsity is {sparsity}; expected 0 <= sparsity < 1.")
        self.check(0 <= others < 1, f"others is {others}; expected 0 <= others < 1.")
        self.check(sparsity + others > 0, "sparsity and others are both 0: nothing would be pruned.")
        self.check(by in ("update", "weight", "sum"), f"by is {by!r}; expected 'update', 'weight' or 'sum'.")
        parts = self.parts()
        scores: dict[str, Tensor] = {}
        for name, part in parts.items() if sparsity else ():
            weight, delta = model.points[name].weight, part.delta()
            scores[name] = {"update": delta, "weight": weight, "sum": weight.to(delta) + delta}[by].abs()
        if by == "update":
            self._trained(scores)
        rest = [p for p in model.points.linears("all-linear") if p.name not in parts and p.block is not None]
        return {**lowest(scores, sparsity), **lowest({p.name: p.weight.abs() for p in rest if others}, others)}

    @torch.no_grad()
    @typed(share=number())
    def heads(self, model: Host, share: float = 0.25) -> dict[str, list[int]]:
        """The weakest heads of each block, for `zoo.prune(model, heads=...)`: `share` of them, rounded down.

        Raises:
            ConfigError: a share that takes none, targets without q, k and v, or a change that is 0.
        """
        scores: dict[str, Tensor] = {}
        readers_of_heads, _ = readers(model.points, self.method)
        for o in readers_of_heads:
            block = block_of(model.points, o)
            if self.coefficients:
                scores[block] = self.gates()[o.name].gate.abs()
                continue
            inside = [p for p in model.points if p.name in self.parts() and p.name.startswith(f"{block}.")]
            rows = [self.parts()[p.name].update().abs().sum(1) for p in inside if p.role in ("q", "k", "v")]
            self.check(bool(rows), f"heads are ranked by the change of q, k and v; '{block}' has it at none of them.")
            scores[block] = torch.stack(rows).sum(0).view(o.num_heads, -1).sum(1)
        self._trained({} if self.coefficients else scores)
        return self._weakest(scores, share, "head")

    @typed(share=number())
    def neurons(self, model: Host, share: float = 0.25) -> dict[str, list[int]]:
        """The neurons of each block with the smallest coefficients, for `zoo.prune(model, neurons=...)`.

        Raises:
            ConfigError: no coefficients, or a share that takes none.
        """
        self.check(self.coefficients, "neurons are ranked by their coefficients: attach it with coefficients=True.")
        _, found = readers(model.points, self.method)
        scores = {block_of(model.points, p): self.gates()[p.name].gate.detach().abs() for p in found}
        return self._weakest(scores, share, "neuron")

    def _trained(self, scores: dict[str, Tensor]) -> None:
        self.check(
            not scores or any(bool(s.any()) for s in scores.values()),
            "its change is 0 everywhere, so it says nothing of what can be pruned. Train it first.",
        )

    def _weakest(self, scores: dict[str, Tensor], share: float, what: str) -> dict[str, list[int]]:
        """The `share` lowest of each block, equal ones in their order."""
        self.check(0 < share < 1, f"share is {share}; expected 0 < share < 1.")
        found = {b: s.argsort(stable=True)[: taken(share, len(s))].sort().values.tolist() for b, s in scores.items()}
        self.check(any(found.values()), f"share={share:g} takes no {what} out of any block. Give a larger one.")
        return found

    def cut(self, moved: Any, before: Points, after: Points) -> tuple[Adapter, dict[str, Tensor | None]]:
        """Entries of rows and columns that stay, at their new places."""
        twin, tensors, counts = self.fresh(), {}, {}
        for name, part in self.parts().items():
            new = moved.name(name)
            if new is None or part.entry_index is None or part.entry_value is None:
                continue
            kept = moved.entries(before[name], after[new], part.entry_index)
            counts[new] = len(kept[0])
            tensors[f"{new}.entry_index"] = kept[1] if counts[new] else None
            tensors[f"{new}.entry_value"] = part.entry_value.detach()[kept[0]] if counts[new] else None
        twin.plan = {"entries": {new: counts.get(new, 0) for n in self.parts() if (new := moved.name(n)) is not None}}
        return twin, tensors
