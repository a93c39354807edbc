"""`zoo run`: train by a regime, a procedure of several fits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from zoo.cli.common import console, print_json, settings
from zoo.cli.options import OUTPUT, Device, Json, Precision, Quiet, Workers, data_option, model_option, training_option
from zoo.cli.run import _adapters, _check_free
from zoo.errors import ConfigError, DataError


def run(
    regime: Annotated[str, typer.Argument(help="A regime's name: supervised, lae, multitask ...")],
    backbone: Annotated[str, typer.Argument(help="A short name such as vit-b16, or timm:<model>.")],
    data: Annotated[list[str], data_option("Training data; several as name=source, one option for each.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for state, adapter, report.", rich_help_panel=OUTPUT)
    ],
    adapters: Annotated[
        list[str] | None,
        typer.Argument(help="Methods, or saved adapters to go on from; none if the regime attaches its own."),
    ] = None,
    test: Annotated[list[str] | None, data_option("Test data, as --data.")] = None,
    split: Annotated[str | None, data_option("Split of --data, where it has several.")] = None,
    test_split: Annotated[str | None, data_option("Split of --test; without --test, of --data.")] = None,
    shots: Annotated[int | None, data_option("Train on so many items of every class.")] = None,
    sessions: Annotated[int | None, data_option("Cut the data into so many sessions of disjoint classes.")] = None,
    workers: Workers = None,
    setting: Annotated[
        list[str] | None,
        model_option("A setting, e.g. rank=4 of the method, run.epochs=5 of the regime.", "--set", "-s"),
    ] = None,
    memory: Annotated[str, model_option("What is kept for the backward pass: default, low or min.")] = "default",
    quantise: Annotated[
        str | None, model_option("Keep the frozen projections in int8, int4 or nf4; needs less memory.")
    ] = None,
    pretrained: Annotated[bool, model_option("With the pretrained weights, or with random ones.")] = True,
    device: Device = None,
    precision: Precision = "fp32",
    batch_size: Annotated[int | None, training_option("Samples of one optimizer step.", "--batch-size", "-b")] = None,
    seed: Annotated[int, training_option("Of everything that is random.")] = 0,
    anew: Annotated[bool, training_option("Begin anew, even if --out holds this run.", "--anew")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train by a regime; the same command goes on where a killed one was.

    \b
      zoo run supervised vit-micro lora --data photos/train --test photos/test -o run/
      zoo run supervised vit-micro lora -s run.epochs=3 -s rank=4 --data photos -o run/
      zoo run lae vit-micro -s run.form=prefix --data photos/train --test photos/test --sessions 5 -o run/
      zoo run curr-reft vlm-micro lora -s run.lr=1e-4 --data exercises/ --test exercises/ --test-split test -o run/

    The folder then holds the adapter (zoo eval, zoo.load), report.json, report.md and report.png, and in backbone/ the
    backbone, if the regime has changed it.
    """
    import zoo
    from zoo import registry
    from zoo.data import by_class, few_shot

    _check_free(out)
    cls, _ = registry.find_backbone(backbone)
    texts = setting or []
    chosen = settings([t.removeprefix("run.") for t in texts if t.startswith("run.")], ["run"])["run"]
    procedure = registry.regime(regime, **{"seed": seed, **chosen})

    if procedure.opens and (shots is not None or sessions is not None):
        raise ConfigError(f"--shots and --sessions cut data by classes; those of '{regime}' have none.")

    def opened(sources: list[str], part: str | None, classes: Any = None) -> Any:
        found: dict[str, Any] = {}
        for number, text in enumerate(sources):
            name, equals, source = text.partition("=")
            key, source = (name, source) if equals else (f"data-{number}" if len(sources) > 1 else "", text)
            if key in found:
                raise ConfigError(f"--data names '{key}' twice.")
            if procedure.opens:
                found[key] = procedure.read(source, part)
                continue
            found[key] = cls.open_dataset(source, split=part, classes=classes)
            if not found[key].classes:
                raise DataError(f"The classes of '{source}' are not known. Give it class folders or names of labels.")
        return found

    train = opened(data, split)
    measured = opened(test or data, test_split) if test or test_split else None
    if shots is not None:
        train = {name: few_shot(part, shots, seed) for name, part in train.items()}
    single = next(iter(train.values())) if list(train) == [""] else None
    given: Any = train if single is None else single
    tested: Any = measured if single is None or measured is None else next(iter(measured.values()))
    if sessions is not None:
        if single is None:
            raise ConfigError("--sessions cuts one data set; give one --data without a name.")
        given = by_class(single, sessions)
        tested = None if tested is None else by_class(tested, sessions)
    width: int | None = len(single.classes) if single is not None and procedure.needs_head and sessions is None else 0
    if procedure.opens:
        width = None
    model = zoo.load(
        backbone,
        adapter=_adapters(adapters or [], [t for t in texts if not t.startswith("run.")]),
        num_classes=width,
        pretrained=pretrained,
        memory=memory,
        quantise=quantise,
        seed=seed,
    )
    options: dict[str, Any] = {"workers": workers, "device": device, "precision": precision}
    options["progress"] = not (quiet or as_json)
    if batch_size is not None:
        options["batch_size"] = batch_size
    report = zoo.run(model, procedure, given, tested, out=out, resume=not anew, fit=options)
    if int(os.environ.get("RANK", "0")):
        return  # one of several processes: the first one writes
    made = report.model
    made.save_adapter(out)
    if made is not model:  # a backbone of its own, which no name stands for
        zoo.save_backbone(made, out / "backbone")
    if as_json:
        print_json({"out": str(out), "regime": regime, "settings": procedure.config(), "summary": report.summary})
    else:
        console().print(report.table())
        console().print(str(report))
        console().print(f"saved in {out}: the adapter, report.json, report.md, report.png")
