"""ComPEFT: a trained adapter as one number and a sign at a few places.

Idea: what training changed is kept by its signs alone, at the places where it changed most, with one magnitude for all.

    tau    = theta - theta_0, all floating parameters of one adapter as one vector (d,), in order of their sorted names
    kept   = the floor(k d / 100) entries of largest |tau|; of equal ones the first
    tau'   = alpha std(tau) sign(tau) at the kept places, 0 elsewhere;  std over all d entries, with d - 1
    theta' = theta_0 + tau'

theta_0 is what attaching gives: 1 for factors (ia3, ssf), the backbone's own values for what is trained in their place (bitfit,
norm, full; the file holds the changes, which are added when it is loaded), and 0 where attaching draws at random (the factors of
LoRA), which no file could repeat. Defaults: k 20, alpha 1, those of the authors' code; both are to be chosen on validation data,
k from 5, 10, 20, 30, 50 and alpha from 0.5 to 10.

Places are stored as gaps g >= 0 of zeros by Golomb-Rice: floor(g / 2^b) in unary, b further bits, and a bit for the sign. Bits
for each of d numbers of which a share p is kept, without the 16 of the magnitude (phi the golden ratio):

    entropy  -(1-p) log2(1-p) - p log2(p/2)                             0.3364 at 5 %, 0.9219 at 20 %, 1.5 at 50 %
    Golomb   p (b + 1/(1-(1-p)^(2^b)) + 1),  b = 1 + floor(log2(ln(phi-1)/ln(1-p)))        0.3393,   0.9388,   1.5

The paper finds next to no loss at 8 to 50 times less than 16 bits, the larger the network. On `vit-micro` and `ast-micro`, with
alpha chosen, a LoRA keeps nine tenths of what it adds to the head at k = 30, about 0.6 at 20, and a third and a seventh at 5;
with alpha 1 nothing at 5 (`benchmarks/compeft.py`).

Source: Yadav, Choshen, Raffel, Bansal, "ComPEFT: Compression for Communicating Parameter Efficient Updates via Sparsification and
Quantization", 2023, and the code that they published.

Deviations: their mask (`>=` the value that is not kept) keeps one entry more than k says, and all equal ones; here it is exactly
k. They have no coder: this one is ours, with b chosen for each tensor, since A and B of a LoRA are not kept to the same share.
Tensors of one number (gates, scales) stay as they are: a sign would be all that is left of them. Buffers and the head do, too.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zoo.errors import ConfigError, WeightsError

__all__ = ["LEAST", "Packed", "entropy_bits", "golomb_bits", "pack", "table", "ternary", "unpack"]

LEAST = 0.1  # per cent; a file then says how large its tensors may be: at most 2000 numbers for each sign
_TABLE = 64 * 2**20  # bytes of a table that is unpacked
_TYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_PARTS = ("table", "unary", "rests", "signs")


class Packed(NamedTuple):
    """A row of the table: one tensor. `start` is None where the file holds changes of what attaching gives."""

    name: str
    dtype: str
    shape: list[int]
    start: float | None
    kept: int
    bits: int  # of a gap that are stored behind its unary part


def entropy_bits(count: int, share: float) -> float:
    """Bits that `count` numbers need at least if a `share` of them has a sign and the others are 0; 0 < share <= 1."""
    rest = 1 - share
    return count * (-(rest * math.log2(rest) if rest else 0.0) - share * math.log2(share / 2)) + 16


def golomb_bits(count: int, share: float) -> float:
    """Bits of the paper's code for places that are kept independently of each other; 0 < share < 1."""
    golden = (1 + math.sqrt(5)) / 2
    b = max(0, 1 + math.floor(math.log2(math.log(golden - 1) / math.log(1 - share))))
    return share * count * (b + 1 / (1 - (1 - share) ** (2**b)) + 1) + 16


def ternary(vector: np.ndarray[Any, Any], k: float, alpha: float) -> tuple[np.ndarray[Any, Any], float]:
    """The kept places of a vector (d,), ascending, and the magnitude; fewer places only where more entries are 0."""
    size = np.abs(vector)
    keep = int(len(vector) * k / 100)
    if not keep:
        return np.zeros(0, np.int64), 0.0
    least = np.partition(size, len(size) - keep)[len(size) - keep]
    above = np.flatnonzero(size > least)
    equal = np.flatnonzero(size == least)[: keep - len(above)] if least > 0 else above[:0]
    return np.sort(np.concatenate([above, equal])), float(alpha * vector.std(ddof=1, dtype=np.float64))


def pack(
    tensors: Mapping[str, Tensor], starts: Mapping[str, Tensor | None], k: float, alpha: float
) -> dict[str, Tensor]:
    """The parts of one adapter's tensors, each of more than one floating number; `starts` has None for what is random.

    Raises:
        WeightsError: NaN or Inf. ConfigError: nothing to keep, or so little that places and signs are the wrong form.
    """
    names = sorted(tensors)
    changes = {}
    for name in names:
        value, start = tensors[name].detach().cpu().float(), starts.get(name)
        changes[name] = (value if start is None else value - start.cpu().float()).reshape(-1).numpy()
        if not np.isfinite(changes[name]).all():
            raise WeightsError(
                f"tensor '{name}' has values that are NaN or Inf, so there is nothing to compress. The run that made it "
                "diverged: train again with a lower learning rate, or use an earlier checkpoint."
            )
    vector = np.concatenate([changes[name] for name in names]) if names else np.zeros(0, np.float32)
    places, scale = ternary(vector, k, alpha)
    if len(places) < len(vector) * LEAST / 100 or not len(places) or not scale:
        raise ConfigError(
            f"of {len(vector):,} numbers {len(places):,} would be kept (k={k:g}, and {np.count_nonzero(vector):,} differ from "
            f"their start); compeft needs one at least, and {LEAST} % of all. Take a larger k, or encoding='sparse'."
        )
    rows, unary, rests, ahead, behind = [], [], [], 0, 0
    for name in names:
        tensor, start = tensors[name], starts.get(name)
        own = places[slice(*np.searchsorted(places, [ahead, ahead + tensor.numel()]))] - ahead
        gaps = np.diff(own, prepend=-1) - 1
        bits = _rice(gaps)
        ones = np.cumsum((gaps >> bits) + 1) - 1
        stretch = np.zeros(int(ones[-1]) + 1 if len(ones) else 0, np.uint8)
        stretch[ones] = 1
        unary.append(stretch)
        rests.append(((gaps[:, None] >> np.arange(bits)) & 1).astype(np.uint8).reshape(-1))
        rows.append(
            Packed(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), _constant(start), len(own), bits)
        )
        ahead += tensor.numel()
        behind += len(own)
    head = json.dumps({"scale": scale, "k": k, "alpha": alpha, "tensors": rows}, separators=(",", ":"))
    return {
        "table": torch.frombuffer(bytearray(zlib.compress(head.encode(), 9)), dtype=torch.uint8),
        "unary": _bits(np.concatenate(unary)),
        "rests": _bits(np.concatenate(rests)),
        "signs": _bits((vector[places] < 0).astype(np.uint8)),
    }


def unpack(parts: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """Tensors by name, and the names of those that are changes of what attaching gives.

    Raises:
        ValueError, KeyError: parts that are not what `pack` makes, said in words.
    """
    for part in _PARTS:
        if parts[part].dtype != torch.uint8 or parts[part].ndim != 1:
            raise ValueError(f"'{part}' is no row of bytes")
    head, rows = table(parts)
    kept, size = sum(row.kept for row in rows), sum(math.prod(row.shape) for row in rows)
    if not 1 <= kept <= size <= 2 * kept * 100 / LEAST:
        raise ValueError(f"{kept} signs for {size} numbers")
    signs = _unbits(parts["signs"], kept, "signs")
    rests = _unbits(parts["rests"], sum(row.kept * row.bits for row in rows), "rests")
    ones = np.flatnonzero(np.unpackbits(parts["unary"].numpy(), bitorder="little")).astype(np.int64)
    if len(ones) != kept or -(-(int(ones[-1]) + 1) // 8) != len(parts["unary"]):
        raise ValueError(f"{len(ones)} places for {kept} signs")
    wholes = np.diff(ones, prepend=-1) - 1
    found, moved, at, bit = {}, set(), 0, 0
    for row in rows:
        own = rests[bit : bit + row.kept * row.bits].reshape(row.kept, row.bits).astype(np.int64)
        gaps = (wholes[at : at + row.kept] << row.bits) + (own << np.arange(row.bits)).sum(axis=1)
        places = np.cumsum(gaps + 1) - 1
        count = math.prod(row.shape)
        if row.kept and int(places[-1]) >= count:
            raise ValueError(f"'{row.name}' has {count} numbers and a place {int(places[-1])}")
        flat = np.full(count, 0.0 if row.start is None else row.start, np.float32)
        flat[places] += np.where(signs[at : at + row.kept], -head["scale"], head["scale"]).astype(np.float32)
        found[row.name] = torch.from_numpy(flat).reshape(row.shape).to(_TYPES[row.dtype])
        if row.start is None:
            moved.add(row.name)
        at, bit = at + row.kept, bit + row.kept * row.bits
    return found, moved


def table(parts: Mapping[str, Tensor]) -> tuple[dict[str, Any], list[Packed]]:
    """Scale, k and alpha, and a row for each tensor. Raises ValueError for anything else."""
    unzip = zlib.decompressobj()
    try:
        text = unzip.decompress(parts["table"].numpy().tobytes(), _TABLE)
    except zlib.error as error:
        raise ValueError(f"the table is damaged: {error}") from error
    if not unzip.eof or unzip.unused_data:
        raise ValueError("the table is cut short, or too long")
    head = json.loads(text)
    if not isinstance(head, dict) or head.keys() != {"scale", "k", "alpha", "tensors"}:
        raise ValueError("the table has other fields")
    numbers = [head[key] for key in ("scale", "k", "alpha")]
    if not all(type(n) in (int, float) and 0 < n < 1e30 for n in numbers):
        raise ValueError(f"scale, k and alpha are {numbers}")
    if not isinstance(head["tensors"], list):
        raise ValueError("the table has no tensors")
    rows = []
    for one in head["tensors"]:
        if not isinstance(one, list) or len(one) != len(Packed._fields):
            raise ValueError(f"the table has the row {one!r:.60}")
        row = Packed(*one)
        whole = [*row.shape, row.kept, row.bits] if isinstance(row.shape, list) and len(row.shape) <= 16 else [-1]
        if not all(type(n) is int and 0 <= n < 2**40 for n in whole) or row.bits > 40 or row.dtype not in _TYPES:
            raise ValueError(f"the table has the row {one!r:.60}")
        if not isinstance(row.name, str) or not (row.start is None or isinstance(row.start, float)):
            raise ValueError(f"the table has the row {one!r:.60}")
        if row.start is not None and not math.isfinite(row.start):
            raise ValueError(f"the table has the start {row.start}")
        rows.append(row)
    if len({row.name for row in rows}) != len(rows):
        raise ValueError("the table names a tensor twice")
    return head, rows


def _constant(start: Tensor | None) -> float | None:
    """The number of which a start consists: 0 for a random one; None: it is not one number."""
    if start is None:
        return 0.0
    first = start.reshape(-1)[0]
    return float(first) if bool((start == first).all()) else None


def _rice(gaps: np.ndarray[Any, Any]) -> int:
    """The number of bits behind the unary part with which the gaps are shortest."""
    if not len(gaps):
        return 0
    near = max(0, int(math.log2(float(gaps.mean()) + 1)))
    costs = {b: len(gaps) * b + int((gaps >> b).sum()) for b in (near, near + 1, max(0, near - 1))}
    return min(costs, key=lambda b: (costs[b], b))


def _bits(bits: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(np.packbits(bits, bitorder="little"))


def _unbits(packed: Tensor, count: int, what: str) -> np.ndarray[Any, Any]:
    if len(packed) != -(-count // 8):
        raise ValueError(f"{len(packed)} bytes of {what} for {count} bits")
    return np.unpackbits(packed.numpy(), count=count, bitorder="little")
