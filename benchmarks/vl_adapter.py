"""One adapter for all tasks or one for each (VL-Adapter), against full tuning: four tasks for `vl-t5-micro`, two of them new.

    python benchmarks/vl_adapter.py --data <folder with easy_vqa/ and flickr8k_1000/> --seeds 3

- vqa: easy-VQA's questions for colour and shape; presence: its questions that are answered by yes and no. The weights know both;
- gqa: "is there a red circle?", a colour and a shape at once; of those that are wrong one half is so in one of the two alone;
- caption: Flickr8k, five captions of each photograph.

The network is `vl-t5-micro` with more words: those of its own vocabulary keep their embeddings, those of captions start at
random, and only full tuning trains them. It sees by `vit-micro`, pooled to 4 x 4 tokens. All methods have the same questions,
steps and batches, one task each (regime `multitask`, tau = 1). Learning rates were fixed beforehand (`RATES`) and nothing is
chosen: the test splits are read once for each row, after the last step, and once for the weights as they come. Rows are written
as they come, and a run that was stopped goes on. Writes `results/vl_adapter.{json,md}`.
"""

from __future__ import annotations

import argparse
import json
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

TASKS = ("vqa", "presence", "gqa", "caption")
METHODS: dict[str, Any] = {
    "full": {"method": "full"},
    "single": {"method": "vl-adapter"},
    "half-up": {"method": "vl-adapter", "sharing": "half-up", "tasks": TASKS},
    "multiple": {"method": "vl-adapter", "sharing": "multiple", "tasks": TASKS},
}
RATES = {"full": 1e-3, "single": 3e-3, "half-up": 3e-3, "multiple": 3e-3}
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
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


def both(facts: dict[int, tuple[str, str]], count: int, draw: random.Random) -> list[dict[str, Any]]:
    """Questions for a colour and a shape at once; every second is answered by no."""
    found = []
    for k in range(count):
        image = draw.choice(list(facts))
        color, shape = facts[image]
        if k % 4 == 1:
            color = draw.choice([c for c in COLORS if c != color])
        elif k % 4 == 3:
            shape = draw.choice([s for s in SHAPES if s != shape])
        answer = "no" if k % 2 else "yes"
        found.append({"image_id": image, "question": f"is there a {color} {shape}?", "answer": answer})
    return found


def captions(rows: list[dict[str, Any]], front: GridFeatures) -> list[Question]:
    """Photographs with what is said of them."""
    made = zip(*front([r["image"] for r in rows]), strict=True)
    return [Question(seen, None, tuple(r["captions"]), r["name"]) for r, seen in zip(rows, made, strict=True)]


def everything(data: Path, counts: dict[str, int]) -> tuple[dict[str, Rows], list[str]]:
    """Questions of "train" and "test", so many of each kind, and the words of captions of the train split."""
    front = GridFeatures(zoo.load("vit-micro", num_classes=0), pool=(4, 4), reduce="mean")
    draw = random.Random(0)
    found: dict[str, Rows] = {}
    for split, count in counts.items():
        facts, kinds = drawings(data / "easy_vqa", split)
        asked = {name: draw.sample(rows, count) for name, rows in kinds.items()} | {"gqa": both(facts, count, draw)}
        table = pq.read_table(data / "easy_vqa" / f"{split}_images.parquet").to_pylist()
        used = {r["image_id"] for rows in asked.values() for r in rows}
        chosen = [row for row in table if row["image_id"] in used]
        features, boxes = front([row["image"] for row in chosen])
        seen = {row["image_id"]: (f, b) for row, f, b in zip(chosen, features, boxes, strict=True)}
        found[split] = {
            name: [Question(seen[r["image_id"]], r["question"], (r["answer"],), r["image_id"]) for r in rows]
            for name, rows in asked.items()
        }
        photographs = pq.read_table(data / "flickr8k_1000" / f"{split}.parquet").to_pylist()
        found[split]["caption"] = captions(photographs[:count], front)
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


def measured(model: zoo.Model, data: Rows) -> dict[str, float]:
    """Scores by task: exact answers (0..1), CIDEr of captions."""
    many = Generate.together({task: open_questions(rows) for task, rows in data.items()})
    return {
        task: zoo.evaluate(model, rows, task=many.single(task), record="", progress=False)["score"]
        for task, rows in zip(data, many.data.rows.datasets, strict=True)  # type: ignore[attr-defined]
    }


def trained(name: str, seed: int, data: dict[str, Rows], words: list[str], args: Any) -> dict[str, Any]:
    """Scores by task on "test" after training, and how many numbers were trained."""
    model = network(words, seed)
    settings = dict(METHODS[name])
    torch.manual_seed(seed)
    model.add_adapter(zoo.adapter(settings.pop("method"), **settings))
    opened = {task: open_questions(rows) for task, rows in data["train"].items()}
    fit = {"lr": RATES[name], "batch_size": args.batch, "warmup": 0.1, "clip": 5.0, "progress": False}
    zoo.run(model, "multitask", opened, epochs=args.epochs, tau=1.0, seed=seed, fit=fit)
    return {"test": measured(model, data["test"]), "trained": model.num_parameters(trainable=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("ZOO_TEST_DATA", "../shared/data")))
    parser.add_argument("--methods", nargs="+", default=["full", "single", "multiple"], choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=180, help="questions of each kind, and photographs")
    parser.add_argument("--test", type=int, default=75, help="the same, to measure on")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    file = args.out / "vl_adapter.json"
    settings = {name: getattr(args, name) for name in ("train", "test", "epochs", "batch")}
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"settings": settings, "rows": {}}
    if found["settings"] != settings:
        raise SystemExit(f"{file} holds rows of {found['settings']}; move it away, or run with these.")
    data, words = everything(args.data, {"train": args.train, "test": args.test})
    found["words"] = len(words)
    runs: list[tuple[str, int]] = [("as it comes", 0), *((name, s) for s in range(args.seeds) for name in args.methods)]
    for name, seed in runs:
        if (key := f"{name}, seed {seed}") in found["rows"]:
            continue
        began = time.perf_counter()
        bare = name not in METHODS
        row = {"test": measured(network(words, 0), data["test"])} if bare else trained(name, seed, data, words, args)
        found["rows"][key] = {**row, "seconds": round(time.perf_counter() - began)}
        print(key, found["rows"][key], flush=True)
        write_file(file, (json.dumps(found, indent=1) + "\n").encode())
        write_file(args.out / "vl_adapter.md", (table(found["rows"]) + "\n").encode())


def table(rows: dict[str, Any]) -> str:
    """Mean and standard deviation over the seeds on the test data; exact answers in per cent, CIDEr of captions."""
    lines = [f"| method | trained | {' | '.join(TASKS)} |", "| --- |" + " ---: |" * (1 + len(TASKS))]
    for name in ("as it comes", *METHODS):
        own = [row for key, row in rows.items() if key.startswith(f"{name}, ")]
        if not own:
            continue
        cells = []
        for task in TASKS:
            scale, digits = (1, 3) if task == "caption" else (100, 1)
            numbers = [scale * row["test"][task] for row in own]
            spread = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
            cells.append(f"{statistics.mean(numbers):.{digits}f}{spread}")
        lines.append(f"| {name} | {own[0].get('trained', 0):,} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
