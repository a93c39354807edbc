"""`zoo zeroshot`: the names of classes as a classifier, on a backbone of images and texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from zoo.cli.common import console, numbers, print_json, table
from zoo.cli.options import (
    MODEL,
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
)
from zoo.errors import ConfigError, MismatchError


def zeroshot(
    target: Annotated[str, typer.Argument(help="A backbone of images and texts, or an adapter that was saved on one.")],
    data: Annotated[str, data_option("Labelled data, whose classes are the names; with --classes any files.")],
    split: Annotated[str | None, data_option("Split of --data, where it has several.")] = None,
    classes: Annotated[str | None, data_option("Names, a,b,c: the files are not labelled, and are told apart.")] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            help="A text with {} for the name of a class; may be given several times, whose texts are averaged.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="With --classes: the table of the files.", rich_help_panel=OUTPUT),
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
    """Class names as a classifier: no training, no labels but the names.

    \b
      zoo zeroshot clip-vit-b32 --data photos/test                    accuracy; the folders are the names
      zoo zeroshot clip-vit-b32 --data photos/test --template 'a photo of a {}.' --template 'a drawing of a {}.'
      zoo zeroshot clip-vit-b32 --data new/ --classes cat,dog --out table.csv
    """
    import zoo
    from zoo.cli.evaluate import load_target

    model = load_target(target, pretrained, seed, trust_backbone)
    put: Any = getattr(model.family, "zero_shot", None)
    if put is None:
        raise MismatchError(
            f"'{target}' has no tower of texts that could read names of classes. Take one of CLIP or SigLIP, for example "
            "clip-vit-b32, or train a head: zoo fit."
        )
    if out is not None and classes is None:
        raise ConfigError("--out is the table of files without labels; name the classes, too: --classes cat,dog")
    common: dict[str, Any] = {
        "batch_size": batch_size,
        "precision": precision,
        "device": device,
        "workers": workers,
        "progress": not (quiet or as_json),
    }
    told = {"target": target, "data": data, "templates": list(template or ())}
    on_error: Any = "skip" if skip_broken else "raise"
    if classes is None:
        from zoo.data import open_dataset

        dataset = open_dataset(data, split=split, on_error=on_error)
        names = dataset.classes
        if not names:
            raise ConfigError(f"'{data}' has no names of classes; give them in the order of the labels in the data.")
        put(model, names, tuple(template or ()))
        result = zoo.evaluate(model, dataset, task="classify", **common)
        if as_json:
            print_json({**told, "classes": names, **result})
            return
        console().print(numbers(result))
        return
    from zoo.train.prediction import check_table

    names = [name.strip() for name in classes.split(",") if name.strip()]
    if len(names) < 2 or len(set(names)) != len(names):
        raise ConfigError(f"--classes is '{classes}'; expected two names or more, each once: --classes cat,dog")
    if out is not None:
        check_table(out)
    put(model, names, tuple(template or ()))
    found = zoo.predict(model, data, task="classify", on_error=on_error, **common)
    if out is not None:
        found.save(out)
    shown = found.rows()
    if as_json:
        print_json({**told, "classes": names, "out": out, "rows": shown if out is None else len(shown)})
        return
    console().print(table(found.columns(), [tuple(map(str, row)) for row in shown[:20]]))
