"""`zoo fit`, `zoo demo`: train, and see it all in a few minutes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from zoo.cli.common import console, count, print_json, rate, settings, size, table, weights
from zoo.cli.evaluate import check_maps, label_options, opened, set_truncate
from zoo.cli.options import (
    OUTPUT,
    Device,
    Json,
    LabelColumn,
    LabelKind,
    Precision,
    Quiet,
    SkipBroken,
    Truncate,
    WhatFor,
    Workers,
    data_option,
    model_option,
    training_option,
)
from zoo.cli.repeated import check_repeats, numbers_of, repeat_fit
from zoo.errors import ConfigError, DataError, SaveError

if TYPE_CHECKING:
    from zoo.adapters.base import Adapter
    from zoo.data import ImageDataset
    from zoo.model import Model


def fit(
    backbone: Annotated[str, typer.Argument(help="A short name such as vit-b16, or timm:<model>.")],
    adapters: Annotated[list[str], typer.Argument(help="Methods, or saved adapters to go on from.")],
    data: Annotated[str, data_option("Training data: a folder of class folders, Parquet files, or hf:owner/name.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the adapter and its report.", rich_help_panel=OUTPUT)
    ],
    val: Annotated[str | None, data_option("Validation data, on which the best epoch is chosen.")] = None,
    test: Annotated[str | None, data_option("Test data, measured once at the end, for the card.")] = None,
    split: Annotated[str | None, data_option("Split of --data, where it has several.")] = None,
    val_split: Annotated[str | None, data_option("Split of --val; without --val, of --data.")] = None,
    test_split: Annotated[str | None, data_option("Split of --test; without --test, of --data.")] = None,
    shots: Annotated[
        str | None,
        data_option("Train on so many items of every class; several, 1,2,4,8,16: each in turn, with three seeds."),
    ] = None,
    skip_broken: SkipBroken = False,
    truncate: Truncate = False,
    labels: LabelKind = "auto",
    label_column: LabelColumn = None,
    workers: Workers = None,
    setting: Annotated[
        list[str] | None,
        model_option("A method's setting, e.g. rank=4; with several methods lora.rank=4.", "--set", "-s"),
    ] = None,
    memory: Annotated[str, model_option("What is kept for the backward pass: default, low, min or off.")] = "default",
    quantise: Annotated[
        str | None, model_option("Keep the frozen projections in int8, int4 or nf4; needs less memory.")
    ] = None,
    pretrained: Annotated[bool, model_option("With the pretrained weights, or with random ones.")] = True,
    image_size: Annotated[
        int | None, model_option("Another size of images than the backbone's own.", "--image-size", "--img-size")
    ] = None,
    task: WhatFor = None,
    device: Device = None,
    precision: Precision = "fp32",
    epochs: Annotated[int, training_option("Passes over the training data.", "--epochs", "-e")] = 10,
    steps: Annotated[int | None, training_option("Optimizer steps in all, instead of epochs.")] = None,
    batch_size: Annotated[
        int | None, training_option("Samples of one optimizer step; default: 64, less of few.", "--batch-size", "-b")
    ] = None,
    lr: Annotated[
        str | None, training_option("Learning rate, or auto to search for one; by default the method's own.")
    ] = None,
    weight_decay: Annotated[float | None, training_option("Weight decay of matrices.")] = None,
    optimizer: Annotated[str, training_option("adamw, adam, sgd, nesterov or rmsprop.")] = "adamw",
    schedule: Annotated[str, training_option("cosine, linear or constant, after the warm-up.")] = "cosine",
    warmup: Annotated[float, training_option("Below 1 a part of all steps, else a number of steps.")] = 0.05,
    layer_decay: Annotated[
        float | None, training_option("Learning rate of a block: lr * this ** (blocks behind it).")
    ] = None,
    clip: Annotated[float, training_option("Largest norm of the gradient; 0 does not clip.")] = 1.0,
    accumulate: Annotated[int, training_option("Compute each batch in so many parts.")] = 1,
    loss: Annotated[str | None, training_option("focal, bce; of numbers mse, mae, huber.")] = None,
    class_weights: Annotated[str | None, training_option("balanced, or a=2,b=0.5 by class.")] = None,
    ema: Annotated[float | None, training_option("Measure and keep a moving average, 0.999 say.")] = None,
    metrics: Annotated[str | None, training_option("Further numbers, comma-separated: f1,top3.")] = None,
    monitor: Annotated[str | None, training_option("By which number the best epoch is chosen.")] = None,
    label_smoothing: Annotated[float, training_option("From 0 to below 1.")] = 0.0,
    mixup: Annotated[float, training_option("Alpha of mixup; 0 is off.")] = 0.0,
    cutmix: Annotated[float, training_option("Alpha of CutMix; 0 is off.")] = 0.0,
    balanced: Annotated[bool, training_option("Draw all classes equally often.", "--balanced")] = False,
    augment: Annotated[
        str | None, training_option("crop-flip, crop, none, +randaugment ...; of sounds mask, shift.")
    ] = None,
    patience: Annotated[int | None, training_option("Stop after so many epochs without improvement.")] = None,
    keep: Annotated[str | None, training_option("best or last; default: best if there are validation data.")] = None,
    cache_features: Annotated[
        bool, training_option("With linear or vqt: run the backbone once, and keep its features.", "--cache-features")
    ] = False,
    folds: Annotated[
        int | None, training_option("Train on k - 1 of so many parts, measure the other, for each.")
    ] = None,
    seeds: Annotated[str | None, training_option("Several runs, 0,1,2: mean and standard deviation.")] = None,
    seed: Annotated[int, training_option("Of initial values, order and augmentation.")] = 0,
    checkpoints: Annotated[
        Path | None,
        typer.Option(help="Write checkpoints here; the same command goes on from them.", rich_help_panel=OUTPUT),
    ] = None,
    resume_with: Annotated[
        str | None,
        typer.Option(
            help="Settings that may differ from the checkpoint's, comma-separated: lr,batch_size.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    logger: Annotated[
        list[str] | None, typer.Option(help="tensorboard, wandb, mlflow ...", rich_help_panel=OUTPUT)
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train adapters on images (or on what the backbone takes), and save them with their report and card.

    \b
      zoo fit vit-micro lora --data photos/train --out out/
      zoo fit vit-b16 lora --data photos/train --val photos/val -o out/
      zoo fit vit-b16 lora -s rank=4 -s targets=q,k,v,o --data photos -o out/
      zoo fit vit-b16 vpt lora -s lora.rank=4 --data photos --shots 16 -o out/
      zoo fit vit-b16 vpt -s init=out/ --data photos/train --test photos/test --shots 1,2,4,8,16 -o few/
      zoo fit swin-b spt --data hf:owner/name --split train -e 20 -o out/
      zoo fit vit-b16 out/ --data photos/more -o out2/     from a saved adapter
      zoo fit vit-b16 lora --data photos --lr auto --loss focal --class-weights balanced -o out/
      zoo fit vit-b16 lora --data photos -e 30 --checkpoints run/ -o out/     goes on from a finished run of 20
      zoo fit vit-b16 linear --data photos --cache-features --folds 5 --seeds 0,1,2 -o folds/
      zoo fit ast-micro lora --data sounds/ --split train -o out/
      zoo fit clip-vit-b32 lora --data captions/ --task contrast -o out/
      zoo fit swin-b lora --data street/ --split train --val-split val --task segment -o out/

    The folder can be measured (zoo eval), loaded (zoo.load(adapter="out/")), merged and pushed. On several GPUs:
    accelerate launch --module zoo.cli fit ...
    """
    import zoo
    from zoo import registry

    _check_free(out)
    cls, _ = registry.find_backbone(backbone)
    what = registry.task(task or ("classify" if cls.pools else cls.task))
    set_truncate(what, truncate)
    backbone_options: dict[str, Any] = {} if image_size is None else {"img_size": image_size}

    few = numbers_of("--shots", shots)
    repeats = folds is not None or seeds is not None or len(few) > 1
    tested = bool(test or test_split)
    several = check_repeats(folds, seeds, few, tested, checkpoints, resume_with) if repeats else []
    drawn = few if repeats and folds is None and few else None  # by each run, with its own seed

    def load(classes: int | None, seed: int = seed) -> Model:
        return zoo.load(
            backbone,
            adapter=_adapters(adapters, setting or []),
            num_classes=classes,
            head=what.head if classes else None,
            pretrained=pretrained,
            memory=memory,
            quantise=quantise,
            seed=seed,
            **backbone_options,
        )

    on_error: Any = "skip" if skip_broken else "raise"
    others = ((val, val_split), (test, test_split))
    classes: list[str] | None = None
    if what.head is not None:
        check_maps(what.name, shots, labels, label_column)
        train_set = what.source(data, split=split, on_error=on_error)
        classes = list(train_set.classes or ())
        val_set, test_set = (
            what.source(source or data, split=part, on_error=on_error, classes=classes) if source or part else None
            for source, part in others
        )
        outputs = len(classes)
        model: Model | None = None if repeats else load(_new_head(adapters, outputs))
    elif what.on_head or what.labels == "numbers":
        options: dict[str, Any] = {"seed": seed, "on_error": on_error, **label_options(what, labels, label_column)}
        train_set = cls.open_dataset(data, split=split, shots=few[0] if few and drawn is None else None, **options)
        outputs, classes = _outputs(train_set, data)
        val_set, test_set = (
            cls.open_dataset(source or data, split=part, classes=classes, **options) if source or part else None
            for source, part in others
        )
        model = None if repeats else load(_new_head(adapters, outputs))
    else:
        if repeats:
            raise ConfigError(f"--folds and --seeds are of tasks with a head, and '{what.name}' has none.")
        if shots is not None:
            raise ConfigError(f"--shots chooses items of every class, and '{what.name}' knows no classes.")
        model = load(what.head_width)
        train_set = opened(what, model, data, split, on_error, train=True, augment=augment)
        val_set, test_set = (
            opened(what, model, source or data, part, on_error) if source or part else None for source, part in others
        )
    show = not (quiet or as_json)
    chosen: dict[str, Any] = {
        "epochs": epochs,
        "steps": steps,
        "batch_size": batch_size,
        "lr": rate(lr),
        "loss": loss,
        "class_weights": weights(class_weights),
        "ema": ema,
        "metrics": _words(metrics),
        "monitor": monitor,
        "loggers": logger or None,
        "weight_decay": weight_decay,
        "optimizer": optimizer,
        "schedule": schedule,
        "warmup": warmup,
        "layer_decay": layer_decay,
        "clip": clip or None,
        "accumulate": accumulate,
        "precision": precision,
        "label_smoothing": label_smoothing,
        "mixup": mixup,
        "cutmix": cutmix,
        "augment": augment,
        "sampler": "balanced" if balanced else None,
        "patience": patience,
        "keep": keep,
        "workers": workers,
        "device": device,
        "progress": show,
        "task": what,
        "cache_features": cache_features,
    }
    if model is None:
        repeat_fit(
            lambda seed: load(_new_head(adapters, outputs), seed),
            *(train_set, val_set, test_set),
            folds=folds,
            seeds=several or [seed],
            shots=drawn,
            out=out,
            as_json=as_json,
            options=chosen,
        )
        return
    report = zoo.fit(
        model,
        train_set,
        val_set,
        resume=_words(resume_with) or True,
        out=out if logger else None,
        seed=seed,
        checkpoint=checkpoints,
        **chosen,
    )
    measured = None
    if test_set is not None:
        measured = zoo.evaluate(
            model,
            test_set,
            record="test",
            batch_size=batch_size or 64,
            metrics=_words(metrics),
            precision=precision,
            device=device,
            progress=show,
            task=what,
        )
    if int(os.environ.get("RANK", "0")):
        return  # one of several processes: the first one writes
    model.save_adapter(out)
    report.save(out)
    result = {
        "out": str(out),
        "backbone": model.backbone_name,
        "adapters": {name: cast("Adapter", a).config() for name, a in model.adapters.items()},
        "task": what.name,
        "classes": len(classes) if classes else None,
        "trained_parameters": model.num_parameters(trainable=True),
        "saved_bytes": model.record.get("saved_bytes"),
        "epochs": len(report.history),
        "steps": report.steps,
        "seconds": report.seconds,
        "metrics": report.metrics,
        "test": measured,
    }
    if as_json:
        print_json(result)
    else:
        _show_fit(result)


def _outputs(dataset: ImageDataset, data: str) -> tuple[int, list[str] | None]:
    """(outputs of the head, names of the classes): one for each class, or for each number of an item."""
    if dataset.classes:
        return len(dataset.classes), dataset.classes
    if dataset.targets is None:
        raise DataError(f"The classes of '{data}' are not known. Give it class folders or a label column with names.")
    return (1 if dataset.targets.ndim == 1 else dataset.targets.shape[1]), None


def _words(text: str | None) -> list[str] | None:
    return [word.strip().replace("-", "_") for word in text.split(",") if word.strip()] if text else None


def _show_fit(result: dict[str, Any]) -> None:
    rows = [("trained parameters", count(result["trained_parameters"]))]
    for level, value in (result["saved_bytes"] or {}).items():
        rows.append((f"kept for backward (memory={level})", size(value)))
    rows += [(k.replace("_", " "), f"{v:.4f}") for k, v in result["metrics"].items()]
    timings = ("seconds", "images_per_second")
    test = {k: v for k, v in (result["test"] or {}).items() if isinstance(v, float) and k not in timings}
    rows += [(f"test {k.replace('_', ' ')}", f"{v:.4f}") for k, v in test.items()]
    rows.append(("time", f"{result['seconds']:.0f} s, {result['steps']} steps"))
    out = console()
    out.print(table(["", ""], rows, right=[]))
    layers = ", layers.png" if (Path(result["out"]) / "layers.png").exists() else ""
    out.print(
        f"saved in {result['out']}: adapter_config.json, adapter_model.safetensors, README.md, report.json, curves.png{layers}"
    )


def _check_free(out: Path) -> None:
    """Training for an hour and failing to save is worse than failing now."""
    if out.exists() and not out.is_dir():
        raise SaveError(f"'{out}' is a file; name a folder to save into with --out.")
    there = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise SaveError(f"'{there}' cannot be written to; name another folder with --out.")


def _adapters(names: list[str], texts: list[str]) -> list[Any]:
    """Config objects for methods, names as they are for saved adapters."""
    from zoo import registry
    from zoo.starting import adapter

    known = registry.list_adapters()
    methods = [n for n in names if n in known]
    if doubles := {m for m in methods if methods.count(m) > 1}:
        raise ConfigError(
            f"'{doubles.pop()}' is named twice; attach the same method twice in Python (model.add_adapter)."
        )
    chosen = settings(texts, methods)
    return [adapter(n, **chosen[n]) if n in chosen else n for n in names]


def _new_head(names: list[str], classes: int) -> int | None:
    """The width of a new head; None keeps that of a saved adapter with as many classes."""
    from zoo import registry
    from zoo.disk.saved import read
    from zoo.sources import resolve

    saved = [resolve(n) for n in names if n not in registry.list_adapters()]
    return None if any(isinstance(s, Path) and read(s).num_classes == classes for s in saved) else classes


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the table, the picture and the adapter.")] = Path(
        "demo-out"
    ),
    epochs: Annotated[int, typer.Option("--epochs", "-e", help="Passes over the training images.")] = 12,
    methods: Annotated[str | None, typer.Option(help="Methods, comma-separated; default: all five.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """Train five methods side by side on real images: a few minutes on two CPU cores, offline.

    The backbone comes with the package, the images (handwritten digits) with scikit-learn. Prints a table and draws it,
    saves the best adapter, loads it in a fresh process to the same accuracy, merges it to the same logits, writes its card,
    and publishes it to a folder that stands for a Hub.

    \b
      zoo demo
      zoo demo --methods linear,lora --epochs 3 --out demo-out
    """
    from zoo.cli import demo as script
    from zoo.errors import UnknownNameError, nearest

    chosen = [m.strip() for m in methods.split(",") if m.strip()] if methods else None
    for name in chosen or []:
        if name not in script.METHODS:
            raise UnknownNameError(f"The demo has no method '{name}'. {nearest(name, script.METHODS)}")
    script.run(out, epochs=epochs, methods=chosen, progress=not quiet)
