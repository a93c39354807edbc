"""Three tasks of maps on one frozen backbone: Polyhistor-Lite against the probe, which has the same decoders and no adapter.

    python benchmarks/dense_tasks.py /data/camvid
    python benchmarks/dense_tasks.py /data/camvid --ways polyhistor-lite --rates 1e-3 --out <folder> --keep <folder>

CamVid at 32 x 32, the size of swin-micro: 11 classes, edges between them, and the distance to the next edge (both made from the
masks), three seeds. Every way has the same batches and epochs, and its decoders the same rate; the hypernetwork has its own,
of --rates the one that is best on the validation split with seed 0. The test split is read once for each row. Goes on where it
was killed. Writes results/dense_tasks.json, dense_tasks.md, dense_tasks.png. The second line repeats rows of the first, at the
rate that it chose, and keeps what was trained; `scripts/ship_dense.py` publishes one of them.
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
import torch.nn.functional as F
from PIL import Image

import zoo
from vision.data.dense import open_dense
from zoo.disk import write_file

BATCH = 16
DECODER_LR = 4e-3
RESULTS = Path(__file__).parent / "results"
TASKS = {"segment": ("segment", None), "edges": ("edges", "edges"), "distance": ("depth", "distance")}
MEASURES = {"segment": "mIoU", "edges": "ODS F", "distance": "RMSE"}
POLYHISTOR = {"tasks": list(TASKS), "targets": ["attn", "mlp"], "task_dim": 64}
WAYS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "probe": None,
    "polyhistor-lite": ("polyhistor-lite", POLYHISTOR),
}


def opened(folder: Path, split: str, size: tuple[int, int]) -> dict[str, Any]:
    """The data of each task; images and masks are brought to their size (height, width) once."""
    source = open_dense(folder / f"{split}.parquet")
    pairs = []
    for index in range(len(source)):
        image, mask = source[index]
        small = F.interpolate(mask[None, None].float(), size, mode="nearest")[0, 0]
        pairs.append((image.resize(size[::-1], Image.Resampling.BICUBIC), small.byte().numpy()))
    return {
        name: open_dense(pairs, kind, classes=source.classes if derive is None else None, derive=derive)
        for name, (kind, derive) in TASKS.items()
    }


def attempt(
    way: str,
    seed: int,
    lr: float,
    epochs: int,
    size: int | tuple[int, int],
    data: Any,
    test: Any,
    keep: Path | None = None,
) -> dict[str, Any]:
    """One run, `lr` that of the hypernetwork: parameters that were trained, and what each task reached; saved into `keep`."""
    torch.manual_seed(seed)
    chosen = WAYS[way]
    adapter = [] if chosen is None else [zoo.adapter(chosen[0], **chosen[1])]
    model = zoo.load("swin-micro", adapter, num_classes=0, img_size=size)
    full = model.num_parameters(head=False) - model.num_parameters(trainable=True, head=False)
    began = time.perf_counter()
    report = zoo.run(
        model,
        "multitask",
        data,
        test,
        epochs=epochs,
        tau=1.0,
        seed=seed,
        fit={
            "lr": DECODER_LR if chosen is None else {"head": DECODER_LR, chosen[0]: lr},
            "batch_size": BATCH,
            "progress": False,
            "workers": 0,
        },
    )
    trained = model.num_parameters(trainable=True, head=False)
    if keep is not None and adapter:
        model.save_adapter(keep / f"{way}-{seed}")
    return {
        "way": way,
        "seed": seed,
        "lr": lr,
        "trained": trained,
        "decoders": model.num_parameters(trainable=True) - trained,
        "share": trained / (len(TASKS) * full),
        "seconds": round(time.perf_counter() - began, 1),
        **report.summary["values"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Means and standard deviations over seeds, in Markdown."""
    lines = [
        "| | seeds | lr | trained beside the decoders | of a full tuning for each task | segment, mIoU % | edges, ODS F % | "
        "distance, RMSE |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for way in WAYS:
        found = [r for r in rows if r["way"] == way]
        if found:
            cells = []
            for task, scale in (("segment", 100), ("edges", 100), ("distance", 1)):
                values = scale * np.array([r[task] for r in found])
                digits = 2 if scale == 100 else 4
                cells.append(f"{values.mean():.{digits}f} ± {values.std(ddof=min(1, len(values) - 1)):.{digits}f}")
            first = found[0]
            lines.append(
                f"| {way} | {len(found)} | {first['lr']:g} | {first['trained']:,} | {100 * first['share']:.1f} % | "
                + " | ".join(cells)
                + " |"
            )
    return "\n".join(lines)


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel for each task: every seed of every way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    for number, (task, measure) in enumerate(MEASURES.items()):
        axes = figure.add_subplot(1, 3, number + 1)
        for place, way in enumerate(WAYS):
            values = [r[task] for r in rows if r["way"] == way]
            axes.scatter([place] * len(values), values, color="#2a5d9f", zorder=2)
            if values:
                axes.hlines(sum(values) / len(values), place - 0.2, place + 0.2, color="#2a5d9f")
        axes.set_xticks(range(len(WAYS)), list(WAYS))
        axes.set_xlim(-0.5, len(WAYS) - 0.5)
        axes.set_title(f"{task}: {measure}" + (" (lower is better)" if task == "distance" else ""), fontsize=9)
        axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("camvid", type=Path)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--size", type=int, nargs="+", default=[32], help="one number, or height and width")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 4e-3], help="of the hypernetwork")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--keep", type=Path, help="folder for the adapters of the rows, with their decoders")
    args = parser.parse_args()
    torch.set_num_threads(1)
    size = (args.size[0], args.size[-1])
    settings = {
        "epochs": args.epochs,
        "size": size[0] if size[0] == size[1] else list(size),
        "rates": args.rates,
        "adapter": POLYHISTOR,
        "decoder_lr": DECODER_LR,
        "batch_size": BATCH,
    }
    path = args.out / "dense_tasks.json"
    state: dict[str, Any] = {"settings": settings, "torch": torch.__version__, "machine": platform.machine()}
    state |= {"search": [], "rows": []}
    if path.exists():
        state = json.loads(path.read_text())
        if state["settings"] != settings:
            raise SystemExit(f"{path} is of other settings, {state['settings']}; name another folder by --out")
    train, val, test = (opened(args.camvid, split, size) for split in ("train", "val", "test"))
    one: dict[str, Any] = {"epochs": args.epochs, "size": size[0] if size[0] == size[1] else size, "data": train}

    def done(part: str, **key: Any) -> dict[str, Any] | None:
        return next((r for r in state[part] if all(r[k] == v for k, v in key.items())), None)

    def run(part: str, way: str, seed: int, lr: float, measured: Any) -> None:
        if done(part, way=way, seed=seed, lr=lr) is None:
            state[part].append(attempt(way, seed, lr, test=measured, keep=args.keep if part == "rows" else None, **one))
            write_file(path, (json.dumps(state, indent=1) + "\n").encode())
            print(part, state[part][-1], flush=True)

    for way in args.ways:
        for lr in args.rates if WAYS[way] is not None and len(args.rates) > 1 else []:
            run("search", way, 0, lr, val)
    for seed in range(args.seeds):
        for way in args.ways:
            tried = [r for r in state["search"] if r["way"] == way]
            lr = max(tried, key=lambda r: r["segment"])["lr"] if tried else args.rates[0]
            run("rows", way, seed, DECODER_LR if WAYS[way] is None else lr, test)
    path.with_suffix(".md").write_text(table(state["rows"]) + "\n", encoding="utf-8")
    picture(state["rows"], path.with_suffix(".png"))
    print(table(state["rows"]))


if __name__ == "__main__":
    main()
