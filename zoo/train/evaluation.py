"""`evaluate`: accuracy, loss and further metrics of a model on a data set."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.data.dataset import ImageDataset
from zoo.data.open import SPLITS, open_dataset
from zoo.data.sources import TorchRows
from zoo.errors import ConfigError, DataError, MismatchError
from zoo.train.batches import BatchPlan, class_range, make_loader
from zoo.train.hooks import Hooks
from zoo.train.processes import Processes
from zoo.train.progress import Progress
from zoo.train.seeds import kept_generators

if TYPE_CHECKING:
    from zoo.model import Model

__all__ = ["PRECISIONS", "autocast", "check_classes", "evaluate", "prepare", "split_of"]

Loss = Callable[[Any, Any], Tensor]
PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def evaluate(
    model: Model,
    data: Any,
    *,
    batch_size: int = 64,
    split: str | None = None,
    record: str | None = None,
    per_class: bool = False,
    metrics: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
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
        per_class: also the accuracy of each class.
        metrics: further ones by name, objects of torchmetrics (`update(outputs, targets)`, `compute()`, `reset()`).
        loss: (outputs, targets) -> mean loss; default cross-entropy.
        precision: "fp32", "bf16" or "fp16".

    Returns:
        "accuracy" (0..1), "top5" (with more than five classes), "loss", "images", "seconds", "images_per_second", each of
        `metrics`, "per_class" if asked for (None for a class without images), "skipped" if images could not be read.

    Raises:
        DataError, MismatchError: labels outside the model's classes, or other classes than the model's.
    """
    processes = Processes(device, model)
    dataset = prepare(model, data, train=False, split=split)
    if loss is None:
        check_classes(model, dataset)
    model.to(processes.device)
    with Progress(progress and processes.main) as bar:
        result = run(
            model,
            dataset,
            processes,
            Hooks(model),
            batch_size=batch_size,
            loss=loss,
            precision=precision,
            workers=workers,
            per_class=per_class,
            metrics=metrics,
            bar=bar,
        )
    found = split_of(dataset.name) if record is None else record
    kept = {"testing": "test", "eval": "test", "valid": "val", "validation": "val", "dev": "val"}.get(found, found)
    if kept and not (record is None and kept in ("train", "training")):
        numbers = {
            k: v for k, v in result.items() if isinstance(v, float) and k not in ("seconds", "images_per_second")
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


def prepare(
    model: Model, data: Any, *, train: bool, split: str | None = None, augment: str | None = None
) -> ImageDataset:
    """Open `data`; where it has no transform of its own, with the backbone's preprocessing."""
    dataset = open_dataset(data, split=split)
    if dataset.transform is None and not (isinstance(dataset.rows, TorchRows) and _yields_tensors(dataset)):
        options = {"augment": augment} if train and augment is not None else {}
        dataset = dataset.with_transform(model.preprocess(train=train, **options))
    return dataset


def _yields_tensors(dataset: ImageDataset) -> bool:
    with kept_generators(cuda=False):
        item = dataset[0]
    return isinstance(item, tuple) and not hasattr(item[0], "convert")


def check_classes(model: Model, dataset: ImageDataset, what: str = "data set") -> None:
    """Raise unless the head and the data set have the same classes."""
    if not model.num_classes:
        raise ConfigError(
            "The model has no classification head (num_classes=0). Load it with num_classes="
            f"{len(dataset.classes) if dataset.classes else '<number of classes>'}, or pass a loss of your own."
        )
    labels = dataset.labels
    if dataset.classes is not None and len(dataset.classes) != model.num_classes:
        raise MismatchError(
            f"The {what} '{dataset.name}' has {len(dataset.classes)} classes, the model's head {model.num_classes}. "
            f"Load the model with num_classes={len(dataset.classes)}, or open the data with classes=[...] (all "
            f"{model.num_classes} names, in the order of the labels)."
        )
    if labels is not None and len(labels) and not 0 <= labels.min() <= labels.max() < model.num_classes:
        wrong = int(((labels < 0) | (labels >= model.num_classes)).argmax())
        raise DataError(
            f"{dataset.where(wrong)}: label {labels[wrong]} is outside the model's {model.num_classes} classes "
            f"(0..{model.num_classes - 1})."
        )
    named = [c for c in (model.classes, dataset.classes) if c and not all(str(n).isdigit() for n in c)]
    if len(named) == 2 and named[0] != named[1]:
        first = next(i for i, (a, b) in enumerate(zip(*named, strict=True)) if a != b)
        raise MismatchError(
            f"Class {first} is '{named[0][first]}' for the model, '{named[1][first]}' in the {what} '{dataset.name}'. Open the "
            "data with classes=model.classes, so that equal labels mean equal classes."
        )


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is '{precision}'; expected one of {', '.join(PRECISIONS)}.")
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def check_batch(targets: Tensor, num_classes: int, dataset: ImageDataset) -> None:
    """Raise DataError for labels of a batch that the head has no output for."""
    if num_classes and (found := class_range(targets)) is not None and not 0 <= found[0] <= found[1] < num_classes:
        wrong = found[0] if found[0] < 0 else found[1]
        raise DataError(
            f"{dataset.name}: a label {wrong} is outside the model's {num_classes} classes (0..{num_classes - 1}). Mend the "
            f"labels, or load the model with num_classes={max(found[1] + 1, num_classes)}."
        )


def to_device(value: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Move nested tensors; floating ones also to `dtype`."""
    from accelerate.utils import send_to_device

    moved = send_to_device(value, device, non_blocking=device.type == "cuda")
    if dtype is not None and isinstance(moved, Tensor) and moved.is_floating_point():
        moved = moved.to(dtype)
    return moved


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
    loss: Loss | None,
    precision: str,
    workers: int | None,
    bar: Progress,
    per_class: bool = False,
    metrics: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The evaluation itself, on one process of many; the result is the same on all."""
    device, classes = processes.device, model.num_classes if loss is None else 0
    plan = BatchPlan(
        len(dataset), batch_size * processes.world, rank=processes.rank, world=processes.world, shuffle=False, seed=seed
    )
    loader = make_loader(dataset, plan, workers=workers, device=device, seed=seed)
    counter = _Counter(classes, device)
    further = {name: m.to(device) if hasattr(m, "to") else m for name, m in (metrics or {}).items()}
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
                check_batch(batch.targets, classes, dataset)
                inputs, targets = to_device(batch.inputs, device, dtype), to_device(batch.targets, device)
                with autocast(device, precision):
                    outputs = model(inputs)
                outputs = outputs.float() if isinstance(outputs, Tensor) else outputs
                value = loss(outputs, targets) if loss is not None else F.cross_entropy(outputs, targets)
                counter.add(outputs, targets, value, batch.count)
                for metric in further.values():
                    metric.update(outputs, targets)
    finally:
        model.train(training)
    processes.add(counter.totals)
    processes.add(counter.hits)
    result = counter.result()
    if not result["images"]:
        raise DataError(
            f"{dataset.name}: not one image could be read; first: {skipped[0][1] if skipped else 'none there'}"
        )
    result.update({name: _value(m.compute()) for name, m in further.items()})
    seconds = time.perf_counter() - began
    result |= {"seconds": seconds, "images_per_second": result["images"] / seconds}
    count = int(processes.add(torch.tensor([len(skipped)], device=device)))
    if count:
        result["skipped"] = count
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


def _value(value: Any) -> Any:
    return (value.item() if value.numel() == 1 else value.tolist()) if isinstance(value, Tensor) else value
