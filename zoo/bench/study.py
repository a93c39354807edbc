"""Methods side by side at one budget: the same data, steps and search for each, several seeds, rows that survive a kill.

For each data set and method:

1. its setting is solved to the budget (`zoo.bench.sizes`);
2. a search of learning rates, of equal size for every method: its default (`zoo.train.rates`: more over few steps) times each of
   `factors(rates)`, trained on a part of the training items with one seed, measured on the others (validation); the most accurate
   wins, of equals that of less loss. Test items take no part in it;
3. a run for each seed with that rate on all training items; the weights of the last step are measured on the test items, once;
4. with the first seed's model: bytes kept for backward and step time, beside full fine-tuning.

Heads are trained at `HEAD_RATE` beside every method; where a method has nothing but a head, its rate is what is searched.
Items are prepared once, without augmentation, and all methods are given the same.
"""

from __future__ import annotations

import datetime
import gc
import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from zoo import registry
from zoo.bench.costs import COSTS, beside_full, best_device, machine, revision, versions
from zoo.bench.journal import Journal
from zoo.bench.sets import Sets, named_sets, ready
from zoo.bench.sizes import Method, Sized, own_size, sized, trained
from zoo.errors import ConfigError, ZooError
from zoo.loading import load
from zoo.train.evaluation import evaluate
from zoo.train.fitting import fit
from zoo.train.rates import few_steps
from zoo.train.step import TrainingError

__all__ = ["Protocol", "Study", "compare", "factors"]

HEAD_RATE = 1e-2
SEARCH_SEED = 1000  # of the search's runs; no final run has it
FACTORS = {1: (1.0,), 2: (1.0, 3.0), 3: (1 / 3, 1.0, 3.0), 4: (1 / 3, 1.0, 3.0, 10.0), 5: (0.1, 1 / 3, 1.0, 3.0, 10.0)}
Tell = Callable[[str, int, int], object]


@dataclass(frozen=True)
class Protocol:
    """What is equal for all methods.

    Args:
        steps: of each final run. search_steps: of each run of the search.
        rates: how many learning rates are tried, 1 to 5. seeds: of the final runs.
        shots: training items of every class at most; None: all. test_items: as many are tested on; None: all.
        val_fraction: of the training items, for the search.
        rounds: steps that are timed. precision: "fp32", "bf16" or "fp16".
    """

    steps: int = 200
    search_steps: int = 100
    batch_size: int = 16
    rates: int = 3
    seeds: tuple[int, ...] = (0, 1, 2)
    shots: int | None = None
    test_items: int | None = None
    val_fraction: float = 0.2
    rounds: int = 10
    precision: str = "fp32"

    def __post_init__(self) -> None:
        factors(self.rates)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or SEARCH_SEED in self.seeds:
            raise ConfigError(
                f"The seeds are {list(self.seeds)}; expected one or more, each once, and not {SEARCH_SEED}."
            )


def factors(count: int) -> tuple[float, ...]:
    """By what the default learning rate is multiplied in a search of so many runs.

    Raises:
        ConfigError: not 1 to 5.
    """
    if count not in FACTORS:
        raise ConfigError(f"rates is {count}; expected 1 to 5 learning rates.")
    return FACTORS[count]


@dataclass
class Study:
    """What was asked for and what was found.

    Attributes:
        lines: one dict for each data set, budget and method with all its runs: "accuracy" (a list, in the order of the seeds),
            "parameters", "lr", "saved_ratio" and the like; with `finished` also those with a part of their runs, which name the
            others' seeds as "missing_seeds".
        left_out: (budget, label) -> why a method does not meet it. failed: what broke off, with its message.
        missing: what `finished` did not find: dicts of "data", "budget", "method", "seeds" and whether its "search" lacks, too.
    """

    backbone: str
    protocol: Protocol
    lines: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[tuple[int, str], str] = field(default_factory=dict)
    failed: list[dict[str, str]] = field(default_factory=list)
    missing: list[dict[str, Any]] = field(default_factory=list)
    revisions: list[str] = field(default_factory=list)


def compare(
    backbone: str,
    data: Sequence[str],
    methods: Sequence[Method],
    budgets: Sequence[int],
    protocol: Protocol,
    *,
    out: Path,
    also: Sequence[Method] = (),
    data_root: Path | None = None,
    device: str | None = None,
    keep: bool = False,
    finished: bool = False,
    tell: Tell = lambda text, done, total: None,
    **options: Any,
) -> Study:
    """Train and measure every method at every budget on every data set; what `out/rows.jsonl` has is not repeated.

    Args:
        data: names of data sets (`zoo.bench.sets`).
        also: methods that are compared beside them at their own size, whatever the budget.
        keep: save the adapter of the first seed in `out/adapters/<data>/<label>-<parameters>`.
        finished: train nothing; what has rows of final runs is shown, the rest stands in `Study.missing`.
        tell: is called with what goes on, and how many trainings of all are done.
        options: of `zoo.load`, such as `img_size`.

    Raises:
        ConfigError: data or a budget twice, a budget below the cheapest unit or above the whole backbone, a protocol that
            cannot be.
        DataError: data that are not there, or have no splits or classes.
    """
    cls, _ = registry.find_backbone(backbone)
    if not cls.pools:
        raise ConfigError(f"'{backbone}' does not classify, and what is compared here are classifiers.")
    for what, given_ones in (("The data", data), ("The budget of", budgets)):
        if twice := [one for one in given_ones if list(given_ones).count(one) > 1]:
            raise ConfigError(f"{what} {twice[0]!r} is named twice.")
    tell("opening the data ...", 0, 0)
    given = {"shots": protocol.shots, "test_items": protocol.test_items, "val_fraction": protocol.val_fraction}
    opened = [named_sets(cls, name, root=data_root, **given) for name in data]  # type: ignore[arg-type]
    study = Study(backbone, protocol)
    jobs: list[tuple[Sets, int | None, Sized]] = []
    for sets in opened:
        for budget in budgets:
            tell(f"making the methods as large as {budget:,} parameters ...", 0, 0)
            plan = sized(backbone, methods, budget, len(sets.classes), **options)
            study.left_out.update({(budget, label): why for label, why in plan.left_out.items()})
            jobs += [(sets, budget, method) for method in plan.chosen]
        jobs += [(sets, None, m) for m in own_size(backbone, also, len(sets.classes), **options)]
    runs = _Runs(
        *(backbone, protocol, Journal(out / "rows.jsonl"), best_device(device), options, tell),
        total=len(jobs) * (protocol.rates + len(protocol.seeds)),
        folder=out / "adapters" if keep else None,
        finished=finished,
    )
    for sets, size, method in jobs:
        try:
            line = runs.line(sets, method)
        except _Unfinished as found:
            study.missing.append(_lacking(sets, size, method, found.search, found.seeds))
            continue
        except ZooError as error:
            study.failed.append({"data": sets.name, "method": method.label, "error": str(error)})
        except Exception as error:  # one method that breaks must not cost the others their results
            told = f"{type(error).__name__}: {error} (out/failed.log says where)"
            study.failed.append({"data": sets.name, "method": method.label, "error": told})
            out.mkdir(parents=True, exist_ok=True)
            with (out / "failed.log").open("a") as file:
                file.write(f"{sets.name}, {method.label}, {method.settings}\n{traceback.format_exc()}\n")
        else:
            study.lines.append({"data": sets.name, "budget": size, **line})
            if seeds := line.get("missing_seeds"):
                study.missing.append(_lacking(sets, size, method, False, seeds))
        gc.collect()
    study.revisions = sorted(runs.revisions)
    return study


def _lacking(sets: Sets, size: int | None, method: Sized, search: bool, seeds: Sequence[int]) -> dict[str, Any]:
    return {"data": sets.name, "budget": size, "method": method.label, "search": search, "seeds": list(seeds)}


class _Unfinished(Exception):
    """Trainings that are wanted and not in the journal: some of the search, and so all seeds, or all seeds."""

    def __init__(self, search: bool, seeds: Sequence[int]) -> None:
        super().__init__(search, seeds)
        self.search, self.seeds = search, seeds


class _Runs:
    """The trainings of one comparison, those in the journal skipped.

    `total`: how many there are. `folder`: of the adapters that are kept; None keeps none. `finished`: nothing is trained.
    """

    def __init__(
        self,
        backbone: str,
        protocol: Protocol,
        journal: Journal,
        device: str,
        options: dict[str, Any],
        tell: Tell,
        *,
        total: int,
        folder: Path | None,
        finished: bool,
    ) -> None:
        self.backbone, self.protocol, self.journal = backbone, protocol, journal
        self.device, self.options, self.tell = device, options, tell
        self.total, self.folder, self.finished = total, folder, finished
        self.done = 0
        self.revisions: set[str] = set()
        self.sets: Sets | None = None
        self.prepared: dict[str, Any] = {}
        self.fingerprint = load(backbone, num_classes=0, **options).fingerprint

    def prepare(self, sets: Sets) -> None:
        """Items of this set as the backbone takes them; those of the one before are dropped."""
        if self.sets is not sets:
            self.sets = sets
            model = load(self.backbone, num_classes=len(sets.classes), pretrained=False, **self.options)
            self.prepared = {part: ready(model, getattr(sets, part)) for part in ("train", "part", "val", "test")}

    def line(self, sets: Sets, method: Sized) -> dict[str, Any]:
        """Search, then all seeds; what of it is new is written to the journal. If only what is finished is wanted, the seeds
        that are.
        """
        protocol = self.protocol
        cls = registry.adapter_class(method.name)
        base = few_steps(cls.default_lr, protocol.steps)
        tried = []
        for factor in factors(protocol.rates):
            rate = float(f"{base * factor:.3g}")
            config = self._config(sets, method, "search", SEARCH_SEED, rate, protocol.search_steps)
            told = f"{sets.name}: {method.label}, lr {rate:g}"
            if self.finished and self.journal.find(config) is None:
                raise _Unfinished(True, protocol.seeds)
            tried.append({"lr": rate, **self._once(sets, config, told, partial(self._search, method, rate))})
        best = max(tried, key=lambda t: (t["accuracy"], -t["loss"]))
        results, missing = [], []
        for seed in protocol.seeds:
            config = self._config(sets, method, "run", seed, best["lr"], protocol.steps)
            config["test"] = sets.digest("test")
            told = f"{sets.name}: {method.label}, seed {seed}"
            if self.finished and self.journal.find(config) is None:
                missing.append(seed)
                continue
            results.append(self._once(sets, config, told, partial(self._run, sets, method, best["lr"], seed)))
        if not results:
            raise _Unfinished(False, missing)
        costs: dict[str, Any] = next(
            (r for r in results if "step_ratio" in r), {}
        )  # other seeds may have been first before
        return {
            **asdict(method),
            **{name: costs.get(name) for name in COSTS},
            "head": results[0]["head"],
            "trained": round(
                sum(r["trained"] for r in results) / len(results)
            ),  # what decides on the data may differ by seed
            "lr": best["lr"],
            "val_accuracy": best["accuracy"],
            "tried": tried,
            **{name: [r[name] for r in results] for name in ("accuracy", "loss", "seconds")},
            **({"missing_seeds": missing} if missing else {}),
        }

    def _config(self, sets: Sets, method: Sized, kind: str, seed: int, rate: float, steps: int) -> dict[str, Any]:
        """Everything that the numbers of one training depend on."""
        protocol = self.protocol
        return {
            "kind": kind,
            "backbone": self.backbone,
            "fingerprint": self.fingerprint,
            "options": self.options,
            "data": sets.name,
            "train": sets.digest("train"),
            "val_fraction": protocol.val_fraction if kind == "search" else None,
            "method": method.name,
            "settings": method.settings,
            "lr": rate,
            "steps": steps,
            "batch_size": protocol.batch_size,
            "precision": protocol.precision,
            "seed": seed,
        }

    def _once(
        self, sets: Sets, config: dict[str, Any], told: str, work: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The result in the journal, or that of the work, which is then written there."""
        self.tell(told, self.done, self.total)
        row = self.journal.find(config)
        if row is None:
            self.prepare(sets)
            result = work()
            row = {"config": config, "result": result, "revision": revision(), "versions": versions()}
            row |= {"device": machine(self.device)["device"], "time": datetime.datetime.now(datetime.UTC).isoformat()}
            self.journal.add(row)
        self.done += 1
        self.revisions.add(str(row.get("revision")))
        self.tell(told, self.done, self.total)
        found: dict[str, Any] = row["result"]
        return found

    def _fit(self, method: Sized, data: Any, rate: float, seed: int, steps: int) -> tuple[Any, float]:
        protocol, classes = self.protocol, data.classes
        adapter = registry.adapter(method.name, **method.settings)
        model = load(
            self.backbone, adapter=adapter, num_classes=len(classes), seed=seed, device=self.device, **self.options
        )
        head = HEAD_RATE if trained(model) or adapter.needs_calibration else rate
        report = fit(
            model,
            data,
            steps=steps,
            batch_size=protocol.batch_size,
            lr={"default": rate, "head": head},
            precision=protocol.precision,
            seed=seed,
            keep="last",
            device=self.device,
            progress=False,
        )
        return model, report.seconds

    def _search(self, method: Sized, rate: float) -> dict[str, Any]:
        """Accuracy and loss on the validation items; a rate that breaks the training has none."""
        try:
            model, _ = self._fit(method, self.prepared["part"], rate, SEARCH_SEED, self.protocol.search_steps)
            found = self._measure(model, "val")
        except TrainingError:
            return {"accuracy": 0.0, "loss": 1e30, "diverged": True}
        return found if math.isfinite(found["loss"]) else {"accuracy": found["accuracy"], "loss": 1e30}

    def _measure(self, model: Any, part: str) -> dict[str, float]:
        found = evaluate(
            model,
            self.prepared[part],
            batch_size=64,
            precision=self.protocol.precision,
            device=self.device,
            record="",
            progress=False,
        )
        return {"accuracy": found["accuracy"], "loss": found["loss"]}

    def _run(self, sets: Sets, method: Sized, rate: float, seed: int) -> dict[str, Any]:
        """One final run; of the first seed also what a step costs."""
        first = seed == self.protocol.seeds[0]
        model, seconds = self._fit(method, self.prepared["train"], rate, seed, self.protocol.steps)
        found: dict[str, Any] = self._measure(model, "test")
        found = {k: v if math.isfinite(v) else None for k, v in found.items()}
        own, both = trained(model), model.num_parameters(trainable=True)
        found |= {"trained": own, "head": both - own, "seconds": round(seconds, 2)}
        if first and self.folder is not None:
            model.classes = sets.classes
            model.record |= {"data": {"name": sets.name, "train": len(sets.train), "test": len(sets.test)}}
            model.record |= {"metrics": {"test": {"accuracy": round(found["accuracy"], 4)}}}
            name = "".join(c if c.isalnum() or c in "-_=" else "_" for c in method.label)
            model.save_adapter(self.folder / sets.name / f"{name}-{found['trained']}")
        if first:
            found |= beside_full(model, self.protocol.batch_size, self.protocol.rounds, self.protocol.precision)
        return found
