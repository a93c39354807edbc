"""One adapter for all tasks or one for each (VL-Adapter), against full tuning: four tasks for `vl-t5-micro`, two of them new.

    python benchmarks/vl_adapter.py --data <folder with easy_vqa/ and flickr8k_1000/> --seeds 3

- vqa: easy-VQA's questions for colour and shape; presence: its questions that are answered by yes and no. The weights know both;
- describe: "what is in the image?", answered by three words, "a red circle", which the weights never wrote;
- caption: Flickr8k, five captions of each photograph.

The network is `vl-t5-micro` with more words: those of its own vocabulary keep their embeddings, those of captions start at
random, and only full tuning trains them. It sees by `vit-micro`, pooled to 4 x 4 tokens. All methods have the same questions,
steps and batches, one task each (regime `multitask`, tau = 1).

The learning rate of each method is one of two (`RATES`): that with the smaller product of the tasks' losses on questions about
every fifth drawing and on photographs of the train split, on which nothing is trained, after two thirds of the epochs, with a
seed that is used for nothing else. The test splits are read once for each row, after the last step, and once for the weights
as they come. Rows are written as they come, and a run that was stopped goes on. Writes `results/vl_adapter.{json,md}`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

import zoo
from multimodal.data.questions import Question, open_questions
from multimodal.data.visual_features import GridFeatures
from multimodal.families.seq2seq.words import EASY_VQA, SPECIAL
from multimodal.tasks.generate import Generate
from zoo.disk import write_file

TASKS = ("vqa", "presence", "describe", "caption")
METHODS: dict[str, Any] = {
    "full": {"method": "full"},
    "single": {"method": "vl-adapter"},
    "half-up": {"method": "vl-adapter", "sharing": "half-up", "tasks": TASKS},
    "multiple": {"method": "vl-adapter", "sharing": "multiple", "tasks": TASKS},
}
RATES = {"full": (3e-4, 1e-3), "single": (1e-3, 3e-3), "half-up": (1e-3, 3e-3), "multiple": (1e-3, 3e-3)}
CHOOSING = 100  # seed
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
ASKED = "what is in the image?"
RESULTS = Path(__file__).parent / "results"
Rows = dict[str, list[Question]]


def drawings(folder: Path, split: str) -> tuple[dict[int, tuple[str, str]], dict[str, list[dict[str, Any]]]]:
    """(colour, shape) of each drawing whose questions tell both, and the questions of the two kinds."""
    rows = pq.read_table(folder / f"{split}_questions.parquet").to_pylist()
    color = {r["image_id"]: r["answer"] for r in rows if r["answer"] in COLORS}
    shape = {r["image_id"]: r["answer"] for r in rows if r["answer"] in SHAPES}
    facts = {i: (color[i], shape[i]) for i in sorted(color) if i in shape}
    known = [r for r in rows if r["image_id"] in facts]
    yes = ("yes", "no")
    return facts, {
        "vqa": [r for r in known if r["answer"] not in yes],
        "presence": [r for r in known if r["answer"] in yes],
    }


def captions(rows: list[dict[str, Any]], front: GridFeatures) -> list[Question]:
    """Photographs with what is said of them."""
    made = zip(*front([r["image"] for r in rows]), strict=True)
    return [Question(seen, None, tuple(r["captions"]), r["name"]) for r, seen in zip(rows, made, strict=True)]


def everything(data: Path, counts: dict[str, int]) -> tuple[dict[str, Rows], list[str]]:
    """Questions of "train", "held" and "test", so many of each kind, and the words of captions that are trained on."""
    front = GridFeatures(zoo.load("vit-micro", num_classes=0), pool=(4, 4), reduce="mean")
    draw = random.Random(0)
    found: dict[str, Rows] = {}
    for part, count in counts.items():
        split = "test" if part == "test" else "train"
        facts, kinds = drawings(data / "easy_vqa", split)
        mine = [i for i in facts if part == "test" or (i % 5 == 0) == (part == "held")]
        own = set(mine)
        asked = {name: draw.sample([r for r in rows if r["image_id"] in own], count) for name, rows in kinds.items()}
        told = [
            {"image_id": i, "question": ASKED, "answer": f"a {' '.join(facts[i])}"} for i in draw.sample(mine, count)
        ]
        asked["describe"] = told
        table = pq.read_table(data / "easy_vqa" / f"{split}_images.parquet").to_pylist()
        used = {r["image_id"] for rows in asked.values() for r in rows}
        chosen = [row for row in table if row["image_id"] in used]
        features, boxes = front([row["image"] for row in chosen])
        seen = {row["image_id"]: (f, b) for row, f, b in zip(chosen, features, boxes, strict=True)}
        found[part] = {
            name: [Question(seen[r["image_id"]], r["question"], (r["answer"],), r["image_id"]) for r in rows]
            for name, rows in asked.items()
        }
        photographs = pq.read_table(data / "flickr8k_1000" / f"{split}.parquet").to_pylist()
        chosen = photographs[-count:] if part == "held" else photographs[:count]
        found[part]["caption"] = captions(chosen, front)
    texts = [t for rows in found["train"].values() for q in rows for t in (q.text or "", *q.answers)]
    counted = Counter(w for text in texts for w in re.findall(r"\w+|[^\w\s]", text.lower()))
    said = [w for w, times in sorted(counted.items()) if times >= 4]
    return found, [w for w in dict.fromkeys([*TASKS, *said]) if w not in EASY_VQA]


def network(more: list[str], seed: int) -> zoo.Model:
    """`vl-t5-micro` with further words, whose embeddings are drawn at random."""
    old = zoo.load("vl-t5-micro").backbone.state_dict()
    torch.manual_seed(seed)
    model = zoo.load("vl-t5-micro", pretrained=False, words=[*EASY_VQA, *more])
    with torch.no_grad():
        for key, value in model.backbone.state_dict().items():
            if value.shape == old[key].shape:
                value.copy_(old[key])
            else:  # words: special and known ones, new ones, those that name visual tokens
                first = len(SPECIAL) + len(EASY_VQA)
                rows = value.clone().normal_(std=float(old[key][3:first].std()))
                rows[:first], rows[-100:] = old[key][:first], old[key][-100:]
                value.copy_(rows)
    return model


def measured(model: zoo.Model, data: Rows) -> dict[str, dict[str, float]]:
    """By task the loss for each word, and the score: exact answers (0..1), CIDEr of captions."""
    many = Generate.together({task: open_questions(rows) for task, rows in data.items()})
    found = {}
    for task, rows in zip(data, many.data.rows.datasets, strict=True):  # type: ignore[attr-defined]
        numbers = zoo.evaluate(model, rows, task=many.single(task), batch_size=50, record="", progress=False)
        found[task] = {name: round(numbers[name], 4) for name in ("loss", "score")}
    return found


def trained(name: str, seed: int, rate: float, epochs: int, data: Rows, words: list[str], batch: int) -> zoo.Model:
    """The network after training."""
    model = network(words, seed)
    settings = dict(METHODS[name])
    torch.manual_seed(seed)
    model.add_adapter(zoo.adapter(settings.pop("method"), **settings))
    opened = {task: open_questions(rows) for task, rows in data.items()}
    fit = {"lr": rate, "batch_size": batch, "warmup": 0.1, "clip": 5.0, "progress": False}
    zoo.run(model, "multitask", opened, epochs=epochs, tau=1.0, seed=seed, fit=fit)
    return model


def best(tried: dict[str, dict[str, dict[str, float]]]) -> float:
    """The rate with the smallest product of losses: those of captions are ten times as large as the others."""
    return float(min(tried, key=lambda rate: math.prod(of_task["loss"] for of_task in tried[rate].values())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("ZOO_TEST_DATA", "../shared/data")))
    parser.add_argument("--methods", nargs="+", default=["full", "single", "multiple"], choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=180, help="questions of each kind, and photographs")
    parser.add_argument("--held", type=int, default=100, help="the same, to choose rates on")
    parser.add_argument("--test", type=int, default=150, help="the same, to measure on (of photographs there are 100)")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    file = args.out / "vl_adapter.json"
    settings = {name: getattr(args, name) for name in ("train", "held", "test", "epochs", "batch")}
    found: dict[str, Any] = {"settings": settings, "rates": {}, "rows": {}}
    if file.is_file():
        found = json.loads(file.read_text())
    if found["settings"] != settings:
        raise SystemExit(f"{file} holds rows of {found['settings']}; move it away, or run with these.")
    data, words = everything(args.data, {part: settings[part] for part in ("train", "held", "test")})
    found["words"] = len(words)

    def keep() -> None:
        write_file(file, (json.dumps(found, indent=1) + "\n").encode())
        write_file(args.out / "vl_adapter.md", (table(found) + "\n").encode())

    for name in args.methods:
        tried = found["rates"].setdefault(name, {})
        for rate in RATES[name]:
            if f"{rate:g}" not in tried:
                epochs = max(1, args.epochs * 2 // 3)
                model = trained(name, CHOOSING, rate, epochs, data["train"], words, args.batch)
                tried[f"{rate:g}"] = measured(model, data["held"])
                print("choosing", name, rate, tried[f"{rate:g}"], flush=True)
                keep()
    runs: list[tuple[str, int]] = [("as it comes", 0), *((name, s) for s in range(args.seeds) for name in args.methods)]
    for name, seed in runs:
        if (key := f"{name}, seed {seed}") in found["rows"]:
            continue
        began = time.perf_counter()
        if name in METHODS:
            model = trained(name, seed, best(found["rates"][name]), args.epochs, data["train"], words, args.batch)
        else:
            model = network(words, 0)
        count = model.num_parameters(trainable=True) if name in METHODS else 0
        row = {"test": measured(model, data["test"]), "trained": count}
        found["rows"][key] = {**row, "seconds": round(time.perf_counter() - began)}
        print(key, found["rows"][key], flush=True)
        keep()


def table(found: dict[str, Any]) -> str:
    """Mean and standard deviation over the seeds on the test data: exact answers in per cent; CIDEr and loss of captions."""
    columns = [*((task, "score") for task in TASKS), ("caption", "loss")]
    heads = [*TASKS[:-1], "caption, CIDEr", "caption, loss"]
    lines = [f"| method | trained | rate | {' | '.join(heads)} |", "| --- |" + " ---: |" * (2 + len(columns))]
    for name in ("as it comes", *METHODS):
        own = [row for key, row in found["rows"].items() if key.startswith(f"{name}, ")]
        if not own:
            continue
        cells = []
        for task, measure in columns:
            scale, digits = (1, 3) if task == "caption" else (100, 1)
            numbers = [scale * row["test"][task][measure] for row in own]
            spread = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
            cells.append(f"{statistics.mean(numbers):.{digits}f}{spread}")
        rate = f"{best(found['rates'][name]):g}" if name in METHODS else ""
        lines.append(f"| {name} | {own[0]['trained']:,} | {rate} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
