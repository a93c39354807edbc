"""The study of parameter-efficient methods on AST, on real sounds: `ast-micro` on ESC-10 and on the speakers of FSDD.

    python benchmarks/ast_study.py --data <folder with fsdd/ and esc10/> --out runs/ast-study

| data set | training                                        | test                           |
| -------- | ----------------------------------------------- | ------------------------------ |
| esc10    | folds 1 to 3, 24 clips of each of 10 classes    | fold 4: 80 clips               |
| speakers | FSDD, 450 clips of each of 6 speakers           | FSDD's 300 test clips          |

The regime is `audio/regimes/ast_study.py`; `--methods`, `--shots`, `--budgets`, `--seeds` and `--epochs` are its settings. A run
that was killed goes on where it was (the same command); `--write` copies table, picture and rows into `benchmarks/results`.
`ast-micro` hears the first second of a clip. It was trained on FSDD's digits, so these are no task here; of the speakers it heard
the same voices.
"""

from __future__ import annotations

import argparse
import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import zoo
from audio.data.sounds import open_audio

RESULTS = Path(__file__).parent / "results"


def sounds(folder: Path, names: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Training and test data by name."""
    train: dict[str, Any] = {}
    test: dict[str, Any] = {}
    for name in names:
        if name == "esc10":
            train[name], test[name] = (open_audio(folder / "esc10", only={"fold": f}) for f in ([1, 2, 3], 4))
        else:
            train[name], test[name] = (
                open_audio(folder / "fsdd", split=part, label_column="speaker") for part in ("train", "test")
            )
    return train, test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("ZOO_TEST_DATA", "../shared/data")))
    parser.add_argument("--out", type=Path, default=Path("runs/ast-study"), help="state of the run, and its report")
    parser.add_argument("--sets", nargs="*", default=["esc10", "speakers"], choices=["esc10", "speakers"])
    parser.add_argument("--methods", nargs="*", default=[])
    parser.add_argument("--shots", type=int, nargs="*", default=[8])
    parser.add_argument("--budgets", type=int, nargs="*", default=[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--rates", type=json.loads, default={"head": 5e-3, "full": 5e-4}, help="other rates, as JSON")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--device")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--write", metavar="NAME", help="copy the report to benchmarks/results under this name")
    args = parser.parse_args()
    train, test = sounds(args.data, args.sets)
    model = zoo.load("ast-micro", num_classes=0)
    # for few tokens on a CPU, the fused product's backward takes longer than the plain ones
    with nullcontext() if torch.cuda.is_available() else sdpa_kernel(SDPBackend.MATH):
        report = zoo.run(
            model,
            "ast-study",
            train,
            test,
            out=args.out,
            methods=args.methods,
            shots=args.shots,
            budgets=args.budgets,
            seeds=args.seeds,
            epochs=args.epochs,
            rates=args.rates,
            fit={"precision": args.precision, "device": args.device, "progress": not args.quiet},
        )
    print(report.table())
    print("best first:", ", ".join(report.summary["order"]))
    if args.write:
        (RESULTS / f"{args.write}.md").write_text(report.table() + "\n")
        (RESULTS / f"{args.write}.png").write_bytes(report.picture())
        record = {"settings": report.regime.config(), "fingerprint": model.fingerprint, **report.summary}
        (RESULTS / f"{args.write}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
