"""What the tensors of a compressed folder take, beside what they need at least (`zoo.disk.compeft`)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from zoo.disk.compeft import entropy_bits, golomb_bits, table
from zoo.disk.layout import WEIGHTS, unpack
from zoo.disk.saved import read, read_weights_file

__all__ = ["sizes"]


def sizes(folder: str | Path) -> dict[str, dict[str, Any]]:
    """For each adapter that the codec `compeft` packed: how many numbers, how many signs, and bytes.

    "bytes" are those of its places, signs and table in the file, "table" those of the table alone, "golomb" and "entropy" those
    of the formulas at the share that is kept, "half" those of the numbers in 16 bits; "ratio" is half over bytes. "by_tensor" is
    the formula with the share of each tensor, summed: less than "golomb" where tensors are kept to different shares.

    Raises:
        ConfigError, WeightsError: as `zoo.disk.read`.
    """
    saved, path = read(folder), Path(folder) / WEIGHTS
    stored, copy, _ = unpack(read_weights_file(Path(folder)), path)
    found: dict[str, dict[str, Any]] = {}
    for owner in copy["config"].get("encoding", {}).get("packed", {}):
        parts = {name.removeprefix(f"{owner}/#"): t for name, t in stored.items() if name.startswith(f"{owner}/#")}
        head, rows = table(parts)
        count, kept = sum(math.prod(row.shape) for row in rows), sum(row.kept for row in rows)
        taken, share = sum(t.numel() for t in parts.values()), kept / count
        found[owner] = {
            "codec": saved.codec,
            "k": head["k"],
            "alpha": head["alpha"],
            "numbers": count,
            "kept": kept,
            "bytes": taken,
            "table": parts["table"].numel(),
            "golomb": _golomb(count, share) / 8,
            "by_tensor": sum(_golomb(math.prod(row.shape), row.kept / math.prod(row.shape)) for row in rows) / 8,
            "entropy": entropy_bits(count, share) / 8,
            "half": 2 * count,
            "ratio": 2 * count / taken,
        }
    return found


def _golomb(count: int, share: float) -> float:
    """Bits by the formula, also where nothing is kept, or all."""
    return golomb_bits(count, share) if 0 < share < 1 else 16 + 2.0 * count * share
