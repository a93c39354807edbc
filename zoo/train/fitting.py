"""`fit`: train the adapters and the head of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.arguments import DEVICE, FLAG, FUNCTION, NAMES, NOTHING, PATH, TEXT, typed, whole
from zoo.data.dataset import ImageDataset
from zoo.data.joined import matched
from zoo.data.labels import bare
from zoo.data.sampling import split_train_val
from zoo.data.seeds import kept_generators
from zoo.engine.sharded import refuse
from zoo.errors import ConfigError
from zoo.heads.names import check_texts
from zoo.tasks import Classify, Task, Weighted, call, objective, of_classes
from zoo.tasks.metrics import named_metrics
from zoo.train.evaluation import (
    METRICS,
    MODEL,
    TASK,
    WEIGHTS,
    WORKERS,
    autocast,
    input_dtype,
    split_of,
    supplied,
    to_device,
)
from zoo.train.failing import Before
from zoo.train.features import Kept, check_still
from zoo.train.hooks import HOOKS
from zoo.train.loggers import LOGGERS, Logger, make_loggers
from zoo.train.optimizers import MakeOptimizer
from zoo.train.processes import Processes
from zoo.train.progress import Progress
from zoo.train.rates import default_batch_size
from zoo.train.report import Report, report_of
from zoo.train.samplers import as_sampler
from zoo.train.settings import KINDS, Settings
from zoo.train.streams import Stream
from zoo.train.trainer import Trainer

if TYPE_CHECKING:
    from zoo.model import Model

__all__ = ["fit"]


@typed(
    **{
        name: kind for name, kind in KINDS.items() if name not in ("keep", "monitor", "optimizer_options", "batch_size")
    },
    batch_size=KINDS["batch_size"] | NOTHING,
    model=MODEL,
    task=TASK | NOTHING,
    loss=FUNCTION | TEXT | NOTHING,
    class_weights=WEIGHTS | NOTHING,
    optimizer_options=KINDS["optimizer_options"] | NOTHING,
    monitor=KINDS["monitor"] | NOTHING,
    keep=KINDS["keep"] | NOTHING,
    checkpoint=PATH | NOTHING,
    checkpoint_every=whole(1) | NOTHING,
    metrics=METRICS | NOTHING,
    resume=FLAG | NAMES,
    out=PATH | NOTHING,
    workers=WORKERS,
    device=DEVICE | NOTHING,
    progress=FLAG,
    loggers=LOGGERS | NOTHING,
)
def fit(
    model: Model,
    train: Any,
    val: Any = None,
    *,
    epochs: int = 10,
    steps: int | None = None,
    batch_size: int | None = None,
    lr: float | Mapping[str, float] | str | None = None,
    weight_decay: float | None = None,
    optimizer: str | MakeOptimizer = "adamw",
    optimizer_options: Mapping[str, Any] | None = None,
    schedule: str = "cosine",
    warmup: float = 0.05,
    layer_decay: float | None = None,
    clip: float | None = 1.0,
    accumulate: int = 1,
    precision: str = "fp32",
    task: str | Task | None = None,
    loss: str | Callable[[Any, Any], Tensor] | None = None,
    class_weights: str | Sequence[float] | Mapping[str, float] | None = None,
    label_smoothing: float = 0.0,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    augment: Any = None,
    seed: int = 0,
    patience: int | None = None,
    metrics: Mapping[str, Any] | Sequence[str] | None = None,
    monitor: str | None = None,
    keep: str | None = None,
    val_fraction: float = 0.1,
    drop_last: bool = False,
    ema: float | None = None,
    sampler: Any = None,
    cache_features: bool | int = False,
    streams: Mapping[str, Any] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool | Sequence[str] = True,
    out: str | Path | None = None,
    workers: int | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
    loggers: Any = None,
    callbacks: Sequence[Any] = (),
) -> Report:
    """Train what `model.parameters_to_train()` lists; the backbone stays frozen, in eval mode.

    The numbers depend on the arguments alone, not on the number of processes (`accelerate launch`), of workers, or of parts,
    up to the rounding of sums (only a calibration sees batches of `batch_size / accumulate`). The caller's random generators are
    left as they were.

    Args:
        train, val: what `zoo.open_dataset` takes, or a data set of it. Without a transform of its own it gets the
            backbone's preprocessing. Never give a test split as `val`: the best epoch is chosen on it.
        epochs: passes over `train`; `steps` (optimizer steps in all) overrides it.
        batch_size: images of one optimizer step, over all processes and accumulated parts together; by default 64, less of less
            than a thousand (`zoo.train.rates`).
        lr: learning rate of all, or {"lora": 1e-3, "head": 1e-2, "lora/blocks.0.*": 1e-4} by adapter, head or pattern (the last
            that fits counts; "default" for the rest). By default the `default_lr` of each adapter, more over few steps; "auto"
            searches for one (`zoo.train.rates`).
        weight_decay: of matrices; biases, norms and other vectors have none. By default 0.01, or the adapter's own.
        optimizer: "adamw", "adam", "sgd", "nesterov", "rmsprop", or a function from param groups to a torch
            optimizer (its learning rate is overwritten by `lr` and `schedule`).
        optimizer_options: its further arguments, such as {"betas": (0.9, 0.95)}.
        schedule: "cosine", "linear" or "constant", after `warmup` (below 1 a part of all steps, else steps).
        layer_decay: learning rate of a block = lr * layer_decay ** (blocks behind it).
        clip: largest norm of the whole gradient; None does not clip.
        accumulate: compute a batch in so many parts, for less memory.
        precision: "fp32", "bf16" or "fp16" (autocast; trained weights stay in their own precision).
        task: what to train for (`zoo.tasks`): by default to classify if the model has a head, else what its family is for.
        loss: by name ("focal"; `zoo.tasks.losses`), or (outputs, targets) -> mean loss. On data of classes that the head has it
            is a classification by that loss, with its accuracy; on others the whole task.
        class_weights: "balanced", one for each class, or {"rare": 5.0} by name: how much an item of a class counts in training.
        label_smoothing: of the classification's cross-entropy.
        mixup, cutmix: alpha of their beta distributions; 0 is off.
        augment: of the default preprocessing in training: "crop-flip", "crop" or "none", and policies by name, such as
            "crop+randaugment+erasing" or timm's "rand-m9-mstd0.5-inc1" (`zoo.data.augment`); or a function of an image.
        patience: stop after so many epochs without a better `monitor`.
        metrics: what is measured on `val` besides, as `zoo.evaluate` takes it: names, or names with objects of torchmetrics.
        monitor: "accuracy", "loss" or another number of `zoo.evaluate`, one of `metrics` too; by default the task's. Less is
            better of losses, errors and metrics that say so, and of "-name".
        keep: "best" or "last" weights; by default best if there is `val` or `patience`.
        val_fraction: if the best is wanted and `val` is None, this part of `train` is set aside (stratified) to choose on.
        drop_last: leave out a last batch that is not full.
        ema: 0.999, say: the model is measured, chosen and left with a moving average of what is trained (`zoo.train.ema`).
        sampler: which items make a batch, instead of a shuffle: one of `zoo.train.samplers`, "balanced" (all classes equally
            often), or a sampler of torch over the items of `train`.
        cache_features: where only a head or queries are trained, run the backbone once for each item and keep what it gives, in
            at most 4 GiB or as many bytes as are given; without augmentation, and to the same numbers (`zoo.train.features`).
        streams: further data beside the training data, by name, for methods and tasks that want a batch of it in a step
            (`optimizer.stream("replay")`): what `zoo.open_dataset` takes, or a `zoo.train.Stream` of it. A stream that ends
            begins again, in another order, or is refused beforehand (`Stream(..., ends="refuse")`).
        checkpoint: folder for checkpoints, written after every epoch and every `checkpoint_every` steps. If it holds one
            of the same run and `resume` is true, training goes on from there, to exactly the numbers of an unbroken run; beyond
            the end of a finished one if more epochs (or steps) are asked for. Another run is refused, naming what differs.
        resume: False begins anew; names of settings that may differ from the checkpoint's, such as ["lr", "batch_size"], are a
            change on the way (`zoo.train.resuming`).
        out: folder for report.json, curves.png and, of methods whose layers change, layers.png.
        workers: processes that load images; by default none beside a CPU model, up to 8 beside a GPU.
        device: by default where the model is if that is a GPU, else what accelerate chooses.
        loggers: "tensorboard", "wandb", "mlflow" ..., or trackers of accelerate (`zoo.train.loggers`); files go to `out`.
        callbacks: objects with any of the hooks of `zoo.train.Hooks`, or functions that are called with each epoch's record.

    Returns:
        The report; the model holds the chosen weights and is in eval mode, and `model.record` describes the run.

    Raises:
        ConfigError: a setting is out of range, nothing is to be trained, or the checkpoint is of another run.
        DataError, MismatchError: data that cannot be read, or whose classes are not those of the model.
        TrainingError: the loss became NaN or infinite.
    """
    refuse(
        model,
        ConfigError,
        "zoo.fit trains with DDP",
        "Use a loop of your own with zoo.training_hooks, or do not shard it.",
    )
    what = objective(model, task, loss, class_weights)
    keep = keep or ("best" if val is not None or patience is not None else "last")
    sampler = as_sampler(sampler)
    settings = Settings(
        epochs=epochs,
        steps=steps,
        batch_size=max(64, accumulate) if batch_size is None else batch_size,
        lr=lr,
        weight_decay=weight_decay,
        optimizer=optimizer,
        optimizer_options=dict(optimizer_options or {}),
        schedule=schedule,
        warmup=warmup,
        layer_decay=layer_decay,
        clip=clip,
        accumulate=accumulate,
        precision=precision,
        label_smoothing=label_smoothing,
        mixup=mixup,
        cutmix=cutmix,
        augment=augment,
        seed=seed,
        patience=patience,
        monitor=monitor or what.monitor,
        keep=keep,
        val_fraction=val_fraction,
        drop_last=drop_last,
        sampler=sampler,
        ema=ema,
        cache_features=cache_features,
    )
    _check_given(streams, callbacks)
    for name, place in (("out", out), ("checkpoint", checkpoint)):
        if place is not None and (file := next((p for p in (Path(place), *Path(place).parents) if p.is_file()), None)):
            raise ConfigError(
                f"{name} is '{place}', and '{file}' is a file; expected a folder, which is made if need be."
            )
    if half := [n for n, p in model.parameters_to_train().items() if p.dtype == torch.float16]:
        raise ConfigError(
            f"'{half[0]}' and others to be trained are float16, too coarse to add small steps to. Load the model in float32 and "
            "train with precision='fp16' or 'bf16'."
        )
    if loose := [n for n, p in model.backbone.named_parameters() if p.requires_grad]:
        raise ConfigError(
            f"'{loose[0]}' and {len(loose) - 1} more parameters of the backbone require gradients, and zoo.fit trains adapters "
            "and heads: they would neither be trained nor saved. Add the adapter 'full', 'norm' or 'bitfit', which train the "
            "backbone's own parameters, or freeze it again: model.backbone.requires_grad_(False)."
        )
    if precision == "fp32" and next(model.backbone.parameters()).dtype == torch.float16:
        raise ConfigError(
            "The backbone is float16, too coarse for small gradients on their way through it. Train with precision='fp16', which "
            "scales the loss, or load the model in float32 or bfloat16."
        )
    train_set = what.open(model, train, train=True, augment=augment)
    if (classification := of_classes(what, model, train_set)) is not what:
        what, settings.monitor = classification, monitor or classification.monitor
        train_set = what.open(model, train, train=True, augment=augment)
    val_set = what.open(model, val, train=False) if val is not None else None
    plain = None  # the transform of what is set aside
    if getattr(train, "transform", None) is None and train_set.transform is not None:
        plain = what.open(model, train_set.with_transform(None), train=False).transform
    if cache_features:
        check_still(model, what, settings, streams, callbacks)
        if augment is None and plain is not None:
            train_set = train_set.with_transform(plain)
    if val_set is None and (patience is not None or keep == "best"):
        train_set, val_set = split_train_val(train_set, val_fraction, seed)
        val_set = val_set.with_transform(plain or val_set.transform)
    if monitor is not None and val_set is None:
        raise ConfigError(
            f"monitor is '{monitor}', and there is no validation data to measure it on. Pass val=..., or keep='best', which sets "
            "a part of the training data aside (val_fraction); or leave monitor out."
        )
    if batch_size is None:
        settings.batch_size = max(accumulate, default_batch_size(len(train_set)))
    what.check(model, train_set, "training data")
    check_texts(train_set.classes or ())
    if isinstance(what, Weighted):
        what.weigh(model, train_set)
    if val_set is not None:
        val_set = matched(val_set, train_set.classes)
        what.check(model, val_set, "validation data")
        if isinstance(what, Classify):
            _same_classes(train_set, val_set)
    further = {name: Stream.of(data).open(name, model, what, augment) for name, data in (streams or {}).items()}
    processes = Processes(device, model)
    folder = Path(checkpoint) if checkpoint is not None else None
    before = Before(model, folder)
    try:
        told = make_loggers(loggers, Path(out) if out is not None else folder) if processes.main else []
        with kept_generators(), Progress(progress and processes.main, processes.main) as bar, _ended(told):
            kept = None
            if cache_features:
                kept = Kept(
                    *(model, what, train_set, val_set, settings, processes),
                    workers=workers,
                    bar=bar,
                    limit=cache_features,
                )
            trainer = Trainer(
                model,
                *((train_set, val_set) if kept is None else kept.sets),
                settings,
                processes,
                task=what if kept is None else kept.task,
                workers=workers,
                folder=folder,
                every=checkpoint_every,
                callbacks=callbacks,
                bar=bar,
                streams=further,
                metrics=named_metrics(metrics, model.num_classes),
                before=before,
                loggers=told,
                plain=plain if kept is None else None,
            )
            trainer.prepare(resume)
            for logger in told:
                logger.begin(
                    {**settings.to_json(), "backbone": model.backbone_name, "adapters": ", ".join(model.active)}
                )
            trainer.fit()
            if train_set.classes is not None and what.on_head and not (model.classes and bare(train_set.classes)):
                model.take_names(train_set.classes)
            report = report_of(trainer)
            if kept is not None:
                kept.close(trainer, report)
    except BaseException as error:
        before.settle(error)
        raise
    _record(model, report, trainer)
    if out is not None and processes.main:
        report.save(out)
    return report


@contextmanager
def _ended(loggers: Sequence[Logger]) -> Iterator[None]:
    try:
        yield
    finally:
        for logger in loggers:
            logger.end()


def _same_classes(train: ImageDataset, val: ImageDataset) -> None:
    if train.classes is not None and val.classes is not None and train.classes != val.classes:
        if len(train.classes) != len(val.classes):
            raise ConfigError(
                f"The training data has {len(train.classes)} classes, the validation data {len(val.classes)}. Open the second "
                "with classes=<the first>.classes."
            )
        first = next(i for i, (a, b) in enumerate(zip(train.classes, val.classes, strict=True)) if a != b)
        raise ConfigError(
            f"Class {first} is '{train.classes[first]}' in the training data, '{val.classes[first]}' in the validation data. "
            "Open the second with classes=<the first>.classes."
        )


def _record(model: Model, report: Report, trainer: Trainer) -> None:
    """Fill `model.record`, from which cards are made (`zoo.disk.cards` lists its keys)."""
    record, processes = model.record, trainer.processes
    if trainer.task.hub is not None or isinstance(trainer.task, Classify):
        record["task"] = trainer.task.hub or model.family.hub_task(model.num_classes)
    if trainer.task.name:
        record["trained_for"] = trainer.task.name
    name = trainer.train.name
    split = split_of(name)
    record["data"] = {**(record.get("data") or {}), "name": name[: -len(split) - 1] if split else name}
    record["data"]["train"] = len(trainer.train)
    if trainer.val is not None:
        record["data"]["val"] = len(trainer.val)
    numbers = {k[4:]: v for k, v in report.metrics.items() if k.startswith("val_") and math.isfinite(v)}
    record["metrics"] = {"val": numbers} if numbers else {}
    record["hyperparameters"] = {
        k: v for k, v in report.settings.items() if v is not None and v != {} and isinstance(v, (int, float, str, dict))
    }
    record["seconds"] = round(report.seconds, 2)
    record["device"] = (
        torch.cuda.get_device_name(processes.device) if processes.device.type == "cuda" else processes.device.type
    )
    record.pop("saved_bytes", None)
    if hasattr(model, "saved_bytes") and trainer.plan.parts * processes.world == 1:
        for batch in trainer.first_batch():
            inputs = to_device(batch.inputs, processes.device, input_dtype(model, trainer.settings.precision))
            targets = to_device(batch.targets, processes.device)
            given = supplied(model, trainer.task, inputs, targets, training=True)
            inputs = trainer.task.example(model, inputs, targets)
            with autocast(processes.device, trainer.settings.precision), given:
                record["saved_bytes"] = {getattr(model, "memory", "default"): call(model.saved_bytes, inputs)}


def _check_given(streams: Any, callbacks: Any) -> None:
    """Raise ConfigError for what is no dict of data, and no list of callbacks."""
    if streams is not None and not isinstance(streams, Mapping):
        raise ConfigError(f"streams is a {type(streams).__name__}; expected data by name, {{'replay': ...}}.")
    if not isinstance(callbacks, (list, tuple)):
        raise ConfigError(f"callbacks is a {type(callbacks).__name__}; expected a list.")
    for callback in callbacks:
        if not callable(callback) and not any(hasattr(callback, hook) for hook in HOOKS):
            raise ConfigError(
                f"the callback {callback!r} is neither a function nor has it one of the methods {', '.join(HOOKS)}."
            )
