"""`evaluate`: accuracy, loss and further metrics of a model on a data set."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.arguments import (
    DEVICE,
    FLAG,
    FUNCTION,
    MODEL,
    NAMES,
    NOTHING,
    PATH,
    TEXT,
    Kind,
    instance,
    mapping,
    number,
    one_of,
    typed,
    whole,
)
from zoo.data.dataset import ImageDataset
from zoo.data.folders import SPLITS
from zoo.disk import write_file
from zoo.errors import ConfigError, DataError, ZooError
from zoo.tasks import Classify, Task, objective, of_classes
from zoo.tasks.confusion import confusion_matrix, draw
from zoo.tasks.metrics import named_metrics
from zoo.train.aids import make_aids
from zoo.train.batches import BatchPlan, make_loader
from zoo.train.explained import explained
from zoo.train.hooks import Hooks
from zoo.train.processes import Processes
from zoo.train.progress import Progress

if TYPE_CHECKING:
    from zoo.model import Model

__all__ = ["PRECISIONS", "autocast", "evaluate", "split_of"]

Loss = Callable[[Any, Any], Tensor]
PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def _metrics(value: Any) -> Any:
    if isinstance(value, Mapping):
        parts = ("update", "compute", "reset")
        if all(isinstance(n, str) for n in value) and all(
            isinstance(m, str) or (not isinstance(m, type) and all(callable(getattr(m, p, None)) for p in parts))
            for m in value.values()
        ):
            return dict(value)
        raise TypeError
    return [value] if isinstance(value, str) else NAMES.take(value)


def _numbers(value: Any) -> list[float]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TypeError
    return [number(0).take(one) for one in value]


_NUMBERS = Kind("a list of numbers", _numbers)
METRICS = Kind("names of metrics, or a dict of names with objects that have update, compute and reset", _metrics)
TASK = TEXT | instance("an object of zoo.Task", Task)
WEIGHTS = Kind(
    "'balanced', a list of numbers, or a dict of them by class",
    lambda v: v if isinstance(v, str) else (mapping("", number(0), least=1) | _NUMBERS).take(v),
)
WORKERS = whole(0, 256) | NOTHING


@typed(
    model=MODEL,
    batch_size=whole(1),
    split=TEXT | NOTHING,
    record=TEXT | NOTHING,
    per_class=FLAG,
    metrics=METRICS | NOTHING,
    confusion=FLAG | PATH,
    task=TASK | NOTHING,
    loss=FUNCTION | TEXT | NOTHING,
    precision=one_of(*PRECISIONS),
    workers=WORKERS,
    device=DEVICE | NOTHING,
    progress=FLAG,
)
def evaluate(
    model: Model,
    data: Any,
    *,
    batch_size: int = 64,
    split: str | None = None,
    record: str | None = None,
    per_class: bool = False,
    metrics: Mapping[str, Any] | Sequence[str] | None = None,
    confusion: bool | str | Path = False,
    task: str | Task | None = None,
    loss: str | Loss | None = None,
    precision: str = "fp32",
    workers: int | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Accuracy of `model` on `data` (what `zoo.open_dataset` takes); every process of a distributed run must call it.

    Args:
        split: for a source with several.
        record: the split's name under which the numbers are kept in `model.record["metrics"]` for the card. By default that of
            the data if it is a test or validation split ("cifar10/test"); "" keeps nothing.
        per_class: also the accuracy of each class; of a segmentation its intersection over union.
        metrics: further ones: names (`zoo.tasks.metrics`: "top3", "f1", "miou", "recall@1"), or names with objects of
            torchmetrics (`update(outputs, targets)`, `compute()`, `reset()`).
        confusion: True for the confusion matrix in the result; a path (.png, .pdf, .svg) draws it there, too.
        task: what the model is measured at (`zoo.tasks`); by default what `zoo.fit` would train it for.
        loss: a name, or (outputs, targets) -> mean loss, as in `zoo.fit`.
        precision: "fp32", "bf16" or "fp16".

    Returns:
        "accuracy" (0..1) and "top5" (with more than five classes) of a classification, "loss", "images" (items of any kind),
        "seconds", "images_per_second", what the task measures, each of `metrics`, "per_class" if asked for (None for a class
        without images), "confusion" (rows: the true classes), "skipped" if items could not be read.

    Raises:
        DataError, MismatchError: labels outside the model's classes, or other classes than the model's.
    """
    processes = Processes(device, model)
    what = objective(model, task, loss)
    dataset = what.open(model, data, train=False, split=split)
    if (classification := of_classes(what, model, dataset)) is not what:
        what = classification
        dataset = what.open(model, data, train=False, split=split)
    what.check(model, dataset)
    further = named_metrics(metrics, model.num_classes)
    picture = Path(confusion) if not isinstance(confusion, bool) else None
    if confusion:
        if not isinstance(what, Classify):
            raise ConfigError(
                f"a confusion matrix is one of a classifier, and the model is measured at '{what.name}'. "
                "Leave confusion out; per_class=True gives the numbers of each class, where a task has them."
            )
        further["confusion"] = confusion_matrix(model.num_classes)
        if picture is not None:
            draw([[0]], [""], picture.suffix[1:])  # what cannot be written is told now
    model.to(processes.device)
    if what.own is None:
        make_aids(what, model, processes.device, 0)
    if what.own is not None:
        what.own.eval()
    with Progress(progress and processes.main) as bar:
        result = run(
            model,
            dataset,
            processes,
            Hooks(model),
            batch_size=batch_size,
            task=what,
            precision=precision,
            workers=workers,
            per_class=per_class,
            metrics=further,
            bar=bar,
        )
    if picture is not None and processes.main:
        names = model.classes or dataset.classes or [str(i) for i in range(model.num_classes)]
        write_file(picture, draw(result["confusion"], names, picture.suffix[1:]))
    found = split_of(dataset.name) if record is None else record
    kept = {"testing": "test", "eval": "test", "valid": "val", "validation": "val", "dev": "val"}.get(found, found)
    if kept and not (record is None and kept in ("train", "training")):
        numbers = {
            k: v
            for k, v in result.items()
            if isinstance(v, float) and math.isfinite(v) and k not in ("seconds", "images_per_second")
        }
        model.record.setdefault("metrics", {})[kept] = numbers
        model.record.setdefault("data", {})[kept] = result["images"]
        model.record["data"].setdefault(
            "name", dataset.name[: -len(found) - 1] if dataset.name.endswith(found) else dataset.name
        )
    return result


def split_of(name: str) -> str:
    """ "test" of "cifar10/test"; "" if the name of a data set tells of no split."""
    last = name.rpartition("/")[2]
    return last if "/" in name and last.lower() in SPLITS else ""


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is '{precision}'; expected one of {', '.join(PRECISIONS)}.")
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def to_device(value: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Move nested tensors; floating ones also to `dtype`."""
    from accelerate.utils import send_to_device
    from torch.utils._pytree import tree_map

    moved = send_to_device(value, device, non_blocking=device.type == "cuda")
    if dtype is None:
        return moved
    return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, moved)


def supplied(model: Any, task: Task, inputs: Any, targets: Any, training: bool) -> AbstractContextManager[None]:
    """The task's values for a batch, as far as adapters of the model read them."""
    wanted = model.wanted if hasattr(model, "wanted") else {}
    if not wanted:
        return nullcontext()
    values = task.context(model, inputs, targets, training=training)
    return model.context(**{k: v for k, v in values.items() if k in wanted})  # type: ignore[no-any-return]


def input_dtype(model: Model, precision: str) -> torch.dtype | None:
    """What inputs must be cast to: the backbone's own type, unless autocast sees to it."""
    first = next((p for p in model.backbone.parameters() if p.is_floating_point()), None)
    return first.dtype if first is not None and precision == "fp32" else None


@torch.no_grad()
def run(
    model: Model,
    dataset: ImageDataset,
    processes: Processes,
    hooks: Hooks,
    *,
    batch_size: int,
    task: Task,
    precision: str,
    workers: int | None,
    bar: Progress,
    per_class: bool = False,
    metrics: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The evaluation itself, on one process of many; the result is the same on all."""
    device, classes = processes.device, model.num_classes if isinstance(task, Classify) else 0
    plan = BatchPlan(
        len(dataset), batch_size * processes.world, rank=processes.rank, world=processes.world, shuffle=False, seed=seed
    )
    loader = make_loader(dataset, plan, workers=workers, device=device, seed=seed)
    counter = _Counter(classes, device)
    further = {
        name: m.to(device) if hasattr(m, "to") else m for name, m in {**task.metrics(model), **(metrics or {})}.items()
    }
    for metric in further.values():
        metric.reset()
    dtype = input_dtype(model, precision)
    training, began = model.training, time.perf_counter()
    skipped: list[tuple[str, str]] = []
    model.eval()
    try:
        with hooks.evaluation():
            for batch in bar.over(loader, "evaluating", len(plan)):
                skipped += batch.skipped
                if not batch.count:
                    continue
                task.check_batch(model, dataset, batch.targets)
                inputs, targets = to_device(batch.inputs, device, dtype), to_device(batch.targets, device)
                given = supplied(model, task, inputs, targets, training=False)
                with autocast(device, precision), given, explained(model, dataset, inputs):
                    value, outputs = task.loss(model, inputs, targets)
                counter.add(outputs, targets, value, batch.count)
                for name, metric in further.items():
                    _update(name, metric, outputs, targets)
    finally:
        model.train(training)
    processes.add(counter.totals)
    processes.add(counter.hits)
    result = counter.result()
    if task.measures:
        del result["loss"]
    if not result["images"]:
        raise DataError(
            f"{dataset.name}: none of the {task.items(model)} could be read; first: {skipped[0][1] if skipped else 'none there'}"
        )
    for name, metric in further.items():
        found = _compute(name, metric)
        result.update({k: _value(v) for k, v in found.items()} if isinstance(found, dict) else {name: _value(found)})
    seconds = time.perf_counter() - began
    result |= {"seconds": seconds, "images_per_second": result["images"] / seconds}
    count = int(processes.add(torch.tensor([len(skipped)], device=device)))
    if count:
        result["skipped"] = count
    if per_class and not classes:
        names = model.classes or dataset.classes or []
        for of_each in (m.per_class() for m in further.values() if hasattr(m, "per_class")):
            result["per_class"] = {n: None if v != v else v for n, v in zip(names, of_each, strict=True)}
    if per_class and classes:
        result["per_class"] = counter.per_class(model.classes or dataset.classes or [str(i) for i in range(classes)])
    return result


class _Counter:
    """Hits and losses; sums over batches and processes, so that short batches count by their images."""

    def __init__(self, classes: int, device: torch.device) -> None:
        exact = torch.float32 if device.type == "mps" else torch.float64
        self.classes = classes
        self.totals = torch.zeros(5, dtype=exact, device=device)  # images, loss, top-1 hits, top-5 hits, unlabelled
        self.hits = torch.zeros(2, max(classes, 1), dtype=exact, device=device)  # of each class: hits, images

    def add(self, outputs: Any, targets: Any, loss: Tensor, count: int) -> None:
        self.totals[0] += count
        self.totals[1] += loss.mean().to(self.totals.dtype) * count
        if not (self.classes and targets.ndim == 1 and not targets.is_floating_point()):
            self.totals[4] += count
            return
        best = outputs.topk(min(5, self.classes), dim=1).indices == targets[:, None]
        self.totals[2] += best[:, 0].sum()
        self.totals[3] += best.sum()
        self.hits[0].index_add_(0, targets, best[:, 0].to(self.hits.dtype))
        self.hits[1].index_add_(0, targets, torch.ones_like(targets, dtype=self.hits.dtype))

    def result(self) -> dict[str, Any]:
        images, loss, first, fifth, unlabelled = self.totals.tolist()
        result: dict[str, Any] = {}
        if images and not unlabelled:
            result["accuracy"] = first / images
            if self.classes > 5:
                result["top5"] = fifth / images
        return result | {"loss": loss / max(images, 1), "images": int(images)}

    def per_class(self, names: Sequence[str]) -> dict[str, float | None]:
        hits, images = self.hits.tolist()
        return {name: h / n if n else None for name, h, n in zip(names, hits, images, strict=True)}


class NotYet(ConfigError):
    """A metric cannot be computed of what it saw."""


def _update(name: str, metric: Any, outputs: Any, targets: Any) -> None:
    try:
        metric.update(outputs, targets)
    except ZooError:
        raise
    except Exception as error:  # somebody else's code, on outputs that it may not be made for
        raise ConfigError(
            f"the metric '{name}' does not take what the model gives, {_shape(outputs)}, with targets {_shape(targets)} "
            f"({type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]})."
        ) from error


def _compute(name: str, metric: Any) -> Any:
    try:
        return metric.compute()
    except ZooError:
        raise
    except Exception as error:
        raise NotYet(
            f"the metric '{name}' cannot be computed ({type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]})."
        ) from error


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _value(value: Any) -> Any:
    return (value.item() if value.numel() == 1 else value.tolist()) if isinstance(value, Tensor) else value
