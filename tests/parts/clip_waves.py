"""A small CLIP of waves, for numbers recorded from authors' code of prompts in both towers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from waves import agree, fill, shift, wave

import zoo

NAMES = ["airplane", "pickup_truck", "bird"]
OPTIONS: dict[str, Any] = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {
        "width": 192,
        "layers": 3,
        "head_width": 64,
        "image_size": 16,
        "patch_size": 4,
        "no_ln_pre": False,
        "norm_kwargs": {},
    },
    "text_cfg": {"width": 128, "layers": 3, "heads": 2, "context_length": 24},
}


def model_of_waves(adapter: Any) -> zoo.Model:
    """In float64; OpenAI's form (a norm in front, their GELU), three blocks in each tower; exp(scale) is 20."""
    model = zoo.load("clip-micro", adapter, pretrained=False, classes=NAMES, **OPTIONS).double().eval()
    own: Any = model.backbone
    fill({k.replace("ln_", "norm_"): p for k, p in own.named_parameters() if k != "logit_scale"})
    with torch.no_grad():
        own.logit_scale.fill_(math.log(20.0))
        for key, parameter in own.named_parameters():
            if "visual" in key and key.endswith(("embedding", "proj_weight", "ln_pre.weight")):
                parameter.mul_(0.1)  # or all that is said of an image stands in its class token alone
    return model


def pictures_of_waves() -> Tensor:
    """Two of 16 px, unlike each other."""
    return torch.cat([wave((1, 3, 16, 16), 5, 1.5), wave((1, 3, 16, 16), 11, 1.5)])


def equals_the_record(name: str, adapter: Any, scale: float = 0.3, case: str = "") -> None:
    """Assert that logits and gradients are those of `tests/fidelity/<name>.json`."""
    record: dict[str, Any] = json.loads((Path(__file__).parents[1] / "fidelity" / f"{name}.json").read_text())
    recorded = record["cases"][case] if case else record
    model = model_of_waves(adapter)
    named = dict(model.adapters[adapter.method].named_parameters())
    shift(named, scale)
    logits = model(pictures_of_waves())
    torch.testing.assert_close(logits, torch.tensor(recorded["logits"], dtype=torch.float64), rtol=1e-9, atol=1e-9)
    F.cross_entropy(logits, torch.tensor([1, 2])).backward()
    agree(named, recorded["gradients"])
    for key, numbers in recorded["gradients"].items():  # small ones, too
        assert float(named[key].grad.norm()) == pytest.approx(numbers[-2], rel=1e-6)
