"""PST: weights are pruned while they are tuned, and both the change and the score of every weight are small matrices.

Idea: which entries of a frozen W stay is learned by scores of low rank, beside a change of low rank.
Points: any `linear` points; a slice of a fused q/k/v is a point of its own, with a mask of its own. Biases are frozen, the head
is dense and trained.

    W' = W + beta U V                                          U (o, r), V (r, i)
    S  = |W'| + a1 A B + a2 (R 1^T + 1 C^T)                    A (o, m), B (m, i), R (o,), C (i,)
    y  = (M . W') x + b                                        M: 0 for the floor(o i v) smallest S of the matrix, else 1
    backward: straight through, dM = dS, so W' also learns by |W'|

v rises from 0 by a cubic: 0 for the first `warmup` of the steps, `sparsity` for the last `final` of them,
sparsity (1 - (1 - u)^3) for the part u in [0, 1] of those between; with warmup 0.1 and final 0.3 it is 0.7875 after 40 %, of 0.9.

U, A ~ N(0, 1), V, B, R, C = 0, v = 0: the start is the pretrained function, to the bit.
Defaults: r = m = 8, beta = a1 = a2 = 1, sparsity 0.9, warmup 0.1, final 0.3; lr 5e-5 (RoBERTa; BERT 3e-5), no weight decay.
Counts: (r + m + 1)(o + i) for each point, ViT-B/16 2,820,096. The paper's 1.5 % of BERT is about one of the two groups: the
released defaults train 3.3 %.
Merged: W <- M . W', a dense tensor with zeros; v is saved with the adapter.
Source: Li et al., "Parameter-Efficient Sparsity for Large Language Models Fine-Tuning", IJCAI 2022 (alibaba/AliceMind, S4/PST).
Deviations: theirs gives the optimizer nothing but the helpers, so that a fresh head stays as it was drawn; here it is trained.
Scores that are equal go in the order of the weights, on every device. A fit that starts from v > 0 keeps it. A run that leaves
no step to prune in is refused.

A mask is found once for each step of the optimizer, whatever its micro-batches, and in evaluation until something changes.
In memory: one byte an entry, for M (`zoo.adapters.parts.pruned`). No second derivatives: the gradient is that of no function.
ViT-B/16 on one core, 8 images: a step takes 1.6 times that of LoRA with as many parameters (rank 17), 0.2 of it for the masks;
920 MB are kept for backward, 595 MB by LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zoo.adapters.base import Adapter
from zoo.adapters.parts.low_rank import check_rank
from zoo.adapters.parts.pruned import Pruned
from zoo.arguments import number, typed
from zoo.errors import ConfigError
from zoo.host import Host
from zoo.points import Points
from zoo.points.merger import Merger
from zoo.registry import register_adapter


@register_adapter("pst")
@dataclass
class PST(Adapter):
    """Parameter-efficient sparse training.

    Args:
        sparsity: the part of each matrix that is 0 in the end.
        rank: r, of the change. mask_rank: m, of the scores.
        beta, alpha1, alpha2: factors of the change and of the two parts of the scores.
        targets: roles or names of linear points; "all-linear" is q, k, v, o, in, out, gate, up, down.
        warmup: part of the run in which nothing is pruned. final: part of it, at the end, in which v stays.
    """

    sparsity: float = 0.9
    rank: int = 8
    mask_rank: int = 8
    beta: float = 1.0
    alpha1: float = 1.0
    alpha2: float = 1.0
    targets: str | tuple[str, ...] = "all-linear"
    warmup: float = 0.1
    final: float = 0.3

    plans_steps = True
    straight_through = True
    default_lr = 5e-5
    default_weight_decay = 0.0
    paper = "Li et al. 2022"
    taxonomy = "hybrid"
    trial = {"rank": 2, "mask_rank": 2, "sparsity": 0.5}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(0 < self.sparsity < 1, f"sparsity is {self.sparsity}; expected 0 < sparsity < 1.")
        for name in ("rank", "mask_rank"):
            self.check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; expected 1 or more.")
        for name in ("beta", "alpha1", "alpha2"):
            self.check(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; expected more than 0.")
        for name in ("warmup", "final"):
            self.check(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; expected 0 or more.")
        together = self.warmup + self.final
        self.check(
            together < 1, f"warmup and final are {together:.3g} of the run; less than 1 leaves steps to prune in."
        )
        self.total: int | None = None  # steps of the fit in progress, if it prunes
        self.reached = False

    def attach(self, points: Points) -> None:
        """Put a mask and a change on every selected projection."""
        points.require("linear", "pst")
        for setting in ("rank", "mask_rank"):
            check_rank(self, ((p, getattr(self, setting)) for p in points.linears(self.targets)), setting)
        for point in points.linears(self.targets):
            factors = (self.beta, self.alpha1, self.alpha2)
            point.reparametrize(Pruned(point.dim_in, point.dim_out, self.rank, self.mask_rank, factors))

    def parts(self) -> dict[str, Pruned]:
        """The modules by their points."""
        return {n: m for n, m in self.named_modules() if isinstance(m, Pruned)}

    def schedule(self, step: int, total: int) -> float:
        """v behind `step` of `total` optimizer steps."""
        if step <= self.warmup * total:
            return 0.0
        if step > total - self.final * total:
            return self.sparsity
        rest = 1 - (step - self.warmup * total) / (total - (self.final + self.warmup) * total)
        return self.sparsity * (1 - rest**3)

    @typed(sparsity=number())
    def prune(self, sparsity: float) -> None:
        """Set v of all matrices by hand.

        Raises:
            ConfigError: not in 0 <= v < 1.
        """
        self.check(0 <= sparsity < 1, f"a sparsity of {sparsity} cannot be; expected 0 <= sparsity < 1.")
        for part in self.parts().values():
            part.prune(sparsity)

    def zeros(self) -> float:
        """The part of the entries of all matrices that is pruned now."""
        parts = self.parts().values()
        return sum(int(p.removed) for p in parts) / max(1, sum(p.numel for p in parts))

    def by_layer(self, model: Host) -> dict[str, dict[str, float]]:
        """The part of each matrix that is left."""
        return {"part left": {name: 1 - int(p.removed) / p.numel for name, p in self.parts().items()}}

    def merge(self, merger: Merger) -> None:
        """W <- M . W'."""
        for name, part in self.parts().items():
            point = merger.points[name]
            weight = merger.weight(point)
            merger.set_weight(point, part(weight.to(part.weight_u)).detach())

    # -- training ---------------------------------------------------------------------------------------------------

    def fit_start(self, model: Host, optimizer: Any, total_steps: int) -> None:
        """Plan the run; what is pruned already, or frozen, stays as it is."""
        self.total, self.reached = None, False
        if self.zeros() > 0 or not any(p.requires_grad for p in self.parameters()):
            self.reached = True
            return
        if not any(0 < self.schedule(t, total_steps) < self.sparsity for t in range(1, total_steps)):
            raise ConfigError(
                f"pst: of {total_steps} steps none is left between warmup={self.warmup:g} and final={self.final:g}: the weights "
                "would be pruned at once. Train longer, or make these parts smaller."
            )
        self.total = total_steps

    def step_end(self, model: Host, step: int) -> None:
        """v of the next step."""
        if self.total is not None:
            value = self.schedule(step + 1, self.total)
            self.prune(value)
            self.reached = value >= self.sparsity

    def ready(self) -> bool:
        """Whether v is what was asked for."""
        return self.total is None or self.reached

    def fit_end(self, model: Host) -> None:
        """No fit is in progress."""
        self.total = None

    def extra_state(self) -> dict[str, Any] | None:
        """How far the run is; how much is pruned is in buffers."""
        return None if self.total is None else {"total": self.total, "reached": self.reached}

    def load_extra_state(self, model: Host, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.total, self.reached = int(state["total"]), bool(state["reached"])
