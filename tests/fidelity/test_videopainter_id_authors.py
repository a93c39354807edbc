"""VideoPainter's ID adapter against numbers recorded from the authors' code, and its count at full size.

`videopainter_id.json` holds what TencentARC/VideoPainter (commit bbab6cd, `CogVideoXAttnProcessor2_0_resample` in their fork of
diffusers 0.31) gives on the model of `test_videopainter_authors`, in float64: with the masked tokens of its own pass ("own"), and
with those of a window before, at a weight of 0.5 ("before"); gradients are those of projections of the first block and of the
keys of the last, which LoRA's B has times A.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from test_videopainter_authors import SMALL
from waves import fill, summary, wave

import zoo

AUTHORS: dict[str, Any] = json.loads((Path(__file__).parent / "videopainter_id.json").read_text())


def close(found: Tensor, numbers: list[float], tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found.double(), torch.tensor(numbers, dtype=torch.float64), rtol=1e-5, atol=tolerance)


def test_equals_the_authors_code() -> None:
    adapter = zoo.adapter("videopainter-id", rank=32, alpha=32.0)
    model = zoo.load("cogvideox-5b-i2v", adapter, pretrained=False, **SMALL).double().eval()
    fill(dict(model.backbone.named_parameters()))
    parts = model.adapters["videopainter-id"].double()
    for name, parameter in parts.named_parameters():  # A = 1, so that the gradient of B is that of the weight
        if name.endswith("lora_a"):
            parameter.data.copy_(torch.eye(32))
    mask = torch.zeros(2, 3, 1, 8, 8, dtype=torch.float64)
    mask[0, 1:, :, 2:5, 3:7] = 1
    mask[1, 2, :, 0:1, 0:1] = 1
    before = torch.zeros_like(mask)
    before[..., 4:, 1:5] = 1
    latents, image, text = wave((2, 3, 16, 8, 8), 1, 1.0), wave((2, 3, 16, 8, 8), 3, 1.0), wave((2, 5, 12), 4, 1.0)
    states: dict[str, Tensor] = {}
    for mode in ("own", "before"):
        context: dict[str, Any] = {"mask": mask, "keep": states}
        steps = torch.tensor([3, 700])
        if mode == "before":  # as a window that follows: other latents, another time
            kept, latents, steps = dict(states), wave((2, 3, 16, 8, 8), 7, 1.0), torch.tensor([5, 600])
            context = {"mask": mask, "previous": {"states": kept, "mask": before, "weight": 0.5}}
        model.zero_grad()
        output = model(latents, steps, text, image, context=context)
        recorded = AUTHORS[mode]
        close(output.detach()[:, :, ::5, ::3, ::3].flatten(), recorded["output"])
        close(torch.tensor(summary(output.detach())), recorded["whole"], 1e-4)
        (output * wave(tuple(output.shape), 6, 1.0)).sum().backward()
        for key, numbers in recorded["gradients"].items():
            role = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out": "o"}[key.split("attn1.")[1].split(".")[0]]
            part: Any = parts.get_submodule(f"blocks.{key.split('.')[1]}.attn.{role}")
            close(torch.tensor(summary(part.lora_b.grad)), numbers, 1e-4)
    assert len(states) == 4


def test_count_at_full_size() -> None:
    model = zoo.load("cogvideox-5b-i2v", "videopainter-id", device="meta")
    assert model.num_parameters(trainable=True) == 42 * 4 * 2 * 256 * 3072 == 264_241_152
