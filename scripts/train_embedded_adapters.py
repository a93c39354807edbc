"""Train the adapters of `vit-micro` for handwritten digits that ship with the package, with their cards.

    python scripts/train_embedded_adapters.py --methods lora vpt spt

The data, split and settings are those of the demo (`zoo/demo.py`). Weights are rounded to fp16 first; the accuracy in the card is
that of the rounded weights on the test images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import zoo
from zoo.cli.demo import BACKBONE, digits, train_one

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=["lora", "vpt", "spt"])
    parser.add_argument("--epochs", type=int, default=12)
    args = parser.parse_args()
    for method in args.methods:
        model, _, _ = train_one(method, args.epochs)
        with torch.no_grad():
            for parameter in model.parameters_to_train().values():
                parameter.copy_(parameter.half())
        _, _, test = digits(model)
        accuracy = zoo.evaluate(model, test, progress=False)["accuracy"]
        model.record["metrics"] = {"test": {"accuracy": round(accuracy, 4)}}
        name = f"{BACKBONE}-{method}-digits"
        folder = model.save_adapter(ROOT / "vision" / "weights" / name, dtype=torch.float16)
        (ROOT / "model_cards" / f"{name}.md").write_text((folder / "README.md").read_text())
        print(f"{name}: {100 * accuracy:.1f} % of {len(test)} test images")  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
