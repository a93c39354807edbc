"""Faces of low resolution against a gallery of full resolution: PETALface, one LoRA of the same count, full tuning.

    python benchmarks/faces.py /data/orl_faces
    python benchmarks/faces.py /data/orl_faces --epochs 15 --rates 1 --seeds 1 --out results/faces_longer.json

ORL, open set: identities 0-23 train, 24-29 choose the learning rate (of the first seed; with --rates 1 nothing is chosen),
30-39 are measured and are seen by nobody before. swin-micro at 32 px, a CosFace head, four epochs, every training image at full
resolution or at a quarter of each side (23 x 28 pixels), by chance. The gallery is one image of each identity at full
resolution, the probes are all others; ranks and TAR are averaged over the ten choices of the image in the gallery. Three seeds.
The backbone was trained on CIFAR-100, not on faces. Writes results/faces.json, faces.md and faces.png; a run that was cut off
goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import zoo
from vision.tasks.identify import Coarse, Identification
from zoo.bench.report import mean_and_deviation
from zoo.data import ImageDataset
from zoo.data.joined import ConcatRows
from zoo.disk import write_file

RESULTS = Path(__file__).parent / "results"
SCALE, EPOCHS, BATCH, SEEDS = 4, 4, 16, 3
TARGETS = ("q", "k", "v")
PETAL: dict[str, Any] = {"rank": 6, "threshold": None}
# title -> method, its settings, learning rates to choose from
ARMS: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
    "full tuning": ("full", {}, (5e-4, 2e-4)),
    "one LoRA": ("lora", {"rank": 8, "targets": TARGETS, "dropout": 0.1}, (4e-3, 1.5e-3)),
    "PETALface": ("petalface", PETAL, (4e-3, 1.5e-3)),
    "PETALface, gain 4": ("petalface", {**PETAL, "gain": 4.0}, (4e-3, 1.5e-3)),
}


class OfAnyResolution:
    """The preprocessing of training behind a quarter of the resolution, for half of the images."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.coarse = inner, Coarse(SCALE)

    def __call__(self, image: Any) -> torch.Tensor:
        low = bool(torch.rand(()) < 0.5)
        return self.inner(self.coarse(image) if low else image)  # type: ignore[no-any-return]


def faces(folder: Path) -> ImageDataset:
    """All images of both files, those of an identity in their order."""
    parts = [zoo.open_dataset(folder, split=split, label_column="subject") for split in ("train", "test")]
    return ImageDataset(ConcatRows(parts), parts[0].classes)


def of(data: ImageDataset, first: int, last: int) -> ImageDataset:
    assert data.labels is not None
    chosen = np.flatnonzero((data.labels >= first) & (data.labels <= last))
    return data.select(chosen[np.argsort(data.labels[chosen], kind="stable")])


@torch.no_grad()
def measured(model: zoo.Model, data: ImageDataset) -> dict[str, float]:
    """Averages over the image that is the gallery, of probes of a quarter and of full resolution."""
    labels, pre = torch.as_tensor(data.labels), model.preprocess()
    model.eval()
    z = {
        scale: torch.cat(
            [
                model.features(torch.stack([pre(Coarse(scale)(data[i][0])) for i in rows]))
                for rows in torch.arange(len(data)).split(50)
            ]
        )
        for scale in (1, SCALE)
    }
    shots = int((labels == labels[0]).sum())
    number = torch.arange(len(data)) % shots  # an identity's images stand together
    found: dict[str, list[float]] = {}
    for shot in range(shots):
        for scale, side in ((SCALE, "low"), (1, "full")):
            metric = Identification()
            metric.update(z[1][number == shot], 2 * labels[number == shot])
            metric.update(z[scale][number != shot], 2 * labels[number != shot] + 1)
            for name, value in metric.compute().items():
                if name.startswith(("rank", "tar")):
                    found.setdefault(f"{side} {name}", []).append(float(value))
    return {name: sum(values) / len(values) for name, values in found.items()}


def run(data: ImageDataset, method: str, settings: dict[str, Any], lr: float, seed: int, epochs: int) -> dict[str, Any]:
    """Train, and measure on the identities that choose and on those that count."""
    torch.manual_seed(seed)
    model = zoo.load("swin-micro", zoo.adapter(method, **settings), num_classes=24)
    model.reset_head(24, kind="cosface", scale=32.0, margin=0.3)
    train = of(data, 0, 23)
    train = train._like(classes=train.classes[:24] if train.classes else None)
    train = train.with_transform(OfAnyResolution(model.preprocess(train=True)))
    began = time.perf_counter()
    report = zoo.fit(model, train, epochs=epochs, batch_size=BATCH, lr=lr, seed=seed, weight_decay=0.05, progress=False)
    found = {"parameters": model.num_parameters(trainable=True, head=False), "seconds": time.perf_counter() - began}
    found["loss"] = report.history[-1]["loss"]
    found |= {f"val {k}": v for k, v in measured(model, of(data, 24, 29)).items()}
    return found | {f"test {k}": v for k, v in measured(model, of(data, 30, 39)).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    # how many of the learning rates are tried; with 1 nothing is chosen
    parser.add_argument("--rates", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--out", type=Path, default=RESULTS / "faces.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = faces(args.data)
    rows: list[dict[str, Any]] = json.loads(args.out.read_text())["rows"] if args.out.is_file() else []
    if others := sorted({r["epochs"] for r in rows if r["lr"]} - {args.epochs}):
        raise SystemExit(f"{args.out} holds rows of {others} epochs, not of {args.epochs}; name another file by --out")
    about = {"torch": torch.__version__, "zoo": zoo.__version__, "machine": platform.processor() or platform.machine()}

    def done(title: str, lr: float, seed: int) -> dict[str, Any] | None:
        return next((r for r in rows if (r["method"], r["lr"], r["seed"]) == (title, lr, seed)), None)

    def add(title: str, lr: float, seed: int, found: dict[str, Any]) -> None:
        rows.append({"method": title, "lr": lr, "seed": seed, "epochs": args.epochs if lr else 0, **found})
        write_file(args.out, json.dumps({"about": about, "rows": rows}, indent=1).encode())
        print(
            title, lr, seed, {k: round(v, 3) for k, v in found.items() if "rank@1" in k or k == "seconds"}, flush=True
        )

    if done("frozen", 0.0, 0) is None:
        model = zoo.load("swin-micro", num_classes=0)
        sides = {"val": of(data, 24, 29), "test": of(data, 30, 39)}
        found = {f"{n} {k}": v for n, side in sides.items() for k, v in measured(model, side).items()}
        add("frozen", 0.0, 0, {"parameters": 0, **found})
    for seed in range(args.seeds):
        for title, (method, settings, rates) in ARMS.items():
            for lr in rates[: args.rates] if seed == 0 else [chosen(rows, title)]:
                if done(title, lr, seed) is None:
                    add(title, lr, seed, run(data, method, settings, lr, seed, args.epochs))
    write(rows, args.out)


def chosen(rows: list[dict[str, Any]], title: str) -> float:
    """The learning rate of the first seed with the best low-resolution rank-1 on the identities that choose."""
    tried = [r for r in rows if r["method"] == title and r["seed"] == 0]
    return max(tried, key=lambda r: (r["val low rank@1"], -r["lr"]))["lr"]  # type: ignore[no-any-return]


COLUMNS = {
    "test low rank@1": "rank-1, low",
    "test low rank@5": "rank-5, low",
    "test low tar@0.1": "TAR@0.1, low",
    "test low tar@0.01": "TAR@0.01, low",
    "test full rank@1": "rank-1, full",
}


def write(rows: list[dict[str, Any]], out: Path) -> None:
    """The table and the picture."""
    from matplotlib.figure import Figure

    final: dict[str, list[dict[str, Any]]] = {"frozen": [r for r in rows if r["method"] == "frozen"]}
    for title in ARMS:
        lr = chosen(rows, title)
        final[title] = [r for r in rows if r["method"] == title and r["lr"] == lr]
    about = __doc__.split("\n\n", 2)[2].strip()
    if (epochs := max(r["epochs"] for r in rows)) != EPOCHS:
        about = about.replace("four epochs", f"{epochs} epochs")
    if (seeds := 1 + max(r["seed"] for r in rows)) != SEEDS:
        about = about.replace("Three seeds.", f"Seeds: {seeds}.")
    lines = ["# Faces of low resolution", "", about, ""]
    lines += [f"| method | parameters | lr | {' | '.join(COLUMNS.values())} |"]
    lines += ["| --- | ---: | ---: |" + " ---: |" * len(COLUMNS)]
    for title, found in final.items():
        numbers = [mean_and_deviation([100 * r[key] for r in found]) for key in COLUMNS]
        lines.append(f"| {title} | {found[0]['parameters']:,} | {found[0]['lr']:g} | {' | '.join(numbers)} |")
    lines += ["", "Means and standard deviations over seeds, in percent; the head's parameters are not counted.", ""]
    out.with_suffix(".md").write_text("\n".join(lines))
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for i, key in enumerate(("test low rank@1", "test full rank@1")):
        for j, found in enumerate(final.values()):
            dots = [100 * r[key] for r in found]
            place = j + (i - 0.5) * 0.36
            axes.bar(
                place, np.mean(dots), 0.34, color=("#4878a8", "#c8c8c8")[i], label=COLUMNS[key] if j == 0 else None
            )
            axes.plot([place] * len(dots), dots, "k.", markersize=4)
    axes.set_xticks(range(len(final)), list(final))
    axes.set_ylabel("unseen identities, %")
    axes.set_ylim(0, 100)
    axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)
    figure.savefig(out.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
