"""The command line: `zoo list | points | info | fit | run | eval | predict | push | pull | merge | compress | export ...`.

One file for each group of commands; each command imports what it needs when it runs, so that `zoo --help` is quick.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from zoo.cli import (
    bench,
    catalog,
    compare,
    compress,
    convert,
    evaluate,
    export,
    identify,
    listing,
    mmcv,
    new,
    predict,
    regime,
    run,
    share,
    zeroshot,
)
from zoo.cli.checks import checked
from zoo.cli.common import ZooGroup

__all__ = ["app", "main", "wait_passively"]

_EXAMPLES = """
Small adapters for pretrained backbones, by name.

A first hour:

\b
  zoo demo                            five methods side by side on real images, offline
  zoo list                            backbones and methods
  zoo points vit-b16                  where a method can add something
  zoo fit vit-b16 lora --data photos/train --out out/
  zoo eval out/ --data photos/test
  zoo predict out/ --data photos/new --out table.csv
  zoo push out/ you/vit-b16-lora-photos

Each command explains itself: zoo fit --help. Exit codes: 0 done, 1 an error that is explained in one panel, 2 a command
line that does not parse.
"""

app = typer.Typer(
    name="zoo",
    cls=ZooGroup,
    help=_EXAMPLES,
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    pretty_exceptions_enable=False,  # what is not a ZooError is a bug, and is reported with a plain traceback
)


def _version(wanted: bool) -> None:
    if wanted:
        from zoo import __version__

        typer.echo(f"adapter-zoo {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    wait_passively()


def wait_passively() -> None:
    """Threads that wait for work sleep instead of spinning, so that a busy machine does not slow training down.

    OpenMP reads this when torch is loaded, which no command does before this. What the user has set stays.
    """
    for name, value in (("OMP_WAIT_POLICY", "PASSIVE"), ("GOMP_SPINCOUNT", "0"), ("KMP_BLOCKTIME", "0")):
        os.environ.setdefault(name, value)


for _command, _name in (
    (listing.list_, "list"),
    (catalog.points, "points"),
    (catalog.info, "info"),
    (run.fit, "fit"),
    (regime.run, "run"),
    (evaluate.evaluate, "eval"),
    (identify.identify, "identify"),
    (predict.predict, "predict"),
    (zeroshot.zeroshot, "zeroshot"),
    (share.push, "push"),
    (share.pull, "pull"),
    (share.merge, "merge"),
    (compress.compress, "compress"),
    (convert.convert, "convert"),
    (export.export, "export"),
    (bench.bench, "bench"),
    (compare.compare, "bench compare"),
    (new.new, "new"),
    (run.demo, "demo"),
    (mmcv.install_mmcv, "install-mmcv"),
):
    app.command(
        _name,
        no_args_is_help=_name not in ("list", "bench", "demo", "install-mmcv"),
    )(checked(_name, _command))
