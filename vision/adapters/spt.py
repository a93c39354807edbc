"""SPT: a sensitivity pass over the data chooses, within a budget, single weights and modules.

Idea: weights differ in what they matter for a task. Matrices in which many weights matter get a low-rank module or an adapter
(structured), in the others only the weights that matter are tuned (unstructured); vectors as a whole, or in single entries.
Points: all `linear` points inside of blocks (q, k, v, o, up, down; q, k and v each for itself), `norm` points, class token.

    s_w    = sum over batches of (d mean loss / d w)^2                   for every weight w; the loss of any task, by its own head
    hits   = the tau highest s_w of all candidates
    matrix: hits >= C / alpha -> structured, else its hits are tuned     C = r (i + o), for the adapter 2 r o + r + o
    vector: hits >= len / beta -> tuned whole, else in its hits
    tau    : of 0.02 M, 0.04 M ... 1.58 M the one whose sum, with the class token, comes closest to the budget

    form="lora":     y = W x + b + B A drop(x)                           A (r, i), B (o, r), no alpha / r
    form="adapter":  h = W x + b,  y = h + W_up GELU(W_down drop(h) + b_down) + b_up          W_down (r, o), W_up (o, r)
    unstructured:    y = (W + scatter(delta)) x + b + scatter(delta_b)   delta = 0 at the start

A, W_down ~ Kaiming-uniform(a = sqrt 5), b_down as of `nn.Linear`, W_up, b_up, B = 0: the start is the pretrained function, to
the bit. While training, 0.1 of the structured module's input is dropped, and its whole output for 0.1 of the images (windows,
on Swin).
Defaults: budget 0.4 M, r = 8, alpha = 10, beta = 5, 16 batches (of 32 in the authors' scripts), lr 1e-3 (theirs with weight
decay 1e-4). ViT-B/16 on the authors' CIFAR-100 masks: 380,909 at 0.4 M (23,789 single entries, 14 matrices), 999,941 at 1.0 M
(13,829 entries, 42 matrices). The masks depend on the head's initial values: pass `seed` to zoo.load to get the same ones
again.
Source: He et al. 2023, "Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning" (ziplab/SPT). Their code, which we follow,
divides the cost C by alpha, which the paper does not.
Any task gives sensitivities: classification, or without a head contrast of images and texts, generation, denoising; the paper has
cross-entropy. A budget that does not reach the class token and one entry, or is above all that can be tuned, is refused.
Deviations: the pass runs in eval mode (theirs with stochastic depth 0.1 in the backbone, which is random); below a budget of
0.4 M tau goes in steps of a twentieth of it, as 0.02 M is too coarse; single entries of norms count in the sum as theirs do, and
like theirs are not tuned (theirs: "doesn't affect the performance much"); dropout is also in front of o's module, and its
adapter stands behind o, where theirs reads o's input; q, k and v drop the same images ("lora"). The class token counts with
its own width (theirs: 768). On Swin patch merging is frozen like the patch embedding, and there is no class token.

In memory: the single entries need the projection's input in backward, the structured modules r numbers for each token and a
mask of one byte for each number of their input. See `zoo.adapters.parts.entries` for how they are computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from vision.adapters.parts.sensitivity import Candidate, candidates, check_scored, choose, grid, sensitivity, spend
from vision.adapters.parts.tuned import Tuned
from zoo import Task, damped
from zoo.adapters.base import Adapter
from zoo.adapters.parts.bottleneck import Bottleneck
from zoo.adapters.parts.deciding import asked, deciding, name_in
from zoo.adapters.parts.entries import index_of
from zoo.adapters.parts.highest import highest
from zoo.adapters.parts.low_rank import LowRank
from zoo.errors import ConfigError, MergeError
from zoo.host import Host
from zoo.points import LinearPoint, Points, TokensPoint
from zoo.points.merger import Merger
from zoo.registry import register_adapter


@register_adapter("spt")
@dataclass
class SPT(Adapter):
    """Sensitivity-aware tuning; decides by a pass over the data what to tune (zoo.fit runs it, or `calibrate` by hand).

    Args:
        budget: parameters to tune, in millions, without the head.
        form: "lora" or "adapter", the structured module.
        rank: r.
        alpha: a matrix becomes structured from C / alpha hits. beta: a vector is tuned whole from len / beta hits.
        dropout: on the input of structured modules. drop_path: on their output, for whole images.
        num_batches: how many batches the pass reads at most.
    """

    budget: float = 0.4
    form: Literal["lora", "adapter"] = "lora"
    rank: int = 8
    alpha: float = 10.0
    beta: float = 5.0
    dropout: float = 0.1
    drop_path: float = 0.1
    num_batches: int = 16

    needs_calibration = True
    default_lr = 1e-3
    paper = "He et al. 2023"
    taxonomy = "hybrid"
    trial = {"budget": 0.004, "rank": 2, "dropout": 0.0, "drop_path": 0.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.form in ("lora", "adapter"), f"form is {self.form!r}; expected 'lora' or 'adapter'.")
        for name in ("budget", "rank", "alpha", "beta", "num_batches"):
            self.check(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; expected more than 0.")
        for name in ("dropout", "drop_path"):
            self.check(0 <= getattr(self, name) < 1, f"{name} is {getattr(self, name)}; expected 0 <= {name} < 1.")
        self._indices: dict[str, Tensor] = {}  # found by a calibration and not attached yet

    @property
    def stateless(self) -> bool:  # type: ignore[override]
        """Nothing is attached before a calibration."""
        return self.plan is None

    def fresh(self) -> Adapter:
        """An unattached adapter with the same settings, plan and index lists."""
        twin = super().fresh()
        assert isinstance(twin, SPT)
        twin._indices = dict(self._indices or {n: b for n, b in self.named_buffers() if n.endswith("_index")})
        return twin

    # -- deciding ---------------------------------------------------------------------------------------------------

    def calibrate(self, model: Host, batches: Iterable[Any], task: Task | None = None) -> None:
        """Decide what to tune and attach it; if that was decided before, anew, on the pretrained weights.

        Args:
            batches: (inputs, targets), of which `num_batches` are read.
            task: whose loss the sensitivities are of; by default what the model is for.

        Raises:
            ConfigError: the adapter is in no model, the model has no head and the task needs one, or the budget is below the
                cheapest choice or above all that can be tuned.
            DataError: no batch, wrong labels, NaN or Inf. The model is as it was, then.
        """
        name, what = name_in(model, self), asked(model, self, task, "sensitivity is that of a task")
        found = candidates(model.points, self.form, self.rank, self.alpha, self.beta)
        self._check_budget(found, model)
        # on the pretrained weights: what was chosen before is off, while the head in use stays
        with damped(model, name, 0.0) if self.plan is not None and name in model.active else nullcontext():
            scores, count, samples = sensitivity(model, found, batches, self.num_batches, what)
        try:
            with deciding(self):
                self._decide(found, scores, model)
                assert self.plan is not None
                self.plan["report"] |= {"batches": count, "samples": samples}
                model.reattach(name)
        finally:
            self._indices = {}

    def _check_budget(self, found: list[Candidate], model: Host) -> None:
        """Raise ConfigError for fewer parameters than the tokens and one entry, or more than there are."""
        fixed, most = _tokens(model)[1], sum(c.size for c in found)
        self.check(
            fixed < round(self.budget * 1e6) <= fixed + most,
            f"budget is {self.budget:g} million parameters; of {model.backbone_name} {fixed + most:,} can be tuned, of which the "
            f"class token, always tuned, has {fixed:,}. Expected {(fixed + 1) / 1e6:.6f} to {(fixed + most) / 1e6:.6f}.",
        )

    def _decide(self, found: list[Candidate], scores: list[Tensor], model: Host) -> None:
        """Set `plan` and the index lists."""
        tokens, fixed = _tokens(model)
        budget = round(self.budget * 1e6)
        taus = grid(budget, sum(c.size for c in found))
        owner, place = highest(scores, taus[-1])
        tau, hits = choose(owner, found, budget, fixed, taus)
        whole, total = spend(hits, found, fixed)
        single = [(i, c) for i, c in enumerate(found) if hits[i] and not whole[i]]
        tuned = [(i, c) for i, c in single if isinstance(c.point, LinearPoint)]
        self._indices = {f"{c.key}_index": place[:tau][owner[:tau] == i].sort().values.cpu() for i, c in tuned}
        matrices = [c for w, c in zip(whole, found) if w and c.part == "weight" and isinstance(c.point, LinearPoint)]
        vectors = [c for w, c in zip(whole, found) if w and c not in matrices]
        norms = sum(hits[i] for i, c in single) - sum(hits[i] for i, c in tuned)
        self.plan = {
            "structured": [c.point.name for c in matrices],
            "vectors": [c.key for c in vectors],
            "entries": {c.key: hits[i] for i, c in tuned},
            "tokens": [p.name for p in tokens],
            "report": {
                "tau": tau,
                "total": total,
                "structured": sum(c.cost for c in matrices),
                "vectors": sum(c.size for c in vectors),
                "entries": sum(hits[i] for i, c in tuned),
                "tokens": fixed,
                "norm_entries": norms,  # in the total, as in the authors' code, but not tuned
                "tuned": total - norms,
            },
        }

    # -- attaching --------------------------------------------------------------------------------------------------

    def attach(self, points: Points) -> None:
        """Attach what the plan says; nothing before there is one."""
        linears = [p for p in points.require("linear", "spt") if p.block is not None]
        if self.plan is None:
            check_scored(linears)
            return
        structured, vectors, entries, tokens = self._read(points)
        for name in tokens:
            points[name].train()
        for point in points.select(kind="norm") if "norm" in points.kinds else []:
            names = [part for part in ("weight", "bias") if f"{point.name}.{part}" in vectors]
            if names:
                point.train(*names)
        for point in linears:
            whole = f"{point.name}.bias" in vectors
            # the bias of a fused projection can be swapped for a trained one only as a whole
            if all(f"{p.name}.bias" in vectors for p in linears if p.module is point.module):
                point.train("bias")
                whole = False
            counts = {f"{part}_index": entries.get(f"{point.name}.{part}", 0) for part in ("weight", "bias")}
            indices = {part: index_of(self._indices.get(f"{point.name}.{part}"), n) for part, n in counts.items() if n}
            if point.name in structured or indices or whole:
                module = self._structured(point) if point.name in structured else None
                point.reparametrize(Tuned(point, module, indices, whole, self.dropout, self.drop_path))

    def _read(self, points: Points) -> tuple[set[str], set[str], dict[str, int], list[str]]:
        """The plan's parts, checked against the backbone."""
        plan: Any = self.plan
        try:
            parts = set(plan["structured"]), set(plan["vectors"]), dict(plan["entries"]), list(plan["tokens"])
            names = {*parts[0], *parts[3], *(key.rpartition(".")[0] for key in (*parts[1], *parts[2]))}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"The plan of 'spt' is damaged ({error!r}). Calibrate it again, or load it as saved."
            ) from error
        if unknown := sorted(n for n in names if n not in points):
            raise ConfigError(
                f"The plan of 'spt' names {len(unknown)} points that {points.backbone} has not, such as '{unknown[0]}': it was "
                "made for another backbone. Calibrate it on this one."
            )
        return parts

    def _structured(self, point: LinearPoint) -> nn.Module:
        if self.form == "lora":
            return LowRank(point.dim_in, point.dim_out, self.rank, 1.0)
        module = Bottleneck(point.dim_out, self.rank, sequential=False, activation="gelu")
        bound = 1 / math.sqrt(point.dim_out)  # torch's default for biases
        nn.init.uniform_(module.adapter_down.bias, -bound, bound)
        return module

    def merge(self, merger: Merger) -> None:
        """W <- W + scatter(delta) + B A, b <- b + scatter(delta_b)."""
        if self.plan is not None and self.plan["structured"] and self.form == "adapter":
            raise MergeError(
                f"'spt' with form='adapter' cannot be merged: behind {len(self.plan['structured'])} projections stands an "
                "adapter with a nonlinearity, which is no change of weights. Keep the model as it is, or use form='lora'."
            )
        for name, module in self.named_modules():
            if isinstance(module, Tuned):
                module.fold(merger, merger.points[name])


def _tokens(model: Host) -> tuple[list[TokensPoint], int]:
    """The points whose tokens (the class token) are tuned in any case, and how many numbers these have."""
    tokens = [p for p in model.points if isinstance(p, TokensPoint) and p.parameter]
    return tokens, sum(model.backbone.get_parameter(p.parameter).numel() for p in tokens)
