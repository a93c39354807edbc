"""The choice is the best one: against brute force, against CBC, and what fits into no budget."""

from __future__ import annotations

import importlib.util
import itertools
import math
import random
from typing import Any

import pytest

from zoo.errors import ConfigError, MissingPackageError
from zoo.puzzle.solver import Option, solve

PULP = importlib.util.find_spec("pulp") is not None
SOLVERS = ["knapsack", pytest.param("pulp", marks=pytest.mark.skipif(not PULP, reason="pulp is not installed"))]


def drawn(seed: int, groups: int, options: int, whole: bool = False) -> list[list[Option]]:
    """Options of three resources; whole numbers have many equal sums."""
    source = random.Random(seed)

    def cost() -> float:
        return float(source.randint(1, 6)) if whole else source.random()

    return [
        [Option(source.random(), {name: cost() for name in ("time", "size", "work")}) for _ in range(options)]
        for _ in range(groups)
    ]


def value(groups: Any, chosen: Any) -> float:
    return sum(group[i].score for group, i in zip(groups, chosen, strict=True))


def costs(groups: Any, chosen: Any, name: str) -> float:
    return sum(group[i].costs[name] for group, i in zip(groups, chosen, strict=True))


def best(groups: Any, budget: dict[str, float]) -> float:
    """The least score of all choices."""
    every = itertools.product(*(range(len(group)) for group in groups))
    fits = (c for c in every if all(costs(groups, c, name) <= limit + 1e-12 for name, limit in budget.items()))
    return min((value(groups, c) for c in fits), default=math.inf)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("whole", [False, True])
def test_brute_force(solver: str, whole: bool) -> None:
    """3 groups of 4 options and 5 of 3, under one, two and three limits, tight and wide."""
    for seed in range(4 if solver == "knapsack" else 3):
        for shape in ((3, 4), (5, 3)):
            groups = drawn(seed, *shape, whole)
            for names in (("time",), ("time", "size"), ("time", "size", "work")):
                for tight in (0.35, 0.6, 1.0):
                    middle = 3.5 if whole else 0.5
                    budget = dict.fromkeys(names, 2 * tight * middle * shape[0])
                    expected = best(groups, budget)
                    if math.isinf(expected):
                        with pytest.raises(ConfigError, match="No network fits"):
                            solve(groups, budget, solver=solver)
                        continue
                    chosen = solve(groups, budget, solver=solver)
                    assert value(groups, chosen) == pytest.approx(expected, abs=1e-9)
                    assert all(costs(groups, chosen, name) <= limit + 1e-6 for name, limit in budget.items())


@pytest.mark.skipif(not PULP, reason="pulp is not installed")
@pytest.mark.parametrize("limits", [("time",), ("time", "size")])
def test_both_solvers_on_a_network_of_size(limits: tuple[str, ...]) -> None:
    """24 sublayers of 7 forms, of which more forms cost more and lose less, as in earnest."""
    source = random.Random(1)
    groups = []
    for _ in range(24):
        weight = source.random() ** 2
        groups.append(
            [
                Option(
                    weight * (1 - size) ** 2 * source.uniform(0.8, 1.2),
                    {"time": size + 0.05 * source.random(), "size": size},
                )
                for size in (1.0, 0.75, 0.5, 0.25, 0.1, 0.05, 0.0)
            ]
        )
    for share in (0.3, 0.6):
        budget = dict.fromkeys(limits, share * 24)
        one, other = (value(groups, solve(groups, budget, solver=name)) for name in ("knapsack", "pulp"))
        assert one == pytest.approx(other, abs=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_needs_no_search(solver: str) -> None:
    """Without a limit the best of each; what is not finite is never chosen; a limit can be met exactly."""
    groups = drawn(0, 4, 5)
    free = [min(range(5), key=lambda i: group[i].score) for group in groups]
    assert solve(groups, {}, solver=solver) == free == solve(groups, {"time": 1e9}, solver=solver)
    broken = [[Option(math.nan, group[0].costs), *group[1:]] for group in groups]
    assert 0 not in solve(broken, {}, solver=solver)
    exact = {"time": sum(min(o.costs["time"] for o in group) for group in groups)}
    assert costs(groups, solve(groups, exact, solver=solver), "time") == pytest.approx(exact["time"])
    zero = [[Option(1.0, {"time": 0.0}), Option(0.0, {"time": 1.0})]] * 3
    assert solve(zero, {"time": 0.0}, solver=solver) == [0, 0, 0]


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_fits_nowhere(solver: str) -> None:
    groups = [[Option(0.0, {"time": 3.0, "size": 1.0}), Option(0.0, {"time": 1.0, "size": 3.0})]] * 2
    with pytest.raises(ConfigError, match=r"cost 2 time at least, and 1\.5 are left"):
        solve(groups, {"time": 1.5}, solver=solver)
    with pytest.raises(ConfigError, match="together"):
        solve(groups, {"time": 2.0, "size": 2.0}, solver=solver)
    with pytest.raises(ConfigError, match="group 1 are infinite"):
        solve([groups[0], [Option(math.inf, {"time": 1.0})]], {"time": 9.0}, solver=solver)
    with pytest.raises(ConfigError, match="no finite number"):
        solve(groups, {"time": math.nan}, solver=solver)


def test_solvers_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pulp is missing, "auto" does without, and "pulp" says how to get it."""
    groups = drawn(3, 3, 3)
    with pytest.raises(ConfigError, match="expected one of auto"):
        solve(groups, {"time": 9.0}, solver="cbc")

    def missing(name: str, extra: str) -> Any:
        raise MissingPackageError(f"pip install 'adapter-zoo[{extra}]'")

    monkeypatch.setattr("zoo.puzzle.solver.library", missing)
    assert solve(groups, {"time": 9.0}) == solve(groups, {"time": 9.0}, solver="knapsack")
    with pytest.raises(MissingPackageError, match=r"adapter-zoo\[puzzle\]"):
        solve(groups, {"time": 9.0}, solver="pulp")
