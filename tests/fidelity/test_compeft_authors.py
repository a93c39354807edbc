"""ComPEFT against what the authors' code makes of the same tensors.

`compeft.json` holds, of prateeky2806/ComPEFT (commit 083ed51, `compress_and_update_parms` of `src/bert_eval.py` with
`topk_values_mask` of `src/merge_utils.py`), the magnitude and the sign of every number, for changes from 0 (LoRA) and from
1 (ia3); a key is "start/k/alpha". Their mask is `>=` the largest change that is not to be kept, so it keeps one number more
than k says: that one, the next in order of size, is the only difference.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from waves import wave

from zoo.disk.compeft import pack, unpack

AUTHORS: dict[str, Any] = json.loads((Path(__file__).parent / "compeft.json").read_text())
SHAPES = {"b.lora_b": (9, 4), "b.lora_a": (4, 12), "a.scale": (31,), "c.bias": (17,)}


@pytest.mark.parametrize("key", list(AUTHORS))
def test_equals_the_authors_vectors(key: str) -> None:
    start, k, alpha = (float(n) for n in key.split("/"))
    tensors = {name: start + wave(shape, i + 1, 0.3).float() for i, (name, shape) in enumerate(SHAPES.items())}
    found, _ = unpack(pack(tensors, {n: torch.full(s, start) for n, s in SHAPES.items()}, k, alpha))
    ours = torch.cat([(found[name] - start).reshape(-1) for name in sorted(found)])
    recorded = "".join(AUTHORS[key]["signs"][name] for name in sorted(SHAPES))
    theirs = torch.tensor(["-0+".index(c) - 1.0 for c in recorded])
    assert float(ours.abs().max()) == pytest.approx(AUTHORS[key]["magnitude"], rel=1e-5)

    changes = torch.cat([(tensors[name] - start).reshape(-1) for name in sorted(SHAPES)])
    order = changes.abs().argsort(descending=True)
    keep = int(len(changes) * k / 100)
    assert int(theirs.abs().sum()) == keep + 1 and int(ours.sign().abs().sum()) == keep
    extra = (theirs != ours.sign()).nonzero().reshape(-1).tolist()
    assert extra == [int(order[keep])] and theirs[extra[0]] == changes[extra[0]].sign()
