"""`zoo fit --folds 5 --seeds 0,1,2` and `zoo fit --shots 1,2,4,8,16`: `zoo.repeat` on the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.cli.common import console, print_json, table
from zoo.errors import ConfigError

if TYPE_CHECKING:
    from zoo.data import ImageDataset
    from zoo.model import Model

__all__ = ["check_repeats", "repeat_fit"]


def numbers_of(option: str, text: str | None) -> list[int]:
    """Whole numbers with commas.

    Raises:
        ConfigError: they are none.
    """
    try:
        return [int(word) for word in (text or "").split(",") if word.strip()]
    except ValueError:
        raise ConfigError(f"{option} is '{text}'; expected whole numbers with commas: 0,1,2.") from None


def check_repeats(
    folds: int | None, seeds: str | None, shots: list[int], tested: bool, checkpoints: Any, resume_with: Any
) -> list[int]:
    """The seeds that are named; of several shots without any, three.

    Raises:
        ConfigError: no whole numbers, options of a single fit, or nothing to measure the runs on.
    """
    if checkpoints is not None or resume_with:
        raise ConfigError(
            "--checkpoints and --resume-with are of a single fit; --folds, --seeds and several --shots train several without "
            "them."
        )
    if folds is not None and len(shots) > 1:
        raise ConfigError(
            "--folds measures on the rest of the training data; several --shots are measured on --test. Give one."
        )
    if folds is not None and tested:
        raise ConfigError("--folds measures each run on the part that it was not trained on; leave --test out.")
    if folds is None and not tested:
        what = "--seeds alone" if len(shots) < 2 else "--shots with several numbers"
        raise ConfigError(f"{what} measures each run on --test data, and there are none. Give them, or --folds.")
    return numbers_of("--seeds", seeds) or ([0, 1, 2] if len(shots) > 1 else [])


def repeat_fit(
    build: Callable[[int], Model],
    train: ImageDataset,
    val: ImageDataset | None,
    test: ImageDataset | None,
    *,
    folds: int | None,
    seeds: list[int],
    shots: list[int] | None,
    out: Path,
    as_json: bool,
    options: Mapping[str, Any],
) -> None:
    """Train and measure a model for each fold or number of shots and seed, and show the table. No adapter is saved."""
    import zoo

    found = zoo.repeat(build, train, val, test, folds=folds, seeds=seeds, shots=shots, out=out, **options)
    if as_json:
        print_json({"out": str(out), **found.as_dict()})
        return
    names, *rows = found.cells()
    shown = console()
    shown.print(table(names, rows))
    shown.print(f"saved in {out}: repeats.json, repeats.md, and the report of each run")
