"""`zoo eval`: measure a saved adapter or a backbone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoo.cli.common import console, numbers, print_json, table
from zoo.cli.options import (
    OUTPUT,
    BatchSize,
    Device,
    Json,
    LabelColumn,
    LabelKind,
    Precision,
    Pretrained,
    Quiet,
    SeedOfWeights,
    SkipBroken,
    Truncate,
    TrustBackbone,
    WhatFor,
    Workers,
    data_option,
)
from zoo.errors import ConfigError

if TYPE_CHECKING:
    from zoo.data import ImageDataset
    from zoo.model import Model
    from zoo.tasks import Task


def evaluate(
    target: Annotated[
        str, typer.Argument(help="A saved folder, a Hub repository, an embedded adapter, or a backbone.")
    ],
    data: Annotated[str, data_option("Test data: a folder of class folders, Parquet files, or hf:owner/name.")],
    split: Annotated[str | None, data_option("Split of --data, where it has several.")] = None,
    batch_size: BatchSize = 64,
    task: WhatFor = None,
    pretrained: Pretrained = True,
    seed: SeedOfWeights = 0,
    trust_backbone: TrustBackbone = False,
    precision: Precision = "fp32",
    device: Device = None,
    workers: Workers = None,
    skip_broken: SkipBroken = False,
    truncate: Truncate = False,
    labels: LabelKind = "auto",
    label_column: LabelColumn = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="Also each class.", rich_help_panel=OUTPUT)] = False,
    confusion: Annotated[
        Path | None,
        typer.Option(
            help="Draw which classes are taken for which, into this .png, .pdf or .svg.", rich_help_panel=OUTPUT
        ),
    ] = None,
    calibration: Annotated[
        bool,
        typer.Option(
            "--calibration",
            help="Also by how much confidence and accuracy differ (expected calibration error, 15 bins).",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    save: Annotated[
        bool, typer.Option("--save", help="Write the numbers into the folder's card.", rich_help_panel=OUTPUT)
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure a saved adapter, or a backbone with its own classifier.

    The backbone is built from the name in the folder, and the fingerprint of its weights is checked.

    \b
      zoo eval out/ --data photos/test
      zoo eval out/ --data 'cifar10/test-*.parquet' --save      # the card then says so
      zoo eval you/vit-b16-lora-photos --data photos/test --json
      zoo eval out/ --data photos/test --confusion cm.png --calibration
      zoo eval vit-micro --data cifar100/ --split test
    """
    import zoo
    from zoo.tasks import resolve

    model = load_target(target, pretrained, seed, trust_backbone)
    what = resolve(model, task)
    set_truncate(what, truncate)
    on_error: Any = "skip" if skip_broken else "raise"
    if what.head is not None:
        check_maps(what.name, None, labels, label_column)
        dataset = opened(what, model, data, split, on_error)
    elif what.on_head or what.labels == "numbers":
        dataset = _dataset(label_options(what, labels, label_column), model, data, split, on_error)
    else:
        dataset = opened(what, model, data, split, on_error)
    result = zoo.evaluate(
        model,
        dataset,
        record="test" if save else "",
        batch_size=batch_size,
        precision=precision,
        device=device,
        workers=workers,
        per_class=per_class,
        metrics=["calibration"] if calibration else None,
        confusion=False if confusion is None else confusion,
        progress=not (quiet or as_json),
        task=what,
    )
    if save:
        folder = Path(target).expanduser()
        if not folder.is_dir():
            raise ConfigError(
                f"--save writes into a folder, and '{target}' is none; pull it first: zoo pull {target} --out out/"
            )
        model.save_adapter(folder)
    if as_json:
        print_json({"target": target, "data": data, **result})
        return
    shown = {
        k.replace("images", what.items(model)): v for k, v in result.items() if k not in ("per_class", "confusion")
    }
    console().print(numbers(shown))
    if per_class and "per_class" not in result:
        raise ConfigError(f"--per-class: the task '{what.name}' measures nothing of single classes.")
    if per_class:
        classes = [(k, "-" if v is None else f"{v:.4f}") for k, v in result["per_class"].items()]
        console().print(table(["class", "accuracy"], classes, right=["accuracy"]))


def load_target(target: str, pretrained: bool = True, seed: int = 0, trust_backbone: bool = False) -> Model:
    """A saved adapter on its backbone, or a bare backbone with its classifier."""
    import zoo
    from zoo import registry
    from zoo.errors import UnknownNameError, nearest

    try:
        return zoo.load(adapter=target, pretrained=pretrained, seed=seed, trust_backbone=trust_backbone).eval()
    except ConfigError:
        if target in registry.list_adapters():
            raise ConfigError(
                f"'{target}' is a method, not a trained adapter; train one: zoo fit vit-b16 {target} ..."
            ) from None
        raise
    except UnknownNameError as error:
        if Path(target).expanduser().is_dir():  # it is there; what it names is not
            raise
        try:
            registry.find_backbone(target)
        except UnknownNameError:
            from zoo.sources import embedded_adapters

            known = [*embedded_adapters(), *registry.list_backbones()]
            raise UnknownNameError(f"There is no saved adapter '{target}'. {nearest(target, known)}") from error
        return zoo.load(target, pretrained=pretrained, seed=seed).eval()


def label_options(what: Task, labels: str, label_column: str | None) -> dict[str, Any]:
    """What a task wants of the labels, or what is asked for instead, for the family's `open_dataset`."""
    options: dict[str, Any] = {"labels": what.labels if labels == "auto" else labels}
    if label_column is not None:
        names = [name.strip() for name in label_column.split(",")]
        options["label_column"] = names if len(names) > 1 else names[0]
    return options


def set_truncate(what: Task, truncate: bool) -> None:
    """Have a task cut texts; raises ConfigError for one that reads none."""
    if truncate and not hasattr(what, "truncate"):
        raise ConfigError(f"--truncate cuts captions, and '{what.name}' reads none.")
    if truncate:
        what.truncate = True  # type: ignore[attr-defined]


def check_maps(task: str, shots: Any, labels: str, label_column: str | None) -> None:
    """Raise ConfigError for options of labels, where each item has a map."""
    given = {"--shots": shots, "--labels": None if labels == "auto" else labels, "--label-column": label_column}
    if wrong := [name for name, value in given.items() if value is not None]:
        raise ConfigError(f"{wrong[0]} is of items with labels; those of the task '{task}' have a map each.")


def opened(
    what: Task,
    model: Model,
    data: str,
    split: str | None,
    on_error: Any,
    train: bool = False,
    augment: str | None = None,
) -> ImageDataset:
    """The data of a task that is not to classify."""
    dataset = what.open(model, data, train=train, split=split, augment=augment)
    dataset.on_error = on_error
    return dataset


def _dataset(options: dict[str, Any], model: Model, data: str, split: str | None, on_error: Any) -> ImageDataset:
    """The data set; if it lacks some of the model's classes, with the model's labels."""
    open_dataset = model.family.open_dataset
    dataset = open_dataset(data, split=split, on_error=on_error, **options)
    names = model.classes
    if names and dataset.classes and dataset.classes != names and set(dataset.classes) <= set(names):
        return open_dataset(data, split=split, on_error=on_error, classes=names, **options)
    return dataset
