"""Put a trained small member into the package, and write its card from the log of the run that made it.

python scripts/embed_micro.py swin-micro --run runs/swin-micro
"""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import zoo

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
WORDS = yaml.safe_load((Path(__file__).parent / "member_cards.yaml").read_text())
CARD = """---
license: apache-2.0
library_name: adapter-zoo
pipeline_tag: {tag}
tags: [adapter-zoo, {family}]
datasets: [{datasets}]
---

# {name}

{about}

```python
import zoo
{example}
```

| measured | value |
| --- | --- |
{numbers}
| training loss of the last epoch | {loss} |
| epochs | {epochs} |
| seconds of training ({device}, shared machine) | {seconds:,.0f} |
| fingerprint | `{fingerprint}` |

## Training

`{script}` with the arguments

{arguments}

{training}

{learned}## Licence

{data}
"""
LEARNING = """## Adapted to another task

2,000 images of CIFAR-10 (200 of each class) for training, all 10,000 test images; mean and deviation over {seeds} seeds, the last
of {epochs} epochs (`benchmarks/learning.py`):

{table}
"""
FAMILIES = """## Adapted to other tasks

What the tasks are, and how they were trained: `benchmarks/families.py`. Mean and deviation over the seeds, the last epoch counts.

{table}

"""
REWARDS = """Behind a system message that it does not know, half of what it writes is cut off or without tags. Exact answers in
their tags to questions about drawings of the test split, and answers in their form, per cent, mean and deviation over {seeds}
seeds; each arm a LoRA of rank 8, {steps} steps of {prompts} questions (`benchmarks/curr_reft.py`). {said}"""


def words(text: str, **numbers: Any) -> str:
    """A text of `member_cards.yaml` with its phrases and numbers, in lines of 120 characters."""
    for key, phrase in WORDS["phrases"].items():
        text = text.replace(f"[{key}]", phrase)
    return textwrap.fill(text.format(**numbers), 120, break_on_hyphens=False, break_long_words=False)


@dataclass
class Log:
    """What a run wrote: its arguments, its epochs and its final numbers."""

    arguments: dict[str, str]
    epochs: list[dict[str, float]]
    final: dict[str, float]


def learned(name: str, fingerprint: str) -> str:
    """The sections with what benchmarks measured on these very weights."""
    found = ""
    if name == "vit-micro" and (RESULTS / "learning.md").exists():
        record = json.loads((RESULTS / "learning.json").read_text())
        if record["backbone"] == fingerprint:
            seeds = record["summary"][0]["seeds"]
            table = (RESULTS / "learning.md").read_text()
            found += LEARNING.format(seeds=seeds, epochs=record["epochs"], table=table)
    if name == "vlm-micro" and (RESULTS / "curr_reft.json").exists():
        record = json.loads((RESULTS / "curr_reft.json").read_text())
        if record["backbone"] == fingerprint:
            given = record["arguments"]
            seeds = len({r["seed"] for r in record["runs"]})
            table = (RESULTS / "curr_reft.md").read_text().strip()
            said = WORDS["members"][name]["rewards"].strip()
            text = words(REWARDS, seeds=seeds, steps=given["steps"], prompts=given["prompts"], said=said)
            found += f"## Adapted by rewards\n\n{text}\n\n{table}\n\n"
    if (RESULTS / "families.json").exists():
        record = json.loads((RESULTS / "families.json").read_text())
        if record["fingerprints"].get(name) == fingerprint:
            lines = (RESULTS / "families.md").read_text().splitlines()
            table = "\n".join([*lines[:2], *(line for line in lines[2:] if f"| {name} |" in line)])
            found += FAMILIES.format(table=table)
    return found


def numbers(log: Log, labels: dict[str, str]) -> str:
    """Rows of the table: the final numbers, with the words of the member; shares as per cent."""
    rows = []
    for key, label in labels.items():
        value = log.final[key]
        shown = f"{100 * value:.2f} %" if isinstance(value, float) and value <= 1 else f"{value:,}"
        rows.append(f"| {label.format(**log.final)} | {shown} |")
    return "\n".join(rows)


def kept(old: str, new: str) -> str:
    """The new card with the sections of the old one that it does not write itself, such as those by hand, before the licence."""
    known = [part.partition("\n")[0] for part in new.split("\n## ")[1:]]
    own = [part for part in old.split("\n## ")[1:] if part.partition("\n")[0] not in known]
    head, mark, licence = new.rpartition("## Licence\n")
    return head + "".join(f"## {part.strip()}\n\n" for part in own) + mark + licence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(WORDS["members"]))
    parser.add_argument(
        "--run", type=Path, help="default: runs/<name>; without one only the card's sections are written anew"
    )
    args = parser.parse_args()
    name, member = args.name, WORDS["members"][args.name]
    weights = ROOT / member["package"] / "weights" / f"{name}.safetensors"
    log_file = ROOT / "model_cards" / f"{name}.log.json"
    run = args.run or ROOT / "runs" / name
    if (run / f"{name}.safetensors").exists():
        weights.parent.mkdir(exist_ok=True)
        for file in (f"{name}.safetensors", *member.get("files", ())):
            shutil.copyfile(run / file, weights.with_name(file))
        record = json.loads((run / "log.json").read_text())
        skip = ("data", "out", "limit_steps", "limit_clips", "limit_questions", "name", "member")
        record["arguments"] = {k: v for k, v in record["arguments"].items() if k not in skip}
        log_file.write_text(json.dumps(record, indent=1) + "\n")
    elif not (weights.exists() and log_file.exists()):
        raise SystemExit(f"There is neither a finished run in {run} nor an embedded member to write anew.")
    log = Log(**json.loads(log_file.read_text()))
    model = zoo.load(name)
    options = dict(log.arguments)
    text = CARD.format(
        name=name,
        family=model.family.family,
        tag=member["tag"],
        datasets=", ".join(member["datasets"]),
        about=words(
            member["about"], parameters=f"{model.num_parameters():,}", size=f"{weights.stat().st_size / 1e6:.1f}"
        ),
        example=member["example"].format(name=name).strip(),
        numbers=numbers(log, member["numbers"]),
        loss=log.epochs[-1]["loss"],
        epochs=len(log.epochs),
        seconds=sum(e["seconds"] for e in log.epochs),
        device=options.pop("device"),
        fingerprint=model.fingerprint,
        script=member["script"],
        training=words(member["training"] + " The machine was shared, so the seconds say little about speed."),
        arguments="\n".join(f"- `--{k.replace('_', '-')} {v}`" for k, v in options.items()),
        learned=learned(name, model.fingerprint),
        data=words("The weights: Apache-2.0. " + member["data"]),
    )
    card = ROOT / "model_cards" / f"{name}.md"
    if card.exists():
        text = kept(card.read_text(), text)
    card.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
