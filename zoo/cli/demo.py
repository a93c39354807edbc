"""The demo: five ways to adapt one small backbone to real handwritten digits, side by side, in a few minutes on a CPU.

scikit-learn carries 1,797 scanned digits of 8 x 8 pixels. They are scaled up to the 32 x 32 pixels of `vit-micro`, which
was trained on photographs. Each method is trained on the same 800 images; the epoch is chosen on 200 others, and all are
compared on the 797 that neither saw. The best adapter is saved, loaded again in a fresh process, and published to a folder; the
best one that is a change of the weights is merged.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

import zoo
from zoo.errors import MissingPackageError, ZooError

BACKBONE = "vit-micro"
CLASSES = [str(i) for i in range(10)]
METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "bitfit": {},
    "vpt": {"num_tokens": 10, "deep": True},
    "lora": {"rank": 8, "targets": ("q", "v", "up", "down")},
    "spt": {"budget": 0.1},
}
LEARNING_RATES = {"linear": 1e-2, "bitfit": 5e-3, "vpt": 1e-2, "lora": 4e-3, "spt": 4e-3}  # by the validation images
LABELS = {"linear": "linear probe", "bitfit": "BitFit", "vpt": "VPT-deep", "lora": "LoRA", "spt": "SPT"}
DATA = {
    "name": "Handwritten digits (scikit-learn)",
    "url": "https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
    "train": 800,
    "validation": 200,
    "test": 797,
}


@dataclass
class Row:
    """One line of the table. `saved_bytes` is kept for backward at the training batch size."""

    method: str
    parameters: int
    saved_bytes: int
    accuracy: float
    seconds: float


def digits(model: zoo.Model) -> tuple[Dataset[Any], Dataset[Any], Dataset[Any]]:
    """Train, validation and test sets of (image (3, 32, 32), label), preprocessed as the backbone wants it."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingPackageError("The demo reads scikit-learn's digits: pip install 'adapter-zoo[demo]'.") from error
    from PIL import Image

    pack = load_digits()
    prepare = model.preprocess(train=False)
    size = model.image_size
    images = [
        Image.fromarray(np.uint8(i * 255 / 16)).resize((size[1], size[0]), Image.Resampling.BICUBIC).convert("RGB")
        for i in pack.images
    ]
    x, y = torch.stack([prepare(i) for i in images]), torch.tensor(pack.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    parts = order.split([DATA["train"], DATA["validation"], DATA["test"]])  # type: ignore[list-item]
    train, val, test = (TensorDataset(x[i], y[i]) for i in parts)
    return train, val, test


def train_one(
    method: str, epochs: int, batch_size: int = 32, seed: int = 0, progress: bool = True
) -> tuple[zoo.Model, Row, dict[str, Any]]:
    """Fit one method; returns the model, its line of the table and its metrics on the test set."""
    model = zoo.load(BACKBONE, adapter=zoo.adapter(method, **METHODS[method]), num_classes=10, seed=seed)
    model.classes = CLASSES
    train, val, test = digits(model)
    report = zoo.fit(
        model,
        train,
        val,
        epochs=epochs,
        batch_size=batch_size,
        lr=LEARNING_RATES[method],
        keep="best",
        seed=seed,
        progress=progress,
    )
    metrics = zoo.evaluate(model, test, progress=False)
    saved = model.saved_bytes(_stack(train, batch_size))
    row = Row(method, model.num_parameters(trainable=True), saved, metrics["accuracy"], report.seconds)
    model.record |= {
        "task": "image-classification",
        "data": DATA,
        "metrics": {"test": {"accuracy": round(row.accuracy, 4)}},
        "saved_bytes": saved,
        "seconds": round(report.seconds, 1),
        "license": "apache-2.0",
    }
    return model, row, metrics


def draw(rows: list[Row], path: Path) -> None:
    """Accuracy against trained parameters and against memory, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = ["#6e7781", "#1f6feb", "#8250df", "#d1242f", "#1a7f37", "#bf8700", "#0a7d8c"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for axis, value, label in (
        (axes[0], lambda r: r.parameters, "trained parameters"),
        (axes[1], lambda r: r.saved_bytes / 2**20, "MiB kept for backward (batch of 32)"),
    ):
        for place, (row, colour) in enumerate(sorted(zip(rows, colours), key=lambda pair: value(pair[0]))):
            at = value(row), 100 * row.accuracy
            axis.scatter(*at, s=90, color=colour, zorder=3)
            # Above and below in turn along the axis, so that neighbours do not write over one another.
            shift = (0, 9) if place % 2 else (0, -19)
            name = LABELS.get(row.method, row.method)
            axis.annotate(name, at, xytext=shift, textcoords="offset points", ha="center", color=colour)
        axis.margins(0.14, 0.16)
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_xscale("log")
    axes[0].set_ylabel("test accuracy, %")
    figure.suptitle(
        f"{BACKBONE} adapted to handwritten digits: {DATA['train']} training images, {DATA['test']} test images"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run(out: Path, epochs: int = 12, methods: list[str] | None = None, progress: bool = True) -> dict[str, Any]:
    """The whole demo; writes the table, the picture, the best adapter and a folder that stands for a Hub into `out`.

    Returns:
        {"rows": [...], "best": method, "checks": {...}} as JSON types.

    Raises:
        ZooError: a check failed: another accuracy after loading, other logits after merging.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console()
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    models: dict[str, zoo.Model] = {}
    for method in methods or list(METHODS):
        console.print(f"[bold]{LABELS[method]}[/bold]")
        model, row, _ = train_one(method, epochs, progress=progress)
        rows.append(row)
        models[method] = model
    ranked = sorted(rows, key=lambda r: -r.accuracy)
    best = models[ranked[0].method], ranked[0]

    table = Table(title=f"{BACKBONE} on handwritten digits")
    for name in ("method", "trained parameters", "kept for backward", "test accuracy", "seconds"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        mark = " *" if row.method == best[1].method else ""
        cells = (
            f"{row.parameters:,}",
            f"{row.saved_bytes / 2**20:.1f} MiB",
            f"{100 * row.accuracy:.1f} %",
            f"{row.seconds:.0f}",
        )
        table.add_row(LABELS[row.method] + mark, *cells)
    console.print(table)
    draw(rows, out / "demo.png")
    checks = publish(best[0], best[1], out) | merge([(r.method, models[r.method]) for r in ranked])
    lines = [
        f"best adapter ({LABELS[best[1].method]}) saved to {out / 'adapter'}",
        f"loaded in a fresh process: accuracy {100 * checks['reloaded_accuracy']:.1f} %, the same",
        checks["merge"],
        f"published with its card to {checks['published']}",
        f"picture: {out / 'demo.png'}",
    ]
    for line in lines:
        console.print(f"[green]✓[/green] {line}", highlight=False)
    result = {"rows": [vars(r) for r in rows], "best": best[1].method, "checks": checks}
    (out / "demo.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def publish(model: zoo.Model, row: Row, out: Path) -> dict[str, Any]:
    """Save, load in a fresh process, publish; each step is checked."""
    from zoo.hub import publish_to_folder

    model.eval()
    folder = model.save_adapter(out / "adapter")
    command = [sys.executable, "-m", "zoo.cli.demo", str(folder)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise ZooError(f"Loading {folder} in a fresh process failed:\n{answer.stderr.strip()}")
    again = json.loads(answer.stdout.splitlines()[-1])["accuracy"]
    if abs(again - row.accuracy) > 1e-9:
        raise ZooError(
            f"The adapter loaded from {folder} has accuracy {again}, it had {row.accuracy} when it was saved."
        )
    place = publish_to_folder(model, out / "hub", f"demo/{BACKBONE}-{row.method}-digits")
    return {"reloaded_accuracy": again, "published": str(place)}


def merge(models: list[tuple[str, zoo.Model]]) -> dict[str, Any]:
    """Merge the best adapter that can be merged (prompts cannot: they are no change of the weights), and compare logits."""
    from zoo.errors import MergeError

    for method, model in models:
        try:
            plain = model.merge()
        except MergeError:
            continue
        _, _, test = digits(model)
        images = _stack(test, 64)
        with torch.no_grad():
            gap = float((plain(images) - model.eval()(images)).abs().max())
        if gap > 1e-4:
            raise ZooError(f"The logits of {LABELS[method]} merged are off by {gap:.1e}.")
        return {"merge": f"{LABELS[method]} merged into a plain {type(plain).__name__}: the same logits, to {gap:.0e}"}
    return {"merge": "none of the methods can be merged"}


def _check(folder: str) -> float:
    model = zoo.load(adapter=Path(folder))
    _, _, test = digits(model)
    return float(zoo.evaluate(model, test, progress=False)["accuracy"])


def _stack(dataset: Dataset[Any], count: int) -> Tensor:
    return torch.stack([dataset[i][0] for i in range(count)])


if __name__ == "__main__":
    print(json.dumps({"accuracy": _check(sys.argv[1])}))
