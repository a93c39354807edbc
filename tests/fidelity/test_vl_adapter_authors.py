"""VL-Adapter against the authors' code (ylsung/VL_adapter): their whole VL-T5 and VL-BART with adapters in them.

`vl_adapter.json` holds what their networks answer on transformers 4.2.1, in evaluation mode, in float64: 2 + 2 blocks, width 16,
with the weights and inputs of `wave` below. Of each case the scores of the last word of the second sample, norm and sum of all
scores, and of every parameter that is trained the product of its gradient with a wave. None of their code is here.

Their T5 never trains its layer norms (what unfreezes them looks for the library's class, and the network has a copy of it); their
gradients are there nevertheless and are compared. Their softmax, which takes float32 whatever it is given, was left in float64;
in float32 some gradients are 5e-5 away.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from waves import wave

import zoo

pytest.importorskip("transformers", reason="the extra 'multimodal' is not installed")
RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "vl_adapter.json").read_text(encoding="utf-8"))
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "feat_dim": 6}
BART = {
    "vocab_size": 40,
    "d_model": 16,
    "max_position_embeddings": 20,
    **dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 24),
    "feat_dim": 6,
}
TWO: dict[str, Any] = {"tasks": ("a", "b")}
HYPER = {"form": "hyperformer", "reduction": 4.0, "task_dim": 5, "hidden": 6, "projected": 3, **TWO}
CASES: dict[str, dict[str, Any]] = {
    "adapter single": {"reduction": 4.0},
    "adapter multiple": {"reduction": 4.0, "sharing": "multiple", **TWO},
    "adapter half-up": {"reduction": 4.0, "sharing": "half-up", **TWO},
    "compacter single": {"form": "compacter", "reduction": 4.0},
    "compacter half-down": {"form": "compacter", "reduction": 4.0, "sharing": "half-down", **TWO},
    "hyperformer": HYPER,
    "prompt single": {"form": "prompt", "num_tokens": 3, "hidden": 7},
    "prompt multiple": {"form": "prompt", "num_tokens": 3, "hidden": 7, "sharing": "multiple", **TWO},
    "lora single": {"form": "lora", "rank": 3, "alpha": 6.0},
    "lora multiple": {"form": "lora", "rank": 3, "alpha": 6.0, "sharing": "multiple", **TWO},
}


@torch.no_grad()
def fill(named: dict[str, Tensor]) -> None:
    for i, (key, parameter) in enumerate(sorted(named.items())):
        if parameter.ndim == 1 and key.endswith("weight"):
            parameter.copy_(1 + wave(parameter.shape, i, 0.2))
        elif key.endswith("bias"):
            parameter.copy_(wave(parameter.shape, i, 0.1))
        else:
            table = any(word in key for word in ("shared", "order", "positions", "attention_bias"))
            parameter.copy_(wave(parameter.shape, i, 1.0 if table else 2 / math.sqrt(parameter[0].numel())))


def build(family: str, case: str) -> tuple[Any, dict[str, Tensor]]:
    """The model, and what the adapter added, by name in order."""
    sizes: dict[str, Any] = T5 if family == "vl-t5" else BART
    model = zoo.load(family, pretrained=False, **sizes).double()
    fill(dict(model.backbone.named_parameters()))
    adapter = model.add_adapter(zoo.adapter("vl-adapter", **CASES[case]))
    model.double()
    added = {k: p for k, p in sorted(adapter.named_parameters()) if k not in adapter.stand_ins}
    with torch.no_grad():
        for i, (key, parameter) in enumerate(added.items()):
            parameter.copy_(wave(tuple(parameter.shape), i + 1, 0.3))
            if key.endswith("norm.weight"):
                parameter.add_(1)
    return model.eval(), added


def inputs(pad: int) -> tuple[Tensor, ...]:
    ids = torch.tensor([[5, 9, 11, 23, 7, 3], [8, 4, 30, 2, pad, pad]])
    return ids, ids.ne(pad).long(), wave((2, 5, 6), 3, 1.0), wave((2, 5, 4), 1, 0.5) + 0.5


@pytest.mark.parametrize("name", RECORDED)
def test_equals_the_authors_code(name: str) -> None:
    family, _, case = name.partition(" ")
    recorded = RECORDED[name]
    model, _ = build(family, case)
    ids, mask, features, boxes = inputs(model.backbone.config.pad_token_id)
    answer = model.family.shift(torch.tensor([[6, 12, 1], [9, 1, -100]]))
    context = {"context": {"task": "b"}} if "tasks" in CASES[case] else {}
    scores = model(ids, mask, answer, features, boxes, **context)

    def close(found: Any, numbers: Any) -> None:
        expected = torch.tensor(numbers, dtype=torch.float64)
        torch.testing.assert_close(torch.as_tensor(found, dtype=torch.float64), expected, rtol=1e-5, atol=1e-6)

    close(scores[1, -1].detach(), recorded["scores"])
    close([scores.detach().norm().item(), scores.detach().sum().item()], recorded["all"])
    (scores * wave((2, 3, 40), 2, 1.0)).sum().backward()
    adapter = model.adapters["vl-adapter"]
    named = dict(adapter.named_parameters())
    for key, number in recorded["gradients"].items():
        gradient = named[key].grad
        if gradient is None:  # another task's
            assert number == 0.0 and ".each.0." in key
            continue
        close((gradient * wave(tuple(gradient.shape), 4, 1.0)).sum().item(), number)
    assert set(recorded["gradients"]) == set(named)


def test_every_form_is_there() -> None:
    """All on both, LoRA on VL-BART alone, as theirs."""
    expected = {f"{family} {case}" for family in ("vl-t5", "vl-bart") for case in CASES}
    assert set(RECORDED) == {name for name in expected if not name.startswith("vl-t5 lora")}
