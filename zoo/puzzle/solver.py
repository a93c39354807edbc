"""The choice: one option of each group, of the least summed score, within all budgets. A 0-1 programme, solved exactly.

    minimise   sum_g s[g, o_g]        so that  sum_g c_k[g, o_g] <= B_k  for each resource k

By CBC (through `pulp`, the extra `puzzle`), or without it by the knapsack below: groups are taken one after another, and of
the sums so far those are kept that no other beats in the score and in every cost, and whose lower bound is below the best
known choice. The bound is Lagrange's, `score so far + sum_rest min_o (s + l c) - l (B - cost so far)` with multipliers l >= 0
found once by subgradient steps. Both give the same sum; of equal sums they may give different choices.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from zoo.errors import ConfigError, MissingPackageError
from zoo.library import library

__all__ = ["SOLVERS", "Option", "solve"]

SOLVERS = ("auto", "pulp", "knapsack")
STATES = 400_000  # sums that the knapsack holds at most
SLACK = 1e-9  # of a budget: sums of floats
ROUNDED = 1e-8  # of a budget in the file that CBC reads, which has twelve digits of each number


@dataclass(frozen=True)
class Option:
    """What a child loses (`score`), and what it costs, by resource."""

    score: float
    costs: Mapping[str, float]


def solve(
    groups: Sequence[Sequence[Option]], budget: Mapping[str, float], *, solver: str = "auto", seconds: float = 60.0
) -> list[int]:
    """The number of the chosen option in each group.

    Args:
        groups: options of each sublayer; those whose score is not finite are never chosen.
        budget: resource -> what the sum of costs may be at most.
        solver: "pulp", "knapsack", or "auto": pulp where it is installed.
        seconds: that CBC may take.

    Raises:
        ConfigError: no choice fits into the budget, or CBC needs more time. MissingPackageError: solver="pulp" without it.
    """
    if solver not in SOLVERS:
        raise ConfigError(f"solver is {solver!r}; expected one of {', '.join(SOLVERS)}.")
    if any(not math.isfinite(limit) for limit in budget.values()):
        raise ConfigError(f"A budget is no finite number: {dict(budget)}.")
    kept = [[i for i, option in enumerate(options) if math.isfinite(option.score)] for options in groups]
    if empty := [g for g, options in enumerate(kept) if not options]:
        raise ConfigError(f"All scores of group {empty[0]} are infinite or NaN: nothing can be chosen there.")
    scores = [np.array([groups[g][i].score for i in options]) for g, options in enumerate(kept)]
    costs = [
        np.array([[groups[g][i].costs[name] for name in budget] for i in options]).reshape(len(options), len(budget))
        for g, options in enumerate(kept)
    ]
    limits = np.array(list(budget.values()), dtype=float)
    limits = limits + SLACK * np.maximum(1e-12, np.abs(limits))
    least = sum((c.min(axis=0) for c in costs), start=np.zeros(len(budget)))
    for name, low, limit in zip(budget, least, budget.values(), strict=True):
        if low > limit + SLACK * abs(limit):
            raise ConfigError(
                f"No network fits into the budget: its sublayers cost {low:,.6g} {name} at least, and {limit:,.6g} are "
                "left for them."
            )
    found = None
    if solver != "knapsack":
        try:
            found = _pulp(scores, costs, limits, seconds)
        except MissingPackageError:
            if solver == "pulp":
                raise
    if found is None:
        found = _knapsack(scores, costs, limits)
    total = sum((c[i] for c, i in zip(costs, found, strict=True)), start=np.zeros(len(budget)))
    assert (total <= limits * (1 + 1e-6) + 1e-9).all()  # what a solver says is looked at
    return [kept[g][i] for g, i in enumerate(found)]


def _nothing(names: str = "all of them") -> ConfigError:
    return ConfigError(
        f"No network fits into the budget: each limit can be met by itself, and no choice meets {names} together. Allow more, or "
        "more kinds of children."
    )


def _pulp(scores: Sequence[np.ndarray], costs: Sequence[np.ndarray], limits: np.ndarray, seconds: float) -> list[int]:
    pulp = library("pulp", "puzzle")
    every = [(g, i) for g, score in enumerate(scores) for i in range(len(score))]
    # CBC's tolerances are absolute: all numbers are made about 1
    size = max((float(np.abs(s).max()) for s in scores), default=1.0) or 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of how PuLP 4 will want it
        problem = pulp.LpProblem("puzzle", pulp.LpMinimize)
        chosen = [
            [pulp.LpVariable(f"x_{g}_{i}", cat=pulp.LpBinary) for i in range(len(score))]
            for g, score in enumerate(scores)
        ]
        problem += pulp.lpSum(float(scores[g][i]) / size * chosen[g][i] for g, i in every)
        for group in chosen:
            problem += pulp.lpSum(group) == 1
        for k, limit in enumerate(limits):
            unit = max(float(np.abs(c[:, k]).max()) for c in costs) or 1.0
            most = float(limit) / unit + ROUNDED
            problem += pulp.lpSum(float(costs[g][i][k]) / unit * chosen[g][i] for g, i in every) <= most
        problem.solve(pulp.PULP_CBC_CMD(msg=False, timeLimit=seconds, gapRel=0.0, gapAbs=0.0))
    if problem.status == pulp.LpStatusInfeasible:
        raise _nothing()
    if problem.status != pulp.LpStatusOptimal or problem.sol_status != pulp.LpSolutionOptimal:
        raise ConfigError(f"CBC found no best choice within {seconds:g} seconds. Allow more, or give fewer options.")
    return [int(np.argmax([variable.value() for variable in group])) for group in chosen]


def _knapsack(scores: Sequence[np.ndarray], costs: Sequence[np.ndarray], limits: np.ndarray) -> list[int]:
    count, kinds = len(scores), len(limits)
    unit = np.max([np.abs(c).max(axis=0) for c in costs], axis=0)
    unit = np.where(unit > 0, unit, 1.0)
    costs = [c / unit for c in costs]
    limits = limits / unit
    weights, best = _multipliers(scores, costs, limits)
    # of the groups from g on: the least of each cost, and of score plus weighted costs
    rest = np.zeros((count + 1, kinds))
    bound, plain = np.zeros(count + 1), np.zeros(count + 1)
    for g in range(count - 1, -1, -1):
        rest[g] = rest[g + 1] + costs[g].min(axis=0)
        bound[g] = bound[g + 1] + (scores[g] + costs[g] @ weights).min()
        plain[g] = plain[g + 1] + scores[g].min()
    used, value = np.zeros((1, kinds)), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []  # of each state: the one before, the option
    for g, (score, cost) in enumerate(zip(scores, costs, strict=True)):
        before = np.repeat(np.arange(len(value)), len(score))
        option = np.tile(np.arange(len(score)), len(value))
        used, value = used[before] + cost[option], value[before] + score[option]
        left = limits - used
        least = np.maximum(value + plain[g + 1], value + bound[g + 1] - left @ weights)
        fits = (left >= rest[g + 1] - 1e-12).all(axis=1) & (least <= best + 1e-12 * max(1.0, abs(best)))
        index = np.flatnonzero(fits)
        index = index[_front(used[index], value[index])]
        if not len(index):
            raise _nothing()
        if len(index) > STATES:
            raise ConfigError(
                f"The choice has more than {STATES:,} sums to look at without a solver. Install one: pip install "
                "'adapter-zoo[puzzle]', or give fewer options."
            )
        steps.append((before[index], option[index]))
        used, value = used[index], value[index]
    state, found = int(value.argmin()), []
    for earlier, option in reversed(steps):
        found.append(int(option[state]))
        state = int(earlier[state])
    return found[::-1]


def _multipliers(
    scores: Sequence[np.ndarray], costs: Sequence[np.ndarray], limits: np.ndarray
) -> tuple[np.ndarray, float]:
    """Weights of the costs with the largest lower bound that was found, and the score of the best choice on the way (or
    inf)."""
    weights, kept = np.zeros(len(limits)), np.zeros(len(limits))
    highest, best = -math.inf, math.inf
    spread = sum(float(np.ptp(s)) for s in scores) or 1.0
    for step in range(300):
        chosen = [int((s + c @ weights).argmin()) for s, c in zip(scores, costs, strict=True)]
        score = sum(float(s[i]) for s, i in zip(scores, chosen, strict=True))
        over = sum((c[i] for c, i in zip(costs, chosen, strict=True)), start=np.zeros(len(limits))) - limits
        if (over <= 0).all():
            best = min(best, score)
        if score + over @ weights > highest:
            highest, kept = score + float(over @ weights), weights
        weights = np.maximum(0.0, weights + spread / (1 + step) * over / max(1e-12, float(np.linalg.norm(over))))
    return kept, best


def _front(used: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Indices of those that no other beats (or equals) in the score and in every cost."""
    order = np.lexsort((*used.T[::-1], value))
    if used.shape[1] == 0:
        return order[:1]
    if used.shape[1] == 1:
        cost = used[order, 0]
        lowest = np.minimum.accumulate(np.concatenate([[math.inf], cost[:-1]]))
        return order[cost < lowest]
    kept = np.empty((len(order), used.shape[1]))
    found: list[int] = []
    for index in order:
        if not (kept[: len(found)] <= used[index]).all(axis=1).any():
            kept[len(found)] = used[index]
            found.append(int(index))
    return np.array(found, dtype=int)
