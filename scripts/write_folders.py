"""Write the saved adapters of tests/disk/written: what a version of this package writes, for later versions to read.

    python scripts/write_folders.py OUT

Folders that are there already stay as they are: they are the work of the version that wrote them. The outputs that each gave
then are in OUT/expected.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "parts"))

from written_folders import FOLDERS, fill, inputs, numbers  # type: ignore[import-not-found]

import zoo
from zoo.table import tiny_model


def main(out: Path) -> None:
    """Write what is missing."""
    file = out / "expected.json"
    expected = json.loads(file.read_text()) if file.is_file() else {}
    for name, (family, method, settings) in FOLDERS.items():
        if (out / name).is_dir():
            continue
        model, _ = tiny_model(family)
        fill(model.backbone)
        model.fingerprint = None  # of made-up weights, which nobody can load
        adapter = model.add_adapter(zoo.adapter(method, **settings))
        if adapter.needs_calibration:
            adapter.calibrate(model, [(inputs(model)[0], torch.tensor([0, 1]))])
        fill(model.adapters, scale=0.2)
        fill(model.heads)
        model.classes = [f"class {i}" for i in range(model.num_classes)] or None
        model.save_adapter(out / name)
        expected[name] = numbers(model)
        print(name, expected[name])
    file.write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
