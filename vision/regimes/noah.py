"""NOAH's search: a supernet is trained, an evolution looks for its best sub-network under a cap, and that one is trained anew.

Phases: "supernet", with the larger part of the data: adapter `noah` of width `width`, another sub-network in each step. Then the
search: generations of sub-networks, each measured with the supernet's weights on the other part of the data (`val_fraction`).

    first generation   `population` drawn at random
    each further one   `mutants` of the best `keep` (a part is taken with probability 0.2, and then with 0.4 gets another number
                       of blocks; its widths stay, new blocks draw theirs), `crossovers` of two of them (each part whole from
                       one), and others at random until there are `population`

Only sub-networks with `least` to `limit` million parameters count, each once; up to ten tries are made for each that is wanted.
The best of all is trained from its start on all data, with a new head ("retrain"), and measured on test data if there are any:
these are read once, at the end.

Defaults: width 100, widths 5, 10, 50, 100 in a quarter, a half, three quarters or all of the blocks, limit 0.64 M; 500 epochs at
5e-4; 20 generations (15 on VTAB-1k) of 50, 25 mutants, 25 crossovers, best 10; 100 epochs at 1e-3; weight decay 1e-4, batch 64.
The sub-networks that the authors publish have widths 1, 5, 10.
Source: Zhang, Zhou, Liu, "Neural Prompt Search", 2022 (ZhangYuanhan-AI/NOAH, `evolution.py`).
Deviations: their last generation is measured and not looked at any more, here it is not made. Prompts that nobody reads are not
counted (see `noah`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from vision.adapters.parts.subnets import Sizes, Space
from zoo.data.sampling import split_train_val
from zoo.errors import ConfigError
from zoo.regimes.base import Phase, Regime
from zoo.regimes.report import RunReport
from zoo.regimes.work import Run
from zoo.registry import adapter, register_regime
from zoo.train.evaluation import evaluate

__all__ = ["NeuralPromptSearch"]

TRIES = 10  # for each sub-network that is wanted
TAKEN, DEEPER = 0.2, 0.4  # of a mutation
NAME = "noah"


@register_regime("noah")
@dataclass(eq=False)
class NeuralPromptSearch(Regime):
    """Search for the sizes of prompts, LoRA and adapters in each block.

    `zoo.run(model, "noah", data, test)`: a data set with classes, a model with a head for them and no adapter in use. Afterwards
    the model has the adapter `noah` of the sizes that were found.

    Args:
        limit, least: parameters of a sub-network, in millions.
        width: of the supernet. widths: that a part can have in a block.
        supernet_epochs, supernet_lr: of the first phase. epochs, lr: of the second.
        generations, population, keep, mutants, crossovers: of the evolution.
        val_fraction: share of the data on which sub-networks are compared.
        weight_decay, batch_size: of both phases.
    """

    limit: float = 0.64
    least: float = 0.0
    width: int = 100
    widths: tuple[int, ...] = (5, 10, 50, 100)
    supernet_epochs: int = 500
    supernet_lr: float = 5e-4
    generations: int = 20
    population: int = 50
    keep: int = 10
    mutants: int = 25
    crossovers: int = 25
    val_fraction: float = 0.2
    epochs: int = 100
    lr: float = 1e-3
    weight_decay: float = 1e-4
    batch_size: int = 64

    paper = "Zhang, Zhou and Liu 2022"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.widths = tuple(self.widths)
        for name in ("supernet_epochs", "epochs", "generations", "population", "keep", "batch_size"):
            self.check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; expected 1 or more.")
        for name in ("mutants", "crossovers", "weight_decay"):
            self.check(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; expected 0 or more.")
        self.check(
            self.mutants + self.crossovers <= self.population,
            f"mutants and crossovers are {self.mutants + self.crossovers} of a population of {self.population}.",
        )
        self.check(
            0 <= self.least < self.limit, f"least is {self.least} and limit {self.limit}; expected 0 <= least < limit."
        )
        self.check(0 < self.val_fraction < 1, f"val_fraction is {self.val_fraction}; expected between 0 and 1.")
        for name in ("lr", "supernet_lr"):
            self.check(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; expected more than 0.")

    def prepare(self, run: Run) -> None:
        """One data set with classes, a model with a head and without an adapter in use."""
        self.check_data(run, classes=True)
        self.check_unadapted(run, NAME)
        if not run.model.num_classes:
            raise ConfigError("noah needs a head: load the model with num_classes= of the data.")

    def phases(self, run: Run) -> Iterator[Phase]:
        """The supernet, the search, the sub-network that was found."""
        model = run.model
        part = {"prompts": self.width, "lora": self.width, "adapter": self.width}
        supernet: Any = model.add_adapter(adapter(NAME, **part, widths=self.widths, seed=self.seed), NAME)
        self._check_limit(supernet)
        self._check_range(supernet)
        train, val = split_train_val(run.data, self.val_fraction, self.seed)
        common = {"batch_size": self.batch_size, "weight_decay": self.weight_decay}
        yield Phase("supernet", train, fit={**common, "epochs": self.supernet_epochs, "lr": self.supernet_lr})
        best = self._search(run, supernet, val)
        classes = list(model.classes) if model.classes else None
        model.remove_adapter(NAME)
        model.reset_head(model.num_classes, classes)
        sizes = {name: tuple(best["sizes"].get(name, ())) or 0 for name in part}
        model.add_adapter(adapter(NAME, **sizes), NAME)
        yield Phase("retrain", run.data, fit={**common, "epochs": self.epochs, "lr": self.lr})
        if run.test is not None:
            run.evaluate(run.test, "test")

    def _check_limit(self, supernet: Any) -> None:
        """Raise ConfigError for a cap below the smallest sub-network, or one that the whole supernet does not reach."""
        smallest, whole = supernet.cost(supernet.space.smallest), supernet.cost(supernet.whole())
        self.check(
            round(self.limit * 1e6) >= smallest,
            f"limit is {self.limit:g} million parameters, and the smallest sub-network has {smallest:,}. Expected at least "
            f"{smallest / 1e6:.6f}, or smaller widths.",
        )
        self.check(
            round(self.limit * 1e6) <= whole,
            f"limit is {self.limit:g} million parameters, and the whole supernet has {whole:,}: nothing would be left out. "
            f"Expected {smallest / 1e6:.6f} to {whole / 1e6:.6f}.",
        )

    def _check_range(self, supernet: Any) -> None:
        """Raise ConfigError if the first generation will be empty: before a supernet is trained for it."""
        if not self._generation(supernet.space, supernet, [], set(), random.Random(f"{self.seed}/0")):
            raise ConfigError(
                f"noah: none of {TRIES * self.population} sub-networks drawn at random has {self.least:g} to {self.limit:g} "
                "million parameters. Give a wider range, or other widths."
            )

    # -- the search -------------------------------------------------------------------------------------------------

    def _search(self, run: Run, supernet: Any, val: Any) -> dict[str, Any]:
        """The best sub-network: {"sizes", "accuracy", "parameters"}. Each generation is measured once, also when going on."""
        space: Space = supernet.space
        seen: set[str] = set()
        top: list[dict[str, Any]] = []
        for number in range(self.generations):
            source = random.Random(f"{self.seed}/{number}")
            wanted = self._generation(space, supernet, top, seen, source)
            measured = run.once(f"generation-{number}", partial(self._measure, run, supernet, wanted, val))
            top = sorted([*top, *measured], key=lambda found: -found["accuracy"])[: self.keep]
        supernet.choose(None)
        return top[0]

    def _generation(
        self, space: Space, supernet: Any, top: list[dict[str, Any]], seen: set[str], source: random.Random
    ) -> list[Sizes]:
        found: list[Sizes] = []

        def more(make: Callable[[], Sizes], count: int) -> None:
            until, tries = len(found) + count, TRIES * count
            while len(found) < until and tries > 0:
                tries -= 1
                sizes = make()
                legal = self.least * 1e6 <= supernet.cost(sizes) <= round(self.limit * 1e6)
                if legal and str(sizes) not in seen:
                    seen.add(str(sizes))
                    found.append(sizes)

        def one() -> Any:
            return source.choice(top)["sizes"]

        if top:
            more(lambda: space.mutate(one(), source, TAKEN, DEEPER), self.mutants)
            more(lambda: space.cross(one(), one(), source), self.crossovers)
        more(lambda: space.draw(source), self.population - len(found))
        return found

    def _measure(self, run: Run, supernet: Any, wanted: list[Sizes], val: Any) -> list[dict[str, Any]]:
        options = {"record": "", "batch_size": self.batch_size, **run.measuring}
        found = []
        for sizes in wanted:
            supernet.choose(sizes)
            metrics = evaluate(run.model, val, **options)
            cost = supernet.cost(sizes)
            found.append({"sizes": sizes, "accuracy": metrics["accuracy"], "parameters": cost})
        return found

    # -- what was found ---------------------------------------------------------------------------------------------

    def summary(self, run: Run) -> dict[str, Any]:
        """The sub-network, its parameters, its accuracy in the supernet, and on the test data."""
        generations = [run.values[f"generation-{n}"] for n in range(self.generations)]
        tried = [found for generation in generations for found in generation]
        best = max(tried, key=lambda found: found["accuracy"])  # the first of equals, as in the search
        return {
            "sizes": best["sizes"],
            "parameters": best["parameters"],
            "val_accuracy": best["accuracy"],
            "tried": len(tried),
            "best_of_generation": [max((f["accuracy"] for f in g), default=None) for g in generations],
            **{f"test_{n}": v for n, v in run.values.get("test", {}).items() if n in ("accuracy", "loss")},
        }

    def table(self, report: RunReport) -> tuple[list[str], list[list[Any]]]:
        """The size of each part in each block."""
        sizes = report.summary["sizes"]
        blocks = len(next(iter(sizes.values())))
        return ["part", *(f"block {i}" for i in range(blocks))], [[part, *found] for part, found in sizes.items()]
