"""Side by side with peft, in one run: step time, saved bytes, evaluation, disk, imports, compiled graphs. Ratios.

    python benchmarks/against_peft.py                 ViT-B/16, batch 8, 224 px; some minutes of processor time
    python benchmarks/against_peft.py --quick         ViT-Ti/16, batch 2; about a minute, no targets, writes nothing
    python benchmarks/against_peft.py --only training,eval --rounds 15

Writes `results/against_peft.json` and `.png` (on a GPU `against_peft_cuda`). README.md says what each row means.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.groups import GROUPS, Setting, ticks
from benchmarks.measure import Row, machine
from benchmarks.report import show, write
from zoo.puzzle.costs import single_thread

QUICK = {"vit": "vit_tiny_patch16_224", "batch": 2, "rounds": 3, "targets": False}


def measure(setting: Setting, names: list[str], progress: bool = True) -> list[Row]:
    """Run groups of measurements; the models of a group are gone when the next begins."""
    rows: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with single_thread(), Progress(*columns, disable=not progress, transient=True) as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task = bar.add_task("", total=sum(ticks(setting, name) for name in names))
        for name in names:
            bar.update(task, description=name)
            rows += GROUPS[name](setting, lambda: bar.advance(task))
    order = {group: i for i, group in enumerate(dict.fromkeys(row.group for row in rows))}
    return sorted(rows, key=lambda row: order[row.group])


def alone(name: str, setting: Setting) -> list[Row]:
    """The rows of one group, measured in a process of its own: what its models have held is given back at its end."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [
            sys.executable,
            __file__,
            "--only",
            name,
            "--rounds",
            str(setting.rounds),
            "--device",
            setting.device,
        ]
        subprocess.run([*command, "--rows", str(file)], check=True)
        return [Row(**row) for row in json.loads(file.read_text())]


def main(arguments: list[str] | None = None) -> int:
    """Measure, show, write. Returns 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, without targets")
    parser.add_argument("--rounds", type=int, help="turns of each configuration (7; --quick 3)")
    parser.add_argument("--only", help=f"groups, comma-separated: {', '.join(GROUPS)}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder of the JSON and the PNG; by default results/ beside this file")
    parser.add_argument("--no-progress", action="store_true")
    parser.add_argument("--rows", type=Path, help="only write the rows into this file")
    options = parser.parse_args(arguments)
    names = [name.strip() for name in (options.only or ",".join(GROUPS)).split(",")]
    for name in names:
        if name not in GROUPS:
            parser.error(f"there is no group '{name}'; known: {', '.join(GROUPS)}")
    setting = Setting(device=options.device, **(QUICK if options.quick else {}))
    if options.rounds is not None:
        if options.rounds < 1:
            parser.error("--rounds is at least 1")
        setting.rounds = options.rounds
    start = time.perf_counter()
    if len(names) == 1 or options.quick:
        rows = measure(setting, names, progress=not options.no_progress)
    else:
        rows = [row for name in names for row in alone(name, setting)]
    if options.rows is not None:
        options.rows.write_text(json.dumps([asdict(row) for row in rows]))
        return 0
    about = {
        "backbone": setting.vit,
        "batch": setting.batch,
        "image_size": setting.size,
        "rounds": setting.rounds,
        "precision": "fp32",
        "clock": "processor time of one thread" if setting.device == "cpu" else "wall time, synchronised",
        "machine": machine(setting.device),
    }
    show(rows, f"{setting.vit}, batch {setting.batch}, {setting.size} px, {about['machine']['device']}")
    print(f"{time.perf_counter() - start:.0f} s")
    folder = options.out or (None if options.quick or options.only else Path(__file__).parent / "results")
    if folder is not None:
        name = "against_peft" if setting.device == "cpu" else "against_peft_cuda"
        write(rows, about, folder, name)
        print(f"written: {folder / name}.json and .png")
    return int(any(row.passed is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
