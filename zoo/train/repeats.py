"""k folds, several seeds, few and fewer examples in one call: how far a number is to be trusted.

    def build(seed):
        return zoo.load("vit-b16", "lora", num_classes=17, seed=seed)

    result = zoo.repeat(build, "flowers/train", folds=5, seeds=(0, 1), out="folds/", epochs=20)
    print(result.table())                 # each run, then mean and standard deviation
    print(result.mean["accuracy"], result.std["accuracy"])

    result = zoo.repeat(build, "flowers/train", test="flowers/test", shots=(1, 2, 4, 8, 16), steps=100)
    print(result.table())                 # one row for each number of examples: mean and deviation over the seeds
    print(result.of(1).mean["accuracy"])  # of one example of every class

With folds, the items of every class are dealt out to k parts; each part is measured once for each seed by a model that was
trained on the others. Without, each seed trains on all of `train` and is measured on `test`. What is measured was never
trained on and no epoch was chosen on it: `val=`, or a part of the training items, is for that. With shots, each seed draws its
own k items of every class, so the deviation is also that of which items these are.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zoo.arguments import FUNCTION, NOTHING, PATH, TEXT, Kind, instance, typed, whole
from zoo.data.dataset import ImageDataset
from zoo.data.sampling import few_shot, known_labels
from zoo.data.seeds import mixed_seed
from zoo.disk import write_file
from zoo.errors import ConfigError
from zoo.tasks import Task, objective
from zoo.train.evaluation import evaluate
from zoo.train.fitting import fit
from zoo.train.report import finite

if TYPE_CHECKING:
    from zoo.model import Model

__all__ = ["Repeats", "deal", "repeat"]

_CLOCK = ("seconds", "images_per_second")


@dataclass
class Repeats:
    """The result of `zoo.repeat`.

    Attributes:
        rows: one dict for each run: "fold" (from 1) or "shots" where there are such, "seed", and the numbers that were measured.
        mean, std: of each number over the runs; the standard deviation is that of a sample (n - 1), NaN of one run. Empty with
            shots, whose runs are not of one kind: `of` has those of one number.
    """

    rows: list[dict[str, Any]]
    mean: dict[str, float] = field(default_factory=dict)
    std: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.shots) > 1:
            return
        for name in [k for k, v in self.rows[0].items() if isinstance(v, float)]:
            values = [row[name] for row in self.rows]
            self.mean[name] = float(np.mean(values))
            self.std[name] = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan

    @property
    def shots(self) -> list[int]:
        """The numbers of examples of a class, in the order in which they were tried; empty if all items were trained on."""
        return list(dict.fromkeys(row["shots"] for row in self.rows if "shots" in row))

    def of(self, shots: int) -> Repeats:
        """The runs with one number of examples.

        Raises:
            ConfigError: there are none.
        """
        if shots not in self.shots:
            raise ConfigError(f"There are no runs with shots={shots}; those are {self.shots}.")
        return Repeats([row for row in self.rows if row["shots"] == shots])

    def cells(self) -> list[list[str]]:
        """What the table shows, the names of the columns first: all runs, then mean and standard deviation; or, of several
        numbers of examples, one row for each.
        """
        if len(self.shots) > 1:
            each = {k: self.of(k) for k in self.shots}
            measured = [name for name, value in self.rows[0].items() if isinstance(value, float)]
            rows = [
                [str(k), str(len(found.rows)), *(f"{found.mean[n]:.4f} +- {found.std[n]:.4f}" for n in measured)]
                for k, found in each.items()
            ]
            return [["shots", "runs", *measured], *rows]
        names = list(self.rows[0])
        lines = [[f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()] for row in self.rows]
        for title, numbers in (("mean", self.mean), ("std", self.std)):
            lines.append([f"{numbers[n]:.4f}" if n in numbers else title if n == names[0] else "" for n in names])
        return [names, *lines]

    def table(self) -> str:
        """`cells` as Markdown."""
        names, *lines = self.cells()
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (names, ["---"] * len(names), *lines))

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(finite(self.as_dict()), indent=2, allow_nan=False)

    def as_dict(self) -> dict[str, Any]:
        """ "runs" with "mean" and "std"; of several numbers of examples "shots", with those of each."""
        if len(self.shots) > 1:
            found = {k: self.of(k) for k in self.shots}
            return {"runs": self.rows, "shots": {str(k): {"mean": f.mean, "std": f.std} for k, f in found.items()}}
        return {"runs": self.rows, "mean": self.mean, "std": self.std}

    def save(self, folder: str | Path) -> None:
        """Write `repeats.json` and `repeats.md`."""
        write_file(Path(folder) / "repeats.json", self.to_json().encode())
        write_file(Path(folder) / "repeats.md", (self.table() + "\n").encode())


def deal(dataset: ImageDataset, folds: int, seed: int = 0) -> list[np.ndarray]:
    """The items of each fold: those of every class dealt out in turn, so that folds differ by one item of a class at most.

    Raises:
        ConfigError: fewer items than folds.
    """
    labels = known_labels(dataset)
    if len(labels) < folds:
        raise ConfigError(
            f"folds is {folds}, and '{dataset.name}' has {len(labels)} {dataset.noun}; expected at least one each."
        )
    random = np.random.default_rng(mixed_seed(seed, "folds"))
    ordered = np.concatenate([random.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)])
    return [np.sort(ordered[number::folds]) for number in range(folds)]


def _different(least: int) -> Kind:
    def take(value: Any) -> list[int]:
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or not value:
            raise TypeError
        found = [whole(least).take(one) for one in value]
        if len(set(found)) != len(found):
            raise ValueError
        return found

    return Kind(f"a list of different whole numbers >= {least}", take)


@typed(
    build=FUNCTION,
    folds=whole(2) | NOTHING,
    seeds=_different(0),
    shots=_different(1) | NOTHING,
    task=TEXT | instance("an object of zoo.Task", Task) | NOTHING,
    out=PATH | NOTHING,
)
def repeat(
    build: Callable[[int], Model],
    train: Any,
    val: Any = None,
    test: Any = None,
    *,
    folds: int | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    shots: Sequence[int] | None = None,
    task: str | Task | None = None,
    out: str | Path | None = None,
    **options: Any,
) -> Repeats:
    """Train and measure a new model for each fold and seed.

    Args:
        build: seed -> a new model.
        train, val: as of `zoo.fit`. test: what is measured, without folds; as of `zoo.evaluate`.
        folds: into how many parts `train` is dealt; None: no folds.
        seeds: of the models and of their fits; folds are the same for all.
        shots: numbers of items of every class to train on, each in turn; the seed draws them. Measured on `test`.
        out: folder for the table, and for the report of each run.
        options: of `zoo.fit`; `metrics`, `precision`, `workers`, `device` and `progress` of the measurement, too.

    Raises:
        ConfigError: both folds and test, or neither; folds and shots. DataError: a class has fewer items than shots asks for.
        Others as of `zoo.fit`.
    """
    if folds is not None and shots is not None:
        raise ConfigError(
            "folds= measures on what is left of the training data, and shots= leaves most of it out: give one."
        )
    if (folds is None) == (test is None):
        raise ConfigError("Give folds=, or test= data to measure the runs on: one of both.")
    if wrong := [name for name in ("seed", "checkpoint", "resume") if name in options]:
        raise ConfigError(f"'{wrong[0]}' is of a single fit; zoo.repeat has seeds=, and no checkpoints.")
    shared = {k: v for k, v in options.items() if k in ("metrics", "precision", "workers", "device", "progress")}
    parts: list[np.ndarray | None] = [None]
    rows: list[dict[str, Any]] = []
    for few, seed in itertools.product(shots or (None,), seeds):
        for number in range(folds or 1):
            model = build(seed)
            mine, measured = train, test
            if folds is not None or few is not None:
                opened = objective(model, task, None).open(model, train, train=True).with_transform(None)
                if isinstance(train, ImageDataset):
                    opened = opened.with_transform(train.transform)
            if few is not None:
                if shots is not None and not rows:  # all of them, before the first training
                    few_shot(opened, max(shots), seed)
                mine = few_shot(opened, few, seed)
            if folds is not None:
                if parts[0] is None:
                    parts = list(deal(opened, folds))
                held = parts[number]
                assert held is not None
                mine = opened.select(np.setdiff1d(np.arange(len(opened)), held))
                measured = opened.select(held)
            front = [f"fold-{number + 1}"] if folds else [f"shots-{few}"] if few is not None else []
            name = "-".join([*front, f"seed-{seed}"])
            place = None if out is None else Path(out) / name
            fit(model, mine, val, seed=seed, task=task, out=place, **options)
            result = evaluate(model, measured, record="", task=task, **shared)
            numbers = {k: v for k, v in result.items() if isinstance(v, float) and k not in _CLOCK}
            kind = {"fold": number + 1} if folds else {"shots": few} if few is not None else {}
            rows.append({**kind, "seed": seed, **numbers})
    found = Repeats(rows)
    if out is not None:
        found.save(out)
    return found
