"""`predict`: what a model says of files that nobody has labelled, or what it makes of them (embeddings).

found = zoo.predict(model, "photos/")
found.save("table.csv")                       path, class, probability
found = zoo.predict(model, "photos/", features=True)
found.values                                  (n, d)
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.arguments import DEVICE, FLAG, NOTHING, PATH, Kind, one_of, typed, whole
from zoo.data.unlabelled import open_unlabelled
from zoo.disk import write_file
from zoo.errors import ConfigError, DataError, SaveError
from zoo.heads import Head
from zoo.tasks import Task, resolve
from zoo.train.batches import BatchPlan, make_loader
from zoo.train.evaluation import MODEL, PRECISIONS, TASK, WORKERS, autocast, input_dtype, to_device
from zoo.train.hooks import Hooks
from zoo.train.processes import Processes
from zoo.train.progress import Progress

if TYPE_CHECKING:
    from zoo.model import Model

__all__ = ["FORMATS", "Predictions", "check_table", "predict"]

FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")
KINDS = {"classify": "classes", "multilabel": "tags", "regress": "numbers"}  # task -> what its outputs are
ON_ERROR = one_of("raise", "skip")
DATA = Kind(
    "a folder, a pattern, a file or a list of files", lambda v: v if isinstance(v, (list, tuple)) else PATH.take(v)
)


@dataclass(frozen=True)
class Predictions:
    """One row for each file that could be read, in order.

    Args:
        paths: of the files.
        kind: "classes" (values are the `top` largest probabilities, `labels` whose), "tags" (a probability for each class),
            "numbers" or "features".
        values: (n, k), float32.
        labels: (n, k) indices of classes, for "classes".
        classes: their names, if the model has any.
        skipped: (path, reason) of the files that could not be read.
    """

    paths: list[str]
    kind: str
    values: Tensor
    labels: Tensor | None = None
    classes: list[str] | None = None
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, label: int) -> str:
        """The name of a class; its number, if the model has no names."""
        return self.classes[label] if self.classes else str(label)

    def columns(self) -> list[str]:
        """Of `rows`: "path", then "class", "probability", "class2", ...; or one for each tag, number or feature."""
        count = self.values.shape[1]
        if self.kind == "classes":
            ends = ["", *map(str, range(2, count + 1))]
            return ["path", *(name + end for end in ends for name in ("class", "probability"))]
        if self.kind == "tags":
            return ["path", *(self.name(i) for i in range(count))]
        stem = "feature" if self.kind == "features" else "number"
        return ["path", *([stem] if count == 1 else (f"{stem}{i}" for i in range(count)))]

    def rows(self) -> list[tuple[Any, ...]]:
        """A tuple of the `columns` for each file."""
        values = self.values.tolist()
        if self.labels is None:
            return [(path, *row) for path, row in zip(self.paths, values, strict=True)]
        found = zip(self.paths, self.labels.tolist(), values, strict=True)
        return [
            (path, *(x for c, p in zip(own, row, strict=True) for x in (self.name(c), p))) for path, own, row in found
        ]

    def save(self, path: str | Path) -> Path:
        """Write `rows` as .csv, .tsv, .jsonl or .parquet (by the path's ending).

        Raises:
            ConfigError: another ending. SaveError: it cannot be written.
        """
        target = check_table(path)
        columns, rows = self.columns(), self.rows()
        if target.suffix == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            columns = [name if columns.count(name) == 1 else f"{name}#{i}" for i, name in enumerate(columns)]
            held = [list(column) for column in zip(*rows, strict=True)]
            sink = pa.BufferOutputStream()
            pq.write_table(pa.table(dict(zip(columns, held, strict=True))), sink)
            data = sink.getvalue().to_pybytes()
        elif target.suffix == ".jsonl":
            lines = (json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) for row in rows)
            data = "".join(line + "\n" for line in lines).encode()
        else:
            text = io.StringIO()
            writer = csv.writer(text, delimiter="\t" if target.suffix == ".tsv" else ",", lineterminator="\n")
            writer.writerow(columns)
            writer.writerows([f"{x:.7g}" if isinstance(x, float) else x for x in row] for row in rows)
            data = text.getvalue().encode()
        write_file(target, data)
        return target


def check_table(path: str | Path) -> Path:
    """The path of a table that can be written.

    Raises:
        ConfigError: its ending is of no format. SaveError: a folder is there.
    """
    target = Path(path).expanduser()
    if target.suffix not in FORMATS:
        raise ConfigError(f"The table '{target}' has no ending of a format; expected {', '.join(FORMATS)}.")
    if target.is_dir() or (target.parent.exists() and not target.parent.is_dir()):
        raise SaveError(f"'{target}' is no place for a file; name another one.")
    return target


@typed(
    model=MODEL,
    data=DATA,
    top=whole(1),
    features=FLAG,
    task=TASK | NOTHING,
    batch_size=whole(1),
    precision=one_of(*PRECISIONS),
    workers=WORKERS,
    device=DEVICE | NOTHING,
    on_error=ON_ERROR,
    progress=FLAG,
)
@torch.no_grad()
def predict(
    model: Model,
    data: Any,
    *,
    top: int = 1,
    features: bool = False,
    task: str | Task | None = None,
    batch_size: int = 64,
    precision: str = "fp32",
    workers: int | None = None,
    device: str | torch.device | None = None,
    on_error: str = "raise",
    progress: bool = True,
) -> Predictions:
    """Classes, tags, numbers or features of files without labels.

    Args:
        data: a folder (files anywhere below it), a pattern, a file, or a list of files; images, or sounds of a model that takes
            them.
        top: the so many likeliest classes of each file; refused beside features, tags and numbers.
        features: pooled features in front of the head, with the active adapters, instead of what the head says.
        task: "classify" (softmax), "multilabel" (a logistic function for each class) or "regress" (the outputs themselves); by
            default as the model was trained.
        batch_size, precision, workers, device, progress: as `zoo.evaluate` has them.
        on_error: "skip" goes on without files that cannot be read, which `skipped` names; "raise" stops and names the first.

    Raises:
        DataError: no files, one that cannot be read, or none that can. ConfigError: a model without a head, or one that does not
        say what its outputs are.
    """
    if not model.family.pools:
        how = "".join(f"\n    {line}" for part in model.family.usage(0) for line in part)
        raise ConfigError(
            f"'{model.backbone_name}' pools no features of an item; predicting is for networks that classify images or sounds. "
            f"What this one does:{how}"
        )
    kind = "features" if features else KINDS[_task(model, task)]
    if top > 1 and kind != "classes":
        raise ConfigError(f"top={top} is for the likeliest of several classes, and these are {kind}. Leave it out.")
    processes = Processes(device, model)
    dataset = open_unlabelled(
        data,
        model.family.medium(),
        transform=model.family.preprocess(False),
        on_error="skip" if on_error == "skip" else "raise",
    )
    plan = BatchPlan(len(dataset), batch_size, shuffle=False)
    loader = make_loader(dataset, plan, workers=workers, device=processes.device)
    model.to(processes.device)
    dtype, training = input_dtype(model, precision), model.training
    numbers: list[int] = []
    values: list[Tensor] = []
    labels: list[Tensor] = []
    skipped: list[tuple[str, str]] = []
    model.eval()
    try:
        with Hooks(model).evaluation(), Progress(progress and processes.main) as bar:
            for batch in bar.over(loader, "predicting", len(plan)):
                skipped += batch.skipped
                if not batch.count:
                    continue
                inputs = to_device(batch.inputs, processes.device, dtype)
                with autocast(processes.device, precision):
                    found = (model.features(inputs) if features else model(inputs)).float()
                if (broken := ~found.isfinite().flatten(1).all(1)).any():
                    where = dataset.where(int(batch.targets[int(broken.float().argmax())]))
                    raise DataError(f"{where}: the model's outputs are not finite (precision {precision}).")
                numbers += batch.targets.tolist()
                if kind == "classes":
                    largest = found.softmax(1).topk(min(top, found.shape[1]), dim=1)
                    labels.append(largest.indices.cpu())
                    found = largest.values
                values.append((found.sigmoid() if kind == "tags" else found).cpu())
    finally:
        model.train(training)
    if not values:
        raise DataError(f"{dataset.name}: none of the {dataset.noun} could be read; first: {skipped[0][1]}")
    return Predictions(
        [dataset.where(i) for i in numbers],
        kind,
        torch.cat(values),
        torch.cat(labels) if labels else None,
        list(model.classes) if model.classes else None,
        skipped,
    )


def _task(model: Model, task: str | Task | None) -> str:
    """What the outputs are, as far as it is said, or known of the training.

    Raises:
        ConfigError: no head, a task of another kind, or a head of one output of which nothing is known.
    """
    if not model.num_classes:
        raise ConfigError(
            f"'{model.backbone_name}' has no head here that says anything of an item. Give a trained adapter with its head, "
            "or ask for its features (features=True, --features)."
        )
    if isinstance(model.head, Head) and "maps" in model.head.needs:
        raise ConfigError(
            "The model says something of every pixel, which no table holds: vision.tasks.dense_prediction.predict_maps(model, "
            "files, 'segment') gives maps at the images' size."
        )
    if task is not None:
        name = resolve(model, task).name
        if name not in KINDS:
            raise ConfigError(f"task is '{name}'; expected one of {', '.join(KINDS)}.")
        return name
    known = model.record.get("trained_for")
    if known is not None and known not in (*KINDS, "custom"):
        raise ConfigError(
            f"The model was trained for '{known}'; say what its outputs are: task='classify', 'multilabel' or 'regress' (--task)."
        )
    if known == "custom":  # a loss of the user's own; of classes it is a classification
        known = None
    if known is None and model.num_classes == 1:
        raise ConfigError(
            "The head has one output, and nothing says whether that is a number or a yes: pass task='regress' or "
            "task='multilabel' (--task)."
        )
    return known or "classify"
