"""Classes that come in sessions: LAE against sequential tuning and the joint bound, on vit-micro.

    python benchmarks/continual.py /data/cifar10 /data/flowers17

CIFAR-10 in 5 sessions of 2 classes and flowers17 in 4 sessions, none of which the backbone was trained on; a part of the images,
so that it takes minutes on two CPU cores. Writes results/continual.json, continual.md and continual.png.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

import zoo
from zoo.data import by_class, few_shot
from zoo.regimes.continual import draw_matrix

RESULTS = Path(__file__).parent / "results"
WAYS: dict[str, dict[str, Any]] = {
    "LAE": {},
    "sequential": {"offline": False},
    "joint (bound)": {"offline": False, "joint": True},
}


def sessions(folder: Path, count: int, shots: int, held: int) -> tuple[list[Any], list[Any]]:
    """Training and test sessions with so many images of every class."""
    train, test = (zoo.open_dataset(folder, split=split) for split in ("train", "test"))
    return by_class(few_shot(train, shots), count), by_class(few_shot(test, held), count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cifar10", type=Path)
    parser.add_argument("flowers17", type=Path)
    # other forms of the adapter: lora, prefix
    parser.add_argument("--forms", nargs="+", default=["adapter"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = {
        "CIFAR-10, 5 sessions of 2": sessions(args.cifar10, 5, 60, 40),
        "flowers17, 4 sessions": sessions(args.flowers17, 4, 40, 16),
    }
    rows: list[dict[str, Any]] = []
    for title, (train, test) in data.items():
        for form in args.forms:
            for way, settings in WAYS.items():
                model = zoo.load("vit-micro", num_classes=0)
                began = time.perf_counter()
                report = zoo.run(
                    model, "lae", train, test, form=form, fit={"progress": False, "augment": "none"}, **settings
                )
                row = {"data": title, "form": form, "way": way, "seconds": round(time.perf_counter() - began, 1)}
                row |= report.summary
                rows.append(row)
                print(f"{title} {form} {way}: last {row['last']:.3f} forgetting {row['forgetting']:.3f}", flush=True)
    about = {"torch": torch.__version__, "machine": platform.processor() or platform.machine(), "seed": 0}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "continual.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1))
    write(rows)


def write(rows: list[dict[str, Any]]) -> None:
    """The table and the picture."""
    from matplotlib.figure import Figure

    lines = ["# Classes in sessions", "", __doc__.split("\n\n", 2)[2].strip(), ""]
    lines += [
        "| data | adapter | way | last, % | mean over sessions, % | forgetting, % | s |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for r in rows:
        numbers = " | ".join(f"{100 * r[k]:.1f}" for k in ("last", "average", "forgetting"))
        lines.append(f"| {r['data']} | {r['form']} | {r['way']} | {numbers} | {r['seconds']:.0f} |")
    lines += [
        "",
        "Accuracy is over all classes seen, without being told the session; forgetting is the mean drop of a session.",
        "",
    ]
    (RESULTS / "continual.md").write_text("\n".join(lines))
    shown = [r for r in rows if r["form"] == rows[0]["form"]]
    figure = Figure(figsize=(9.2, 3.4 * len(shown)), layout="constrained")
    for part, row in zip(figure.subfigures(len(shown), 1, squeeze=False)[:, 0], shown, strict=True):
        part.suptitle(f"{row['data']}: {row['way']} ({row['form']})", fontsize=10)
        draw_matrix(part, row)
    figure.savefig(RESULTS / "continual.png", dpi=110)


if __name__ == "__main__":
    main()
