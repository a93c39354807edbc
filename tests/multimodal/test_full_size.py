"""What the large models take, counted on `meta`: attaching costs seconds, training fits into 24 GB beside its activations."""

from __future__ import annotations

import resource
import time
from typing import Any

import pytest
import torch

import zoo

pytest.importorskip("transformers", reason="the extra 'multimodal' is not installed")

LORA = zoo.adapter("lora", rank=8, targets="text.**.attn.{q,k,v,o}")


@pytest.mark.parametrize(
    ("name", "method", "trained", "gigabytes"),
    [
        ("cogvideox-5b-i2v", "videopainter", 298_106_368, 15.911),
        ("llama-7b", "llama-adapter-v2", None, 14.507),
        ("qwen2.5-vl-3b", LORA, 3_686_400, 7.568),
    ],
)
def test_a_minute_and_24_gigabytes(name: str, method: Any, trained: int | None, gigabytes: float) -> None:
    """The frozen network in half precision; of what is trained values, gradients and AdamW's two moments in single precision."""
    if name.startswith("cogvideox"):
        pytest.importorskip("diffusers", reason="the extra 'multimodal' is not installed")
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = zoo.load(name, method, device="meta")
    count = model.num_parameters(trainable=True)
    assert time.process_time() - began < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # kB: nothing of it is really there
    assert trained is None or count == trained
    assert all(p.is_meta for p in model.parameters())
    frozen = sum(p.numel() for p in model.backbone.parameters())
    needed = (frozen * torch.finfo(torch.bfloat16).bits // 8 + count * 4 * 4) / 1e9
    assert needed == pytest.approx(gigabytes, abs=0.02) and needed < 24
