"""Are controls better learned before the network is tuned with them (MEET)? `vl-t5-micro`, questions of easy-VQA.

    python benchmarks/meet.py --data <folder with easy_vqa/> --seeds 3

Good answers are right, bad ones are wrong: another colour, another shape, no for yes. `vl-t5-micro` answers such questions;
by `--questions` of them with a good and a bad answer each it is taught which of the two is wanted, in four ways, all with the
same number of steps:

- MEET: controls first (`--control-epochs`), then the network with them (`--epochs`)
- together: network and controls from the beginning
- words: the network, with "yes" or "no" in front of the input (Chain of Hindsight)
- controls: the controls alone

The learning rates are those of `--rates`; `--choose` tries four pairs for MEET on 400 other questions of the training split,
with a seed that is used for nothing else, and all ways have the pair with the largest controllability there. 400 questions of
the test split are looked at once for each row: answers that are right, word by word, under each control. Rows are written as
they come, and a run that was stopped goes on. Writes `results/meet.{json,md}`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

import zoo
from multimodal.data.questions import Question, open_questions
from multimodal.data.visual_features import GridFeatures
from multimodal.regimes.meet import OfQuality
from multimodal.tasks.generate import Generate
from zoo.disk import write_file

RESULTS = Path(__file__).parent / "results"
KINDS = (
    ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
    ("circle", "rectangle", "triangle"),
    ("yes", "no"),
)
LENGTH = 3  # of an answer in tokens
QUALITIES = ("good", "bad")
WAYS = ("MEET", "together", "words", "controls")
TRIED = ((1e-2, 1e-4), (1e-2, 1e-3), (1e-1, 1e-4), (1e-1, 1e-3))
Item = tuple[Any, str, str]


def items(folder: Path, split: str, count: int, seed: int) -> list[Item]:
    """(features and boxes, question, right answer) of some questions; no two of them are about one drawing."""
    images = {row["image_id"]: row["image"] for row in pq.read_table(folder / f"{split}_images.parquet").to_pylist()}
    rows = pq.read_table(folder / f"{split}_questions.parquet").to_pylist()
    random.Random(seed).shuffle(rows)
    chosen = list({row["image_id"]: row for row in reversed(rows)}.values())
    random.Random(seed).shuffle(chosen)
    chosen = chosen[:count]
    front = GridFeatures(zoo.load("vit-micro"), pool=(4, 4), reduce="mean")  # what the network was trained with
    features, boxes = front([images[row["image_id"]] for row in chosen])
    return [((f, b), row["question"], row["answer"]) for f, b, row in zip(features, boxes, chosen, strict=True)]


def answered(chosen: list[Item], wrong: random.Random | None = None) -> Any:
    """Questions with their answers, or, drawn by `wrong`, each with a wrong one of the same kind."""
    found = []
    for number, (seen, text, right) in enumerate(chosen):
        kind = next(kind for kind in KINDS if right in kind)
        answer = right if wrong is None else wrong.choice([other for other in kind if other != right])
        found.append(Question(seen, text, (answer,), number))
    return open_questions(found)


def row(way: str, rates: tuple[float, float], train: list[Item], test: Any, seed: int, args: Any) -> dict[str, float]:
    """One training, measured."""
    whole = args.control_epochs + args.epochs
    settings: dict[str, Any] = {"control_epochs": args.control_epochs, "epochs": args.epochs}
    if way == "together":
        settings = {"stages": "model", "epochs": whole}
    elif way == "words":
        settings = {"stages": "model", "epochs": whole, "words": {"good": "yes", "bad": "no"}, "controls": False}
    elif way == "controls":
        settings = {"stages": "controls", "control_epochs": whole}
    model = zoo.load("vl-t5-micro")
    data = {"good": answered(train), "bad": answered(train, random.Random(seed))}
    fit = {"batch_size": 64, "progress": False}
    rest = {"control_lr": rates[0], "lr": rates[1], "answer_length": LENGTH, "seed": seed}
    zoo.run(model, "meet", data, fit=fit, **settings, **rest)
    found = {}
    for quality in QUALITIES:
        task = OfQuality(Generate(answer_length=LENGTH), QUALITIES, always=quality)
        scores = zoo.evaluate(model, test, task=task, batch_size=200, record="", progress=False)
        found[quality] = scores["exact_match"]
    return {**found, "controllability": found["good"] - found["bad"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("ZOO_TEST_DATA", "../shared/data")))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=320)
    parser.add_argument("--control-epochs", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs=2, default=TRIED[0], help="of the controls, of the network")
    parser.add_argument("--choose", action="store_true", help="try rates on held-out training questions, and stop")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    folder = args.data / "easy_vqa"
    every = items(folder, "train", 400 + args.questions * (args.seeds + 1), 0)
    held, parts = every[:400], [every[400 + i * args.questions :][: args.questions] for i in range(args.seeds + 1)]
    if args.choose:
        for rates in TRIED:
            print(rates, row("MEET", rates, parts[-1], answered(held), 1000, args), flush=True)
        return
    test = answered(items(folder, "test", 400, 0))
    file = args.out / "meet.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    about = {
        "questions": args.questions,
        "control_epochs": args.control_epochs,
        "epochs": args.epochs,
        "rates": [*args.rates],
    }
    for seed in range(args.seeds):
        for way in WAYS:
            key = {"way": way, "seed": seed, **about}
            if any(key.items() <= known.items() for known in rows):
                continue
            rows.append({**key, **row(way, tuple(args.rates), parts[seed], test, seed, args)})
            args.out.mkdir(parents=True, exist_ok=True)
            write_file(file, (json.dumps(rows, indent=1) + "\n").encode())
            print(rows[-1], flush=True)
    report([r for r in rows if about.items() <= r.items()], about, args.out / "meet.md")


def report(rows: list[dict[str, Any]], about: dict[str, Any], file: Path) -> None:
    """The table of these settings."""
    rates = " and ".join(f"{rate:g}" for rate in about["rates"])
    lines = [
        f"# MEET on `vl-t5-micro`: {about['questions']} questions, {about['control_epochs']} + {about['epochs']} epochs",
        "",
        "Answers to 400 test questions of easy-VQA that are right, %, under each control; mean and deviation over seeds.",
        f"Rates of controls and network: {rates}. Written by `benchmarks/meet.py`.",
        "",
        "| way | right under good | right under bad | controllability | seeds |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for way in WAYS:
        own = [r for r in rows if r["way"] == way]
        cells = []
        for name in (*QUALITIES, "controllability") if own else ():
            values = [100 * r[name] for r in own]
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.1f} ± {deviation:.1f}")
        lines += [f"| {way} | {' | '.join(cells)} | {len(own)} |"] if own else []
    write_file(file, ("\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    main()
