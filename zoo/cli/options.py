"""Options that the commands which train and measure share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from zoo.cli.common import JSON_HELP

DATA, TRAINING, MODEL, OUTPUT = "Data", "Training", "Model", "Output"

Json = Annotated[bool, typer.Option("--json", help=JSON_HELP, rich_help_panel=OUTPUT)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.", rich_help_panel=OUTPUT)]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default: the best there is.", rich_help_panel=MODEL)
]
Precision = Annotated[str, typer.Option(help="fp32, bf16 or fp16.", rich_help_panel=MODEL)]
Workers = Annotated[int | None, typer.Option(help="Processes that load the data.", rich_help_panel=DATA)]
BatchSize = Annotated[int, typer.Option("--batch-size", "-b", help="Samples in a batch.", rich_help_panel=MODEL)]
Pretrained = Annotated[
    bool, typer.Option(help="With the backbone's pretrained weights, or with random ones.", rich_help_panel=MODEL)
]
SeedOfWeights = Annotated[
    int, typer.Option("--seed", help="Of random weights (--no-pretrained): that of zoo fit.", rich_help_panel=MODEL)
]
SkipBroken = Annotated[
    bool, typer.Option("--skip-broken", help="Go on without items that cannot be read.", rich_help_panel=DATA)
]
Truncate = Annotated[
    bool,
    typer.Option("--truncate", help="Cut texts that are longer than the model's context.", rich_help_panel=DATA),
]
TrustBackbone = Annotated[
    bool,
    typer.Option(
        "--trust-backbone",
        help="Build the backbone that the folder names even if it is of somebody's repository or folder.",
        rich_help_panel=MODEL,
    ),
]
LabelKind = Annotated[
    str,
    typer.Option(
        "--labels",
        help="What the labels are: auto, classes, tags or numbers; auto: as the task wants.",
        rich_help_panel=DATA,
    ),
]
LabelColumn = Annotated[
    str | None,
    typer.Option(
        help="Column of the labels in a table, Parquet files or shards; several with commas.", rich_help_panel=DATA
    ),
]
WhatFor = Annotated[
    str | None,
    typer.Option(
        help="classify, contrast, generate, diffuse ...; default: classify, else what the backbone is for.",
        rich_help_panel=TRAINING,
    ),
]


def data_option(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel=DATA)


def training_option(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=TRAINING)


def model_option(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=MODEL)
