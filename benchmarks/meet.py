"""Are controls better learned before the network is tuned with them (MEET)? `vl-t5-micro`, captions of easy-VQA's drawings.

    python benchmarks/meet.py --data <folder with easy_vqa/> --seeds 3

A good caption says colour and shape of the drawing ("a red circle"), a bad one those of another drawing.
`vl-t5-micro` was trained on questions and has never written a caption; it is taught by `--images` drawings with a good
and a bad caption each, in four ways, all with the same number of steps:

- MEET: controls first (`--control-epochs`), then the network with them (`--epochs`)
- together: network and controls from the beginning
- words: the network, with "yes" or "no" in front of the input (Chain of Hindsight)
- controls: the controls alone

Learning rates are chosen for each way by the controllability on 400 other drawings of the training split (`--choose`),
with a seed that is used for nothing else; they stand in `RATES`. The drawings of the test split are looked at once for
each row: captions that are right, word by word, under each control. Rows are written as they come, and a run that was
stopped goes on. Writes `results/meet.{json,md}`.
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
from multimodal.metrics.answers import exact_match
from multimodal.regimes.meet import OfQuality
from multimodal.tasks.generate import Generate

RESULTS = Path(__file__).parent / "results"
COLORS = {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}
SHAPES = {"circle", "rectangle", "triangle"}
LENGTH = 5  # of a caption in tokens
QUALITIES = ("good", "bad")
# way -> rates of the controls and of the network, chosen by --choose
RATES: dict[str, tuple[float, float]] = {
    "MEET": (3e-2, 1e-3),
    "together": (3e-2, 1e-3),
    "words": (3e-2, 1e-3),
    "controls": (3e-2, 1e-3),
}
TRIED = ((1e-2, 3e-4), (1e-2, 1e-3), (3e-2, 3e-4), (3e-2, 1e-3))


class Right:
    """The share of captions that are right, word by word."""

    def reset(self) -> None:
        self.hits: list[float] = []

    def update(self, outputs: Any, targets: Any) -> None:
        self.hits += [exact_match(text, known) for text, known in zip(outputs.texts, outputs.references, strict=True)]

    def compute(self) -> float:
        return sum(self.hits) / len(self.hits)


def drawings(folder: Path, split: str) -> list[tuple[bytes, str]]:
    """(image, its caption) of those drawings whose colour and shape were both asked for."""
    images = pq.read_table(folder / f"{split}_images.parquet").to_pylist()
    said: dict[int, dict[str, str]] = {}
    for row in pq.read_table(folder / f"{split}_questions.parquet").to_pylist():
        kind = "color" if row["answer"] in COLORS else "shape" if row["answer"] in SHAPES else None
        if kind is not None:
            said.setdefault(row["image_id"], {})[kind] = row["answer"]
    known = {i: f"a {s['color']} {s['shape']}" for i, s in said.items() if len(s) == 2}
    return [(row["image"], known[row["image_id"]]) for row in images if row["image_id"] in known]


def captioned(items: list[tuple[bytes, str]], wrong: random.Random | None = None) -> Any:
    """Drawings with their captions, or, drawn by `wrong`, each with one of another colour or shape."""
    texts = [text for _, text in items]
    if wrong is not None:
        texts = [wrong.choice([other for other in texts if other != text]) for text in texts]
    return open_questions([Question(image, None, (t,), i) for i, ((image, _), t) in enumerate(zip(items, texts))])


def measured(model: zoo.Model, test: Any) -> dict[str, float]:
    """The share of right captions under each control."""
    found = {}
    for quality in QUALITIES:
        task = OfQuality(Generate(answer_length=LENGTH), QUALITIES, always=quality)
        scores = zoo.evaluate(
            model, test, task=task, metrics={"right": Right()}, batch_size=250, record="", progress=False
        )
        found[quality] = scores["right"]
    return {**found, "controllability": found["good"] - found["bad"]}


def row(way: str, rates: tuple[float, float], data: Any, test: Any, seed: int, args: Any) -> dict[str, float]:
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
    zoo.run(
        model,
        "meet",
        data,
        **settings,
        control_lr=rates[0],
        lr=rates[1],
        answer_length=LENGTH,
        seed=seed,
        fit={"batch_size": 64, "progress": False},
    )
    return measured(model, test)


def sample(items: list[tuple[bytes, str]], count: int, seed: int) -> dict[str, Any]:
    """`count` drawings with a good caption each, and the same with a bad one."""
    source = random.Random(seed)
    chosen = source.sample(items, count)
    return {"good": captioned(chosen), "bad": captioned(chosen, source)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("ZOO_TEST_DATA", "../shared/data")))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--control-epochs", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--choose", action="store_true", help="try the rates on held-out training drawings, and stop")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    train = drawings(args.data / "easy_vqa", "train")
    held, train = train[:400], train[400:]
    if args.choose:
        data, val = sample(train, args.images, 1000), captioned(held)
        for way in RATES:
            for rates in (
                TRIED if way in ("MEET", "together") else ((TRIED[0], TRIED[2]) if way == "controls" else TRIED[:2])
            ):
                print(way, rates, row(way, rates, data, val, 1000, args), flush=True)
        return
    test = captioned(drawings(args.data / "easy_vqa", "test"))
    file = args.out / "meet.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    about = {"images": args.images, "control_epochs": args.control_epochs, "epochs": args.epochs}
    for seed in range(args.seeds):
        data = sample(train, args.images, seed)
        for way, rates in RATES.items():
            key = {"way": way, "seed": seed, "rates": list(rates), **about}
            if any(key.items() <= known.items() for known in rows):
                continue
            rows.append({**key, **row(way, rates, data, test, seed, args)})
            args.out.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(rows, indent=1) + "\n")
            print(rows[-1], flush=True)
    report(rows, about, args.out / "meet.md")


def report(rows: list[dict[str, Any]], about: dict[str, int], file: Path) -> None:
    """The table of these settings."""
    lines = [
        f"# MEET on `vl-t5-micro`: {about['images']} drawings, {about['control_epochs']} + {about['epochs']} epochs",
        "",
        "Captions of 1,000 test drawings that are right word by word, %, under each control; mean and deviation over seeds.",
        "Written by `benchmarks/meet.py`.",
        "",
        "| way | rates | right under good | right under bad | controllability | seeds |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for way, rates in RATES.items():
        own = [r for r in rows if r["way"] == way and r["rates"] == list(rates) and about.items() <= r.items()]
        if own:
            cells = []
            for name in (*QUALITIES, "controllability"):
                values = [100 * r[name] for r in own]
                deviation = statistics.stdev(values) if len(values) > 1 else 0.0
                cells.append(f"{statistics.mean(values):.1f} ± {deviation:.1f}")
            lines.append(f"| {way} | {rates[0]:g}, {rates[1]:g} | {' | '.join(cells)} | {len(own)} |")
    file.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
