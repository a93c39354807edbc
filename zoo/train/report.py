"""What a training run was and did: `Report`, its JSON and its curves."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from zoo.adapters.parts.pictured import Panel, pictured
from zoo.disk import write_file

__all__ = ["Report", "finite", "layers_picture", "report_of", "save_layers"]

TRAIN, VAL, CHOSEN = "#8a8f98", "#1f6feb", "#d1242f"


@dataclass
class Report:
    """The result of `zoo.fit`.

    Attributes:
        history: one dict per epoch: "epoch" (from 1), "step", "lr", "loss", "accuracy", "val_loss", "val_accuracy", "val_top5",
            "seconds", "images_per_second"; what does not apply is not there.
        layers: what the layers had at the end of epochs in which it changed: "epoch", "step", and "of": by adapter (or class of a
            callback) and by what it is, a number for each layer: {"adalora": {"rank": {"blocks.0.attn.q": 3}}}.
        best: the epoch whose weights the model now holds, with the metrics of that epoch and "chosen" ("best" or "last").
        stopped: "finished" or "early".
        steps: optimizer steps done.
        images: images (or other items) trained on, over all epochs.
        seconds: of training and evaluation together, over all resumed parts.
        images_per_second: training alone, over all processes.
        parameters: how many trained numbers the model holds now; what a method dropped on the way is not counted.
        skipped: places of images that could not be read (only with on_error="skip").
        settings: the arguments of the run.
        data: names and sizes of the data sets, and what their "items" are called.
        out: where report.json, curves.png and, if there is something to show of the layers, layers.png are.
    """

    history: list[dict[str, Any]]
    best: dict[str, Any]
    stopped: str
    steps: int
    images: int
    seconds: float
    images_per_second: float
    parameters: int
    layers: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    out: str | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """Numbers of the chosen epoch."""
        return {
            k: v
            for k, v in self.best.items()
            if isinstance(v, float) and k not in ("lr", "seconds", "images_per_second")
        }

    def to_json(self) -> str:
        """JSON as the standard has it: NaN and infinities, which it does not know, are null."""
        return json.dumps(finite({k: v for k, v in asdict(self).items() if k != "out"}), indent=2, allow_nan=False)

    def save(self, folder: str | Path) -> Path:
        """Write `report.json`, `curves.png` and `layers.png` (if a method said something of layers); returns the folder."""
        folder = Path(folder)
        write_file(folder / "report.json", self.to_json().encode())
        write_file(folder / "curves.png", self.curves())
        save_layers(folder, self.layers)
        self.out = str(folder)
        return folder

    def curves(self) -> bytes:
        """Loss and accuracy over epochs, as PNG bytes."""
        import io

        from matplotlib.figure import Figure  # without pyplot: no window system, no global state

        panels = [("loss", "loss"), ("accuracy", "accuracy, %")]
        shown = [p for p in panels if any(p[0] in h or f"val_{p[0]}" in h for h in self.history)]
        figure = Figure(figsize=(4.6 * max(1, len(shown)), 3.4), layout="constrained")
        for index, (key, title) in enumerate(shown):
            self._panel(figure.add_subplot(1, len(shown), index + 1), key, title)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=144)
        return buffer.getvalue()

    def _panel(self, axes: Any, key: str, title: str) -> None:
        factor = 100.0 if key == "accuracy" else 1.0
        for name, colour, label in ((key, TRAIN, "training"), (f"val_{key}", VAL, "validation")):
            points = [(h["epoch"], factor * h[name]) for h in self.history if name in h]
            if points:
                marker = "o" if len(points) < 25 else None
                axes.plot(*zip(*points, strict=True), color=colour, label=label, lw=1.8, marker=marker, ms=3.5)
        chosen = f"val_{key}" if f"val_{key}" in self.best else key
        if self.best.get("chosen") == "best" and chosen in self.best:
            value = factor * self.best[chosen]
            axes.plot([self.best["epoch"]], [value], "o", ms=9, mfc="none", mec=CHOSEN, mew=1.6, label="chosen")
            axes.annotate(
                f"{value:.1f}" if factor > 1 else f"{value:.3f}",
                (self.best["epoch"], value),
                textcoords="offset points",
                xytext=(0, -15 if key == "accuracy" else 9),
                ha="center",
                fontsize=8,
                color=CHOSEN,
            )
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("epoch", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.margins(y=0.12)
        axes.grid(axis="y", color="#e3e5e8", lw=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)

    def __str__(self) -> str:
        numbers = ", ".join(f"{k} {v:.4f}" for k, v in self.metrics.items())
        return (
            f"{len(self.history)} epochs, {self.steps} steps, {self.images_per_second:.0f} {self.data.get('items', 'images')}/s, "
            f"{self.seconds:.0f} s; "
            f"epoch {self.best.get('epoch', 0)} ({self.best.get('chosen', 'last')}): {numbers}"
        )


def layers_picture(layers: Sequence[Mapping[str, Any]], labels: Sequence[str] | None = None) -> bytes:
    """`Report.layers` as colours, PNG bytes: a row for each layer, a column for each epoch in which they changed.

    Args:
        labels: of the columns; by default the numbers of the epochs.
    """
    labels = [str(entry["epoch"]) for entry in layers] if labels is None else labels
    panels = []
    for owner, what in dict.fromkeys((o, w) for entry in layers for o, said in entry["of"].items() for w in said):
        told = [(label, e["of"][owner][what]) for label, e in zip(labels, layers) if what in e["of"].get(owner, {})]
        found = [told[0], *(now for before, now in pairwise(told) if now[1] != before[1])]
        names = dict.fromkeys(name for _, numbers in found for name in numbers)
        rows = {name: [numbers.get(name) for _, numbers in found] for name in names}
        panels.append(Panel(rows, [label for label, _ in found], what, "at the end of epoch", owner))
    return pictured(panels)


def save_layers(folder: Path, layers: Sequence[Mapping[str, Any]], labels: Sequence[str] | None = None) -> None:
    """Write `layers.png`; where there is nothing to show, one of an older run goes."""
    if layers:
        write_file(folder / "layers.png", layers_picture(layers, labels))
    else:
        (folder / "layers.png").unlink(missing_ok=True)


def finite(value: Any) -> Any:
    """The same with None for NaN and infinities, as JSON can hold it."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report_of(trainer: Any) -> Report:
    """The report of a run that is over; `trainer` is its `zoo.train.trainer.Trainer`."""
    run, settings = trainer.run, trainer.settings
    last = {**run.history[-1], "chosen": "last"}
    best = {**run.best, "chosen": "best"} if settings.keep == "best" and run.best is not None else last
    best.pop("score", None)
    data: dict[str, Any] = {
        "train": trainer.train.name,
        "train_images": len(trainer.train),
        "items": trainer.items,
        "classes": trainer.model.num_classes,
    }
    if trainer.val is not None:
        data |= {"val": trainer.val.name, "val_images": len(trainer.val)}
    elsewhere = int(trainer.processes.add(torch.tensor([len(run.skipped)], device=trainer.processes.device))) - len(
        run.skipped
    )
    return Report(
        history=run.history,
        layers=run.layers,
        best=best,
        stopped="early" if run.stopped else "finished",
        steps=run.step,
        images=run.images,
        seconds=run.seconds,
        images_per_second=run.images / run.training_seconds if run.training_seconds else 0.0,
        parameters=trainer.model.num_parameters(trainable=True),
        skipped=[*run.skipped, *([f"{elsewhere} more, seen by other processes"] if elsewhere else [])],
        settings={
            **settings.to_json(),
            "lr": trainer.lr or trainer.service.lr,
            **({"lr_search": run.lr_search} if run.lr_search else {}),
            "total_steps": trainer.total,
            **({"changes": run.changes} if run.changes else {}),
        },
        data=data,
    )
