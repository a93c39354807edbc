"""`zoo fit`, `zoo eval`, `zoo demo`: train, measure, and see it all in a few minutes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from zoo.cli.common import JSON_HELP, console, count, print_json, settings, size, table
from zoo.errors import ConfigError, DataError, SaveError

if TYPE_CHECKING:
    from zoo.adapter_base import Adapter
    from zoo.data import ImageDataset
    from zoo.model import Model

DATA, TRAINING, MODEL, OUTPUT = "Data", "Training", "Model", "Output"

Json = Annotated[bool, typer.Option("--json", help=JSON_HELP, rich_help_panel=OUTPUT)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.", rich_help_panel=OUTPUT)]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default: the best there is.", rich_help_panel=MODEL)
]
Precision = Annotated[str, typer.Option(help="fp32, bf16 or fp16.", rich_help_panel=MODEL)]
Workers = Annotated[int | None, typer.Option(help="Processes that load images.", rich_help_panel=DATA)]
SkipBroken = Annotated[
    bool, typer.Option("--skip-broken", help="Go on without images that cannot be read.", rich_help_panel=DATA)
]


def _data(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel=DATA)


def _training(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=TRAINING)


def _model(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=MODEL)


def fit(
    backbone: Annotated[str, typer.Argument(help="A short name such as vit-b16, or timm:<model>.")],
    adapters: Annotated[list[str], typer.Argument(help="Methods, or saved adapters to go on from.")],
    data: Annotated[str, _data("Training images: a folder of class folders, Parquet files, or hf:owner/name.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the adapter and its report.", rich_help_panel=OUTPUT)
    ],
    val: Annotated[str | None, _data("Validation images, on which the best epoch is chosen.")] = None,
    test: Annotated[str | None, _data("Test images, measured once at the end, for the card.")] = None,
    split: Annotated[str | None, _data("Split of --data, where it has several.")] = None,
    val_split: Annotated[str | None, _data("Split of --val; without --val, of --data.")] = None,
    test_split: Annotated[str | None, _data("Split of --test; without --test, of --data.")] = None,
    shots: Annotated[int | None, _data("Train on so many images of every class.")] = None,
    skip_broken: SkipBroken = False,
    workers: Workers = None,
    setting: Annotated[
        list[str] | None, _model("A method's setting, e.g. rank=4; with several methods lora.rank=4.", "--set", "-s")
    ] = None,
    memory: Annotated[str, _model("What is kept for the backward pass: default, low or min.")] = "default",
    pretrained: Annotated[bool, _model("With the pretrained weights, or with random ones.")] = True,
    image_size: Annotated[int | None, _model("Another image size than the backbone's own (ViT).")] = None,
    device: Device = None,
    precision: Precision = "fp32",
    epochs: Annotated[int, _training("Passes over the training images.", "--epochs", "-e")] = 10,
    steps: Annotated[int | None, _training("Optimizer steps in all, instead of epochs.")] = None,
    batch_size: Annotated[int, _training("Images of one optimizer step.", "--batch-size", "-b")] = 64,
    lr: Annotated[float | None, _training("Learning rate; by default the method's own.")] = None,
    weight_decay: Annotated[float | None, _training("Weight decay of matrices.")] = None,
    optimizer: Annotated[str, _training("adamw, adam, sgd, nesterov or rmsprop.")] = "adamw",
    schedule: Annotated[str, _training("cosine, linear or constant, after the warm-up.")] = "cosine",
    warmup: Annotated[float, _training("Below 1 a part of all steps, else a number of steps.")] = 0.05,
    layer_decay: Annotated[
        float | None, _training("Learning rate of a block: lr * this ** (blocks behind it).")
    ] = None,
    clip: Annotated[float, _training("Largest norm of the gradient; 0 does not clip.")] = 1.0,
    accumulate: Annotated[int, _training("Compute each batch in so many parts.")] = 1,
    label_smoothing: Annotated[float, _training("From 0 to below 1.")] = 0.0,
    mixup: Annotated[float, _training("Alpha of mixup; 0 is off.")] = 0.0,
    cutmix: Annotated[float, _training("Alpha of CutMix; 0 is off.")] = 0.0,
    augment: Annotated[str | None, _training("crop-flip, crop or none.")] = None,
    patience: Annotated[int | None, _training("Stop after so many epochs without improvement.")] = None,
    keep: Annotated[str | None, _training("best or last; default: best if there are validation images.")] = None,
    seed: Annotated[int, _training("Of initial values, order and augmentation.")] = 0,
    checkpoints: Annotated[
        Path | None,
        typer.Option(help="Write checkpoints here; the same command goes on from them.", rich_help_panel=OUTPUT),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train adapters on images, and save them with their report and card.

    \b
      zoo fit vit-micro lora --data photos/train --out out/
      zoo fit vit-b16 lora --data photos/train --val photos/val -o out/
      zoo fit vit-b16 lora -s rank=4 -s targets=q,k,v,o --data photos -o out/
      zoo fit vit-b16 vpt lora -s lora.rank=4 --data photos --shots 16 -o out/
      zoo fit swin-b spt --data hf:owner/name --split train -e 20 -o out/
      zoo fit vit-b16 out/ --data photos/more -o out2/     from a saved adapter

    The folder can be measured (zoo eval), loaded (zoo.load(adapter="out/")), merged and pushed. On several GPUs:
    accelerate launch --module zoo.cli fit ...
    """
    import zoo
    from zoo.data import open_dataset

    _check_free(out)
    on_error: Any = "skip" if skip_broken else "raise"
    options: dict[str, Any] = {"seed": seed, "on_error": on_error}
    train_set = open_dataset(data, split=split, shots=shots, **options)
    classes = train_set.classes
    if not classes:
        raise DataError(f"The classes of '{data}' are not known. Give it class folders or a label column with names.")
    val_set, test_set = (
        open_dataset(source or data, split=part, classes=classes, **options) if source or part else None
        for source, part in ((val, val_split), (test, test_split))
    )
    backbone_options: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    model = zoo.load(
        backbone,
        adapter=_adapters(adapters, setting or []),
        num_classes=_new_head(adapters, len(classes)),
        pretrained=pretrained,
        memory=memory,
        seed=seed,
        **backbone_options,
    )
    show = not (quiet or as_json)
    report = zoo.fit(
        model,
        train_set,
        val_set,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        optimizer=optimizer,
        schedule=schedule,
        warmup=warmup,
        layer_decay=layer_decay,
        clip=clip or None,
        accumulate=accumulate,
        precision=precision,
        label_smoothing=label_smoothing,
        mixup=mixup,
        cutmix=cutmix,
        augment=augment,
        patience=patience,
        keep=keep,
        seed=seed,
        workers=workers,
        device=device,
        checkpoint=checkpoints,
        progress=show,
    )
    measured = None
    if test_set is not None:
        measured = zoo.evaluate(
            model, test_set, record="test", batch_size=batch_size, precision=precision, device=device, progress=show
        )
    if int(os.environ.get("RANK", "0")):
        return  # one of several processes: the first one writes
    model.save_adapter(out)
    report.save(out)
    result = {
        "out": str(out),
        "backbone": model.backbone_name,
        "adapters": {name: cast("Adapter", a).config() for name, a in model.adapters.items()},
        "classes": len(classes),
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


def _show_fit(result: dict[str, Any]) -> None:
    rows = [("trained parameters", count(result["trained_parameters"]))]
    for level, value in (result["saved_bytes"] or {}).items():
        rows.append((f"kept for backward (memory={level})", size(value)))
    rows += [(k.replace("_", " "), f"{v:.4f}") for k, v in result["metrics"].items()]
    rows += [(f"test {k}", f"{v:.4f}") for k, v in (result["test"] or {}).items() if k in ("accuracy", "top5", "loss")]
    rows.append(("time", f"{result['seconds']:.0f} s, {result['steps']} steps"))
    out = console()
    out.print(table(["", ""], rows, right=[]))
    out.print(
        f"saved in {result['out']}: adapter_config.json, adapter_model.safetensors, README.md, report.json, curves.png"
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

    known = registry.list_adapters()
    methods = [n for n in names if n in known]
    if doubles := {m for m in methods if methods.count(m) > 1}:
        raise ConfigError(
            f"'{doubles.pop()}' is named twice; attach the same method twice in Python (model.add_adapter)."
        )
    chosen = settings(texts, methods)
    return [registry.adapter(n, **chosen[n]) if n in chosen else n for n in names]


def _new_head(names: list[str], classes: int) -> int | None:
    """The width of a new head; None keeps that of a saved adapter with as many classes."""
    from zoo import registry
    from zoo.loading import _resolve
    from zoo.saved import read

    saved = [_resolve(n) for n in names if n not in registry.list_adapters()]
    return None if any(isinstance(s, Path) and read(s).num_classes == classes for s in saved) else classes


def evaluate(
    target: Annotated[
        str, typer.Argument(help="A saved folder, a Hub repository, an embedded adapter, or a backbone.")
    ],
    data: Annotated[str, _data("Images: a folder of class folders, Parquet files, or hf:owner/name.")],
    split: Annotated[str | None, _data("Split of --data, where it has several.")] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "-b", help="Images in a batch.", rich_help_panel=MODEL)
    ] = 64,
    precision: Precision = "fp32",
    device: Device = None,
    workers: Workers = None,
    skip_broken: SkipBroken = False,
    per_class: Annotated[bool, typer.Option("--per-class", help="Also each class.", rich_help_panel=OUTPUT)] = False,
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
      zoo eval vit-micro --data cifar100/ --split test
    """
    import zoo

    model = _load(target)
    dataset = _dataset(model, data, split, "skip" if skip_broken else "raise")
    result = zoo.evaluate(
        model,
        dataset,
        record="test" if save else "",
        batch_size=batch_size,
        precision=precision,
        device=device,
        workers=workers,
        per_class=per_class,
        progress=not (quiet or as_json),
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
    rows = [
        (k.replace("_", " "), f"{v:.4f}" if isinstance(v, float) else v) for k, v in result.items() if k != "per_class"
    ]
    console().print(table(["", ""], rows))
    if per_class:
        shown = [(k, "-" if v is None else f"{v:.4f}") for k, v in result["per_class"].items()]
        console().print(table(["class", "accuracy"], shown, right=["accuracy"]))


def _load(target: str) -> Model:
    """A saved adapter on its backbone, or a bare backbone with its classifier."""
    import zoo
    from zoo import registry
    from zoo.errors import UnknownNameError, nearest

    try:
        return zoo.load(adapter=target).eval()
    except ConfigError:
        if target in registry.list_adapters():
            raise ConfigError(
                f"'{target}' is a method, not a trained adapter; train one: zoo fit vit-b16 {target} ..."
            ) from None
        raise
    except UnknownNameError as error:
        try:
            registry.find_backbone(target)
        except UnknownNameError:
            from zoo.loading import embedded_adapters

            known = [*embedded_adapters(), *registry.list_backbones()]
            raise UnknownNameError(f"There is no saved adapter '{target}'. {nearest(target, known)}") from error
        return zoo.load(target).eval()


def _dataset(model: Model, data: str, split: str | None, on_error: Any) -> ImageDataset:
    """The data set; if it lacks some of the model's classes, with the model's labels."""
    from zoo.data import open_dataset

    dataset = open_dataset(data, split=split, on_error=on_error)
    names = model.classes
    if names and dataset.classes and dataset.classes != names and set(dataset.classes) <= set(names):
        return open_dataset(data, split=split, on_error=on_error, classes=names)
    return dataset


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the table, the picture and the adapter.")] = Path(
        "demo-out"
    ),
    epochs: Annotated[int, typer.Option("--epochs", "-e", min=1, help="Passes over the training images.")] = 12,
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
    from zoo import demo as script
    from zoo.errors import UnknownNameError, nearest

    chosen = [m.strip() for m in methods.split(",") if m.strip()] if methods else None
    for name in chosen or []:
        if name not in script.METHODS:
            raise UnknownNameError(f"The demo has no method '{name}'. {nearest(name, script.METHODS)}")
    script.run(out, epochs=epochs, methods=chosen, progress=not quiet)
