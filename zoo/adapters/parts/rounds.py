"""A budget of directions that rises in rounds while a network is trained: who grows, when, and by how much."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from zoo.adapters.base import Adapter
from zoo.adapters.parts.pictured import Panel, pictured
from zoo.errors import ConfigError
from zoo.host import Host

__all__ = ["InRounds", "Paced", "Rounds"]


class InRounds(Adapter):
    """Methods of which parts grow in rounds; the rounds stand in the `plan`, and so in the file.

    A subclass has these as settings, with defaults of its own.
    """

    rank: int
    target_rank: int
    alpha: float
    dropout: float
    added: int | None
    tinit: float
    interval: float
    orthogonality: float
    schedule: Any  # of the growth in progress, or None

    @classmethod
    def of_size(cls, size: int) -> dict[str, Any]:
        """The rank at the end."""
        return {"target_rank": size + 1}

    @property
    def at_a_time(self) -> int:
        """a of the equations."""
        return self.added or max(1, self.target_rank // 2)

    @property
    def grown(self) -> list[tuple[int, dict[str, int]]]:
        """The rounds so far: the step, and the directions that each point got in it."""
        return [(step, dict(gains)) for step, gains in (self.plan or {}).get("grown", [])]

    def note(self, step: int, gains: dict[str, int]) -> None:
        """A round is over."""
        self.plan = {**(self.plan or {}), "grown": [*map(list, self.grown), [step, gains]]}

    # -- training ---------------------------------------------------------------------------------------------------

    def open(self, first: int, total: int) -> None:
        """Plan the rounds of a run of `total` steps from `first` directions into `schedule`; refuse what would not end."""
        raise TypeError(f"{type(self).__name__} does not implement open().")

    def close(self) -> None:
        """Nothing grows any more."""
        self.schedule = None

    def fit_start(self, model: Host, optimizer: Any, total_steps: int) -> None:
        """Plan the rounds; refuse a run that is over before. What is frozen, or has its budget, stays as it is."""
        self.close()
        first, last = sum(self.ranks().values()), self.target_rank * len(self.ranks())
        if first < last and any(p.requires_grad for p in self.parameters()):
            self.open(first, total_steps)

    def ready(self) -> bool:
        """Whether the budget is met."""
        return self.schedule is None

    def fit_end(self, model: Host) -> None:
        """The growth is over."""
        self.close()

    def extra_state(self) -> dict[str, Any] | None:
        """Where the growth began, and in how long a run; what is measured is in buffers."""
        return None if self.schedule is None else {"first": self.schedule.first, "total": self.schedule.total}

    def load_extra_state(self, model: Host, state: dict[str, Any]) -> None:
        """Go on with the rounds that were planned."""
        self.open(state["first"], state["total"])

    # -- what grew --------------------------------------------------------------------------------------------------

    def ranks(self) -> dict[str, int]:
        """The rank of every point."""
        raise TypeError(f"{type(self).__name__} does not implement ranks().")

    def history(self) -> dict[str, list[int]]:
        """The rank of every point at the start, and after each round."""
        found = {}
        for name, rank in self.ranks().items():
            gains = [gained.get(name, 0) for _, gained in self.grown]
            found[name] = [rank - sum(gains[n:]) for n in range(len(gains) + 1)]
        return found

    def picture(self) -> bytes:
        """The ranks of all points (rows) after every round (columns, by their steps) as colours, as PNG bytes."""
        steps = ["start", *(str(step) for step, _ in self.grown)]
        return pictured([Panel(self.history(), steps, "rank", "grown at step")])

    def by_layer(self, model: Host) -> dict[str, dict[str, float]]:
        """The ranks."""
        return {"rank": dict(self.ranks())}

    def check_growth(self) -> None:
        """Raise ConfigError for settings that cannot be, or with which nothing can grow."""
        self.check(
            1 <= self.rank < self.target_rank,
            f"rank is {self.rank} and target_rank {self.target_rank}; expected 1 <= rank < target_rank, or there is nothing to "
            "grow (that is 'lora').",
        )
        self.check(self.alpha != 0, "alpha is 0; what is learned is multiplied by it, so it could never act.")
        self.check(0 <= self.dropout < 1, f"dropout is {self.dropout}; expected 0 <= dropout < 1.")
        self.check(self.added is None or self.added >= 1, f"added is {self.added}; expected 1 or more.")
        self.check(self.tinit >= 0, f"tinit is {self.tinit}; expected 0 or more.")
        self.check(self.interval > 0, f"interval is {self.interval}; expected steps, or a part of the run.")
        self.check(self.orthogonality >= 0, f"orthogonality is {self.orthogonality}; expected 0 or more.")
        self.schedule = None

    @staticmethod
    def gains(names: list[str], scores: Tensor, count: int, added: int, left: int) -> dict[str, int]:
        """`added` directions for the `count` highest of `scores`, while any are `left`; of equal scores the first go first."""
        order = scores.sort(descending=True, stable=True).indices[: min(count, math.ceil(left / added))].tolist()
        return {names[place]: min(added, left - added * number) for number, place in enumerate(order)}


@dataclass
class Growth:
    """From `first` directions in all to `last`, `added` at a time, at steps t > warmup that are multiples of interval.

    The last round leaves at least one step of `total` for what it added.
    """

    first: int
    last: int
    total: int
    warmup: int
    interval: int
    added: int

    def grows(self, t: int) -> bool:
        """Whether step t is one of growth, if the budget is not met."""
        return t > self.warmup and t % self.interval == 0

    def steps(self, end: int) -> int:
        """How many steps of growth there are up to `end`."""
        return max(0, min(end, self.total - 2) // self.interval - self.warmup // self.interval)


@dataclass
class Rounds(Growth):
    """The `top` projections grow in each round, as in IncreLoRA (Zhang et al. 2023)."""

    top: int

    @property
    def needed(self) -> int:
        """Rounds until the budget is met."""
        return math.ceil((self.last - self.first) / (self.top * self.added))

    def check(self, method: str, projections: int) -> None:
        """Raise ConfigError if the run is over before the budget is met."""
        possible = self.steps(self.total)
        if self.needed > possible:
            most = math.ceil((self.last - self.first) / (projections * self.added))
            raise ConfigError(
                f"{method}: growing from {self.first} to {self.last} directions takes {_rounds(self.needed)}, and between "
                f"tinit={self.warmup} and the last step but one of {self.total} there are {possible}, one every {self.interval} "
                f"steps. Train longer, or make tinit and interval smaller, or top_h and added larger (with top_h={projections} "
                f"and added={self.added} it takes {_rounds(most)})."
            )


@dataclass
class Paced(Growth):
    """More projections grow the later it is and the more is left, as in TriAdaptLoRA (Liang, Wang and Zeng 2025)."""

    projections: int
    exponential: bool

    def count(self, t: int, left: int) -> int:
        """How many projections grow at step t, with `left` directions to give."""
        part = (t - self.warmup) / (self.total - self.warmup)
        count = int(math.exp(part * math.log(left))) if self.exponential else int(left * part)
        return min(self.projections, max(1, count))

    def rounds(self) -> list[int]:
        """The steps of growth until the budget is met, which depend on no score; as far as there are any."""
        found, left = [], self.last - self.first
        for t in range(self.interval * (self.warmup // self.interval + 1), self.total - 1, self.interval):
            if left <= 0:
                break
            found.append(t)
            left -= self.count(t, left) * self.added
        return found

    def check(self, method: str) -> None:
        """Raise ConfigError if the run is over before the budget is met."""
        left = self.last - self.first
        for t in self.rounds():
            left -= self.count(t, left) * self.added
        if left > 0:
            raise ConfigError(
                f"{method}: of the {self.last - self.first} directions to grow by, {left} would be missing at the last step but "
                f"one of {self.total}, with tinit={self.warmup}, {self.added} at a time and {_rounds(self.steps(self.total))}, "
                f"one every {self.interval} steps. Train longer, make tinit and interval smaller, or added larger."
            )


def _rounds(count: int) -> str:
    return f"{count} round" + ("" if count == 1 else "s")
