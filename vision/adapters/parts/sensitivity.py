"""Which weights matter for a task, and which of them to tune within a parameter budget (for `vision.adapters.spt`).

Sensitivity of a weight: the square of its gradient of the task's mean loss of a batch, summed over batches. Scores are kept in
float32, one for each weight; gradients are squared and dropped one tensor at a time, as backward makes them.

Budget: the `tau` highest scores of all candidates are hits. A candidate with at least `threshold` hits is tuned as a whole
for `cost` parameters, another one only in its hits. Of several tau the one is taken whose sum of parameters comes closest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo import probing
from zoo.adapters.parts.moved import check_labels
from zoo.engine.context import batch_of
from zoo.errors import AttachError, DataError
from zoo.points import LinearPoint, NormPoint, Points

if TYPE_CHECKING:
    from zoo import Task
    from zoo.host import Host

STEP = 20_000  # tau is tried in steps of 0.02 M up to 1.58 M
STEPS = 79
SMALLEST = 0.4e6  # below this budget the steps are a twentieth of it


@dataclass(frozen=True, eq=False)
class Candidate:
    """A weight matrix or vector: the `part` ("weight" or "bias") of a point."""

    point: LinearPoint | NormPoint
    part: str
    size: int
    cost: int  # parameters if it is tuned as a whole
    threshold: float  # hits from which it is

    @property
    def key(self) -> str:
        """`<point>.<part>`."""
        return f"{self.point.name}.{self.part}"

    @property
    def slot(self) -> tuple[nn.Module, str]:
        """The module and the name of the parameter that holds it, perhaps as a slice."""
        return self.point.holder(self.part) or (self.point.module, self.part)

    def slice(self, whole: Tensor) -> Tensor:
        """Its rows of a tensor shaped like the parameter, flat: (size,)."""
        point = self.point
        if self.slot[0] is not point.module:  # a bias beside the projection is this point's alone
            return whole.flatten()
        return (whole[point.start : point.stop] if isinstance(point, LinearPoint) else whole).flatten()


def candidates(points: Points, form: str, rank: int, alpha: float, beta: float) -> list[Candidate]:
    """Weights and biases of all projections inside of blocks, and of all norms but those of patch embedding and merging."""
    found: list[Candidate] = []
    for point in points:
        if isinstance(point, LinearPoint):
            if point.block is None or not isinstance(point.module, nn.Linear):
                continue
            cost = structured_cost(form, rank, point.dim_in, point.dim_out)
            found.append(Candidate(point, "weight", point.dim_in * point.dim_out, cost, cost / alpha))
            parts: tuple[str, ...] = ("bias",)
        elif isinstance(point, NormPoint):
            if point.block is None and (point.stage is not None or point.name.startswith("patch_embed")):
                continue
            parts = ("weight", "bias")
        else:
            continue
        n = point.dim_out
        found += [Candidate(point, p, n, n, n / beta) for p in parts if point.holder(p) is not None]
    return found


def structured_cost(form: str, rank: int, dim_in: int, dim_out: int) -> int:
    """Parameters of a structured module: `r (i + o)` for "lora", `2 r o + r + o` for "adapter"."""
    return rank * (dim_in + dim_out) if form == "lora" else 2 * rank * dim_out + rank + dim_out


# -- scores -----------------------------------------------------------------------------------------------------------


def check_scored(points: Iterable[LinearPoint]) -> None:
    """Raise AttachError where weights have no gradient: before anything is attached that would be decided by it."""
    for point in points:
        if kept := getattr(point.module, "kept_in", ""):
            raise AttachError(
                f"Single numbers of every weight are scored and trained, and that of '{point.name}' is kept in {kept}, which has "
                "none: use a method that adds to frozen weights, such as lora, or the backbone that was not quantised."
            )


def sensitivity(
    model: Host, found: Sequence[Candidate], batches: Iterable[Any], num_batches: int, task: Task | None = None
) -> tuple[list[Tensor], int, int]:
    """Scores (size,) of every candidate, and how many batches and samples they are from.

    Args:
        batches: (inputs, targets) of the task; None is what the model is for.

    Raises:
        AttachError: quantised weights.
        DataError: no batch, labels that the head has no output for, a loss or gradients that are not finite.
    """
    slots = {(id(module), part): (module, part) for module, part in (c.slot for c in found)}
    scores: dict[tuple[int, str], Tensor] = {}
    handles = []
    count = samples = 0
    with probing(model, task) as probe:
        model.requires_grad_(False)
        try:
            for key, (module, part) in slots.items():
                parameter = model.in_use(module, part)
                if parameter is None:
                    raise AttachError(
                        f"Single numbers of a '{part}' are scored and trained, and a {type(module).__name__} has none that can "
                        "be: use a method that adds to frozen weights, such as lora, or the backbone that was not quantised."
                    )
                scores[key] = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
                parameter.requires_grad_(True)
                handles.append(parameter.register_post_accumulate_grad_hook(_Square(scores[key])))
            for inputs, targets in itertools.islice(batches, num_batches):
                check_labels(model, probe.task, targets)
                loss = probe.loss(inputs, targets)
                if not math.isfinite(loss.item()):
                    raise DataError(
                        f"The loss of calibration batch {count + 1} is {loss.item()}. Look for NaN or Inf in the data and in "
                        "the backbone's weights."
                    )
                loss.backward()
                count, samples = count + 1, samples + _rows(inputs)
        finally:
            for handle in handles:
                handle.remove()
    if not count:
        raise DataError("There was no batch to calibrate with; give at least one batch of (inputs, targets).")
    if not all(bool(torch.isfinite(s).all()) for s in scores.values()):
        raise DataError("Gradients of the calibration batches are NaN or Inf. Calibrate in float32.")
    return [c.slice(scores[id(c.slot[0]), c.slot[1]]) for c in found], count, samples


def _rows(inputs: Any) -> int:
    """Samples of a batch: rows of its first tensor."""
    first = batch_of(inputs if isinstance(inputs, (tuple, list)) else (inputs,), {})
    return 0 if first is None else len(first)


class _Square:
    """Adds the square of a parameter's gradient to its score, and drops the gradient."""

    def __init__(self, score: Tensor) -> None:
        self.score = score

    def __call__(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        self.score.addcmul_(gradient, gradient)
        parameter.grad = None


# -- budget -----------------------------------------------------------------------------------------------------------


def spend(hits: Sequence[int], found: Sequence[Candidate], fixed: int = 0) -> tuple[list[bool], int]:
    """Which candidates are tuned as a whole, given the hits of each; and all parameters: `fixed`, costs, single hits."""
    whole = [n >= c.threshold for n, c in zip(hits, found)]
    return whole, fixed + sum(c.cost if w else n for w, n, c in zip(whole, hits, found))


def grid(budget: int, size: int) -> list[int]:
    """The tau that are tried for a budget, of `size` weights in all."""
    step = STEP if budget >= SMALLEST else max(1, budget // 20)
    steps = max(STEPS, round(1.58 * budget / step))
    return sorted({min(k * step, size) for k in range(1, steps + 1)})


def choose(
    owner: Tensor, found: Sequence[Candidate], budget: int, fixed: int, taus: Sequence[int]
) -> tuple[int, list[int]]:
    """(tau, hits of each candidate) whose sum of parameters is closest to the budget; of two as close the larger tau.

    Args:
        owner: as from `highest`. taus: what to try, in rising order, at most as many as `owner` has.
    """
    best: tuple[int, list[int]] = (0, [0] * len(found))
    gap = math.inf
    hits, at, owner = torch.zeros(len(found), dtype=torch.int64), 0, owner.cpu()
    for tau in taus:
        hits, at = hits + torch.bincount(owner[at:tau], minlength=len(found)), tau
        counts = [int(n) for n in hits.tolist()]
        _, total = spend(counts, found, fixed)
        if abs(total - budget) <= gap:
            best, gap = (tau, counts), abs(total - budget)
    return best
