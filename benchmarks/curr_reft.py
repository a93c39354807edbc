"""Learning by rewards on `vlm-micro`: a curriculum, the same exercises in random order, supervised tuning; equal steps.

    python benchmarks/curr_reft.py --data <folder with easy_vqa/> --out runs/curr_reft

`vlm-micro` knows one system message behind which it thinks in tags; here it is given another one, `ASKED`, and half of
what it writes is then cut off or without tags. Exercises of the seven kinds of easy-VQA's questions on which it was
trained (`scripts/easy_vqa_kinds.py`), about drawings of the train split: yes or no, a choice of three, open. Every arm
starts from `vlm-micro` with a fresh LoRA and takes as many steps of as many questions:

    curriculum   judge, choice, open: one stage after the other, each a third of the steps
    mixed        the same exercises in random order in one stage: plain GRPO
    supervised   the same exercises with their answers behind the thought that is right, as in the pretraining
    improved     the curriculum at its best rate, then supervised tuning on those of its own answers that the rule keeps: a third
                 more steps, so it is read beside the curriculum that it goes on from

What is measured: the share of exact answers, greedy, in their tags, to questions about drawings of the test split, of the
seen kinds and of the three kinds that no training here or before has asked; as many of each kind. Questions are drawn as
the data hold them: to "is there a red shape?" the answer is mostly no, to "is there not a red shape?" mostly yes. The
learning rate of each arm is the best of `--rates` for the seen kinds on drawings of the train split that no arm is
trained on (first seed); the test split is measured after that, three seeds. Where the time goes is measured in a short
training: generation, log-probabilities (forward passes of policy and reference), rewards.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from easy_vqa_kinds import LEFT_OUT, Row, images, rows

import zoo
from multimodal.data.exercises import Exercise, as_choice, open_exercises
from multimodal.metrics.rewards import form
from multimodal.regimes.curr_reft import CurrReFT
from multimodal.regimes.parts.grpo import Scores
from multimodal.regimes.parts.tuning import Tuning, write
from zoo.data.seeds import seed_everything
from zoo.disk import write_file

ASKED = (
    "reason, then answer in tags."  # no system message of its training: half of its answers have no closed tags then
)
VALIDATION = 400  # drawings of the train split that no arm is trained on: the last ones


def of_each(kept: list[Row], draw: random.Random, each: int) -> list[Row]:
    """`each` questions of every kind, as they are drawn: how often the answer is yes is a kind's own."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in kept:
        groups[row.kind].append(row)
    return [row for _, group in sorted(groups.items()) for row in draw.sample(group, min(len(group), each))]


def exercise(row: Row, seen: dict[int, bytes], level: str, draw: random.Random) -> Exercise:
    """A question as an exercise."""
    made = Exercise(seen[row.image], row.question, row.answer, "judge" if row.answer in ("yes", "no") else "open")
    if level == "choice":
        return as_choice(made, draw.sample([a for a in row.pool if a != row.answer], 2), draw)
    return made


class Setting:
    """Data of all arms."""

    def __init__(self, folder: Path, steps: int, prompts: int, each: int) -> None:
        draw, pictures = random.Random(0), images(folder, "train")
        asked = [row for row in rows(folder, "train") if row.kind not in LEFT_OUT and row.tagged]
        last = set(sorted(pictures)[-VALIDATION:])
        train = [row for row in asked if row.image not in last]
        judged = [row for row in train if row.answer in ("yes", "no")]
        opened = [row for row in train if row.answer not in ("yes", "no")]
        count = steps * prompts // 3
        self.train: list[tuple[Exercise, str]] = []
        for level, part in (
            ("judge", draw.sample(judged, count)),
            ("choice", draw.sample(opened, count)),
            ("open", draw.sample(opened, count)),
        ):
            for row in part:
                made = exercise(row, pictures, level, draw)
                self.train.append((made, str(row.tagged).replace(f"<answer>{row.answer}<", f"<answer>{made.answer}<")))
        held = of_each([row for row in asked if row.image in last], draw, each)
        self.validation = {"seen": [exercise(row, pictures, "", draw) for row in held]}
        pictures, asked = images(folder, "test"), rows(folder, "test")
        self.test = {
            name: [
                exercise(row, pictures, "", draw)
                for row in of_each([r for r in asked if (r.kind in LEFT_OUT) == (name == "left out")], draw, each)
            ]
            for name in ("seen", "left out")
        }


def measured(model: Any, parts: dict[str, list[Exercise]]) -> dict[str, float]:
    """Shares of exact answers, and of answers in their form."""
    found = {}
    for name, exercises in parts.items():
        scores, texts = Scores(exercises), write(model, exercises, ASKED, length=12, at_once=128)
        found[name] = sum(scores.score(t, e) for t, e in zip(texts, exercises, strict=True)) / len(exercises)
        found[f"{name}, form"] = sum(map(form, texts)) / len(texts)
    return found


def run(
    arm: str, setting: Setting, args: argparse.Namespace, rate: float, seed: int, learned: float = 1e-3
) -> tuple[Any, float, dict[str, int]]:
    """(the trained model, seconds of training, what else is known); `learned`: the curriculum's rate, of the arm `improved`."""
    improved = arm == "improved"
    arm = "curriculum" if improved else arm  # with its seed, too
    seed_everything(seed, arm)
    facts: dict[str, int] = {}
    model = zoo.load("vlm-micro", zoo.adapter("lora", rank=8, targets="all-linear"))
    data = open_exercises([e for e, _ in setting.train])
    began, third = time.perf_counter(), args.steps // 3
    if arm == "supervised":
        texts = tuple(text for _, text in setting.train)
        tuning = Tuning(texts, steps=3 * third, prompts=args.prompts, lr=rate, system=ASKED, seed=seed)
        tuning.train(model, data, None, {})
    else:
        stages = ("judge", "choice", "open") if arm == "curriculum" else ("judge+choice+open",)
        regime = CurrReFT(
            stages=stages,
            steps=tuple([third] * 3 if arm == "curriculum" else [3 * third]),
            epochs=(1,) * len(stages),
            generations=(args.generations,) * len(stages),
            prompts=args.prompts,
            lr=learned if improved else rate,
            length=12,
            system=ASKED,
            improve=improved,
            improve_steps=third,
            improve_lr=rate,
            improve_prompts=args.prompts,
            seed=seed,
        )
        report = zoo.run(model, regime, data)
        if improved:
            facts = {"kept": report.summary["kept"], "of": len(data)}
    return model, time.perf_counter() - began, facts


def profile(setting: Setting, args: argparse.Namespace) -> dict[str, float]:
    """Shares of a short training's time: generation, rewards."""
    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Any) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                spent[name] += time.perf_counter() - began

        call.__name__ = getattr(function, "__name__", name)
        return call

    import trl

    trainer, parts = (
        trl.GRPOTrainer,
        {"generation": "_generate", "log-probabilities": "_get_per_token_logps_and_entropies"},
    )
    kept: dict[tuple[Any, str], Any] = {(trainer, name): getattr(trainer, name) for name in parts.values()}
    kept |= {(Scores, name): getattr(Scores, name) for name in ("accuracy", "form")}
    for part, name in parts.items():
        setattr(trainer, name, timed(part, getattr(trainer, name)))
    for name in ("accuracy", "form"):
        setattr(Scores, name, timed("rewards", getattr(Scores, name)))
    try:
        began, short = time.perf_counter(), argparse.Namespace(**{**vars(args), "steps": 30})
        run("mixed", setting, short, 1e-4, 0)
        seconds = time.perf_counter() - began
    finally:
        for (owner, name), function in kept.items():
            setattr(owner, name, function)
    return {"seconds of a step": seconds / 30, **{name: value / seconds for name, value in spent.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("ZOO_TEST_DATA", "../shared/data")))
    parser.add_argument("--out", type=Path, default=Path("runs/curr_reft"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--generations", type=int, default=4)
    parser.add_argument("--each", type=int, default=60, help="questions of each kind that are measured")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 4e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=["curriculum", "mixed", "supervised", "improved"])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "curr_reft.json"
    setting = Setting(args.data, args.steps, args.prompts, args.each)
    record: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"chosen": {}, "rates": {}, "runs": []}
    given = {k: str(v) for k, v in vars(args).items() if k not in ("data", "out")}
    other = {
        k: v for k, v in record.get("arguments", {}).items() if k not in ("seeds", "arms", "rates") and v != given[k]
    }
    if other:
        raise SystemExit(f"{file} holds runs of {other}; name another folder by --out")
    record["arguments"] = given

    def keep() -> None:
        write_file(file, (json.dumps(record, indent=1) + "\n").encode())
        print(json.dumps({k: record[k] for k in ("rates", "runs")})[-400:], flush=True)

    if "start" not in record:
        model = zoo.load("vlm-micro")
        record["backbone"] = model.fingerprint
        record["start"] = {**measured(model, setting.test), "validation": measured(model, setting.validation)["seen"]}
        record["questions"] = {
            name: len(part) for name, part in {**setting.test, "validation": setting.validation["seen"]}.items()
        }
        record["profile"] = profile(setting, args)
        keep()
    trained: dict[tuple[str, str, int], tuple[Any, float, dict[str, int]]] = {}

    def best() -> float:
        """The rate of the curriculum, where it is known."""
        return float(record["chosen"].get("curriculum", args.rates[0]))

    for arm in args.arms:
        for rate in map(str, args.rates):
            tried = record["rates"].setdefault(arm, {})
            if rate not in tried:
                trained[arm, rate, args.seeds[0]] = run(arm, setting, args, float(rate), args.seeds[0], best())
                tried[rate] = measured(trained[arm, rate, args.seeds[0]][0], setting.validation)["seen"]
                keep()
        record["chosen"][arm] = max(record["rates"][arm], key=lambda r: record["rates"][arm][r])
    for seed in args.seeds:
        for arm in args.arms:
            if not any(r["arm"] == arm and r["seed"] == seed for r in record["runs"]):
                rate = record["chosen"][arm]
                model, seconds, facts = trained.get((arm, rate, seed)) or run(
                    arm, setting, args, float(rate), seed, best()
                )
                found = measured(model, setting.test)
                record["runs"].append({"arm": arm, "seed": seed, "seconds": seconds, **facts, **found})
                keep()
    names = ("seen", "left out", "seen, form", "left out, form")
    lines = ["| | rate | exact, seen kinds | exact, left-out kinds | in tags, seen | in tags, left out |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    shown = " | ".join(f"{100 * record['start'][name]:.1f}" for name in names)
    lines.append(f"| `vlm-micro` | | {shown} |")
    for arm in args.arms:
        cells = []
        for name in names:
            values = [100 * r[name] for r in record["runs"] if r["arm"] == arm]
            cells.append(f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}")
        lines.append(f"| {arm} | {record['chosen'][arm]} | {' | '.join(cells)} |")
    write_file(args.out / "curr_reft.md", ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


if __name__ == "__main__":
    main()
