"""`zoo fit --folds 5 --seeds 0,1,2`: `zoo.repeat` on the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.cli.common import console, print_json, table
from zoo.errors import ConfigError

if TYPE_CHECKING:
    from zoo.data import ImageDataset
    from zoo.model import Model
    from zoo.train.repeats import Repeats

__all__ = ["check_repeats", "repeat_fit"]


def check_repeats(folds: int | None, seeds: str | None, tested: bool, checkpoints: Any, resume_with: Any) -> list[int]:
    """The seeds that are named.

    Raises:
        ConfigError: no whole numbers, options of a single fit, or nothing to measure the runs on.
    """
    if checkpoints is not None or resume_with:
        raise ConfigError(
            "--checkpoints and --resume-with are of a single fit; --folds and --seeds train several without them."
        )
    if folds is not None and tested:
        raise ConfigError("--folds measures each run on the part that it was not trained on; leave --test out.")
    if folds is None and not tested:
        raise ConfigError("--seeds alone measures each run on --test data, and there are none. Give them, or --folds.")
    try:
        return [int(text) for text in (seeds or "").split(",") if text.strip()]
    except ValueError:
        raise ConfigError(f"--seeds is '{seeds}'; expected whole numbers with commas: 0,1,2.") from None


def repeat_fit(
    build: Callable[[int], Model],
    train: ImageDataset,
    val: ImageDataset | None,
    test: ImageDataset | None,
    *,
    folds: int | None,
    seeds: list[int],
    out: Path,
    as_json: bool,
    options: Mapping[str, Any],
) -> None:
    """Train and measure a model for each fold and seed, and show the table. No adapter is saved: none is the one."""
    import zoo

    found = zoo.repeat(build, train, val, test, folds=folds, seeds=seeds, out=out, **options)
    if as_json:
        print_json({"out": str(out), "runs": found.rows, "mean": found.mean, "std": found.std})
        return
    shown = console()
    shown.print(table(list(found.rows[0]), _cells(found)))
    shown.print(f"saved in {out}: repeats.json, repeats.md, and the report of each run")


def _cells(found: Repeats) -> list[list[str]]:
    rows = [[f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()] for row in found.rows]
    names = list(found.rows[0])
    for title, numbers in (("mean", found.mean), ("std", found.std)):
        rows.append([f"{numbers[n]:.4f}" if n in numbers else title if n == names[0] else "" for n in names])
    return rows
