"""`zoo predict`: what a model says of files that nobody has labelled."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from zoo.cli.common import console, print_json, table
from zoo.cli.options import (
    OUTPUT,
    BatchSize,
    Device,
    Json,
    Precision,
    Pretrained,
    Quiet,
    SeedOfWeights,
    SkipBroken,
    TrustBackbone,
    Workers,
    data_option,
    model_option,
)

SHOWN = 20  # rows on the screen


def predict(
    target: Annotated[
        str, typer.Argument(help="A saved folder, a Hub repository, an embedded adapter, or a backbone.")
    ],
    data: Annotated[str, data_option("A folder with files (of any depth), a pattern, or a file.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The table: .csv, .tsv, .jsonl or .parquet.", rich_help_panel=OUTPUT),
    ] = None,
    top: Annotated[
        int, typer.Option("--top", "-k", help="So many of the likeliest classes.", rich_help_panel=OUTPUT)
    ] = 1,
    features: Annotated[
        bool, typer.Option("--features", help="Embeddings instead of classes.", rich_help_panel=OUTPUT)
    ] = False,
    task: Annotated[
        str | None, model_option("classify, multilabel or regress; default: as the model was trained.")
    ] = None,
    batch_size: BatchSize = 64,
    pretrained: Pretrained = True,
    seed: SeedOfWeights = 0,
    trust_backbone: TrustBackbone = False,
    precision: Precision = "fp32",
    device: Device = None,
    workers: Workers = None,
    skip_broken: SkipBroken = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Classes (or tags, numbers, embeddings) of unlabelled images or sounds, as a table with a row for each file.

    \b
      zoo predict out/ --data photos/ --out table.csv            path, class, probability
      zoo predict out/ --data photos/ --out table.csv --top 5
      zoo predict out/ --data 'photos/*.jpg' --features --out embeddings.parquet
      zoo predict out/ --data photos/ --skip-broken --json
    """
    import zoo
    from zoo.cli.evaluate import load_target
    from zoo.train.prediction import check_table

    if out is not None:
        check_table(out)
    found = zoo.predict(
        load_target(target, pretrained, seed, trust_backbone),
        data,
        top=top,
        features=features,
        task=task,
        batch_size=batch_size,
        precision=precision,
        workers=workers,
        device=device,
        on_error="skip" if skip_broken else "raise",
        progress=not (quiet or as_json),
    )
    if out is not None:
        found.save(out)
    columns, rows = found.columns(), found.rows()
    if as_json:
        shown: dict[str, Any] = {"target": target, "data": data, "out": out, "kind": found.kind, "files": len(found)}
        skipped = [{"path": path, "reason": reason} for path, reason in found.skipped]
        written = [dict(zip(columns, row, strict=True)) for row in rows] if out is None else None
        print_json(shown | {"skipped": skipped} | ({} if written is None else {"rows": written}))
        return
    screen = console()
    if out is None:
        cells = [[f"{x:.4f}" if isinstance(x, float) else x for x in row[:9]] for row in rows[:SHOWN]]
        screen.print(table(columns[:9], cells, right=[c for c in columns if c.startswith("probability")]))
    for path, reason in found.skipped:
        screen.print(f"skipped: {reason if path in reason else f'{path}: {reason}'}", markup=False, soft_wrap=True)
    more = "" if out is not None or len(rows) <= SHOWN else f"; {SHOWN} are shown, --out writes all"
    place = f" in {out}" if out is not None else ""
    screen.print(f"{len(found)} files, {len(found.skipped)} skipped{place}{more}", markup=False, soft_wrap=True)
