"""VL-T5 and VL-BART against the counts and against numbers recorded from the authors' code.

`vl.json` holds what j-min/VL-T5 (commit a07d779) answers on transformers 4.2.1 in float64: networks of 2 + 2 blocks, width 16,
2 heads, 40 words, features of width 6, with the weights and inputs of `wave` below; encoder output, scores, and of gradients the
norm, the sum and the first two values; and the keys of their state dict.
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
RECORDED = json.loads((Path(__file__).parent / "vl.json").read_text(encoding="utf-8"))
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "feat_dim": 6}
BART = {
    "vocab_size": 40,
    "d_model": 16,
    "max_position_embeddings": 20,
    **dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 24),
    "feat_dim": 6,
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


def build(name: str) -> Any:
    family, norms = name.split()
    options: dict[str, Any] = {
        **(T5 if family == "vl-t5" else BART),
        "individual_vis_layer_norm": norms == "individual",
    }
    model = zoo.load(family, pretrained=False, **options).double()
    fill(dict(model.backbone.named_parameters()))
    return model


@pytest.mark.parametrize("name", RECORDED)
def test_equals_the_authors_code(name: str) -> None:
    recorded, model = RECORDED[name], build(name)
    pad = model.backbone.config.pad_token_id
    ids = torch.tensor([[5, 9, 11, 23, 7, 3], [8, 4, 30, 2, pad, pad]])
    features, boxes = wave((2, 5, 6), 3, 1.0), wave((2, 5, 4), 1, 0.5) + 0.5
    answer = model.family.shift(torch.tensor([[6, 12, 1], [9, 1, -100]]))
    orders = (torch.tensor([[0, 0, 0, 1, 1]]).expand(2, -1), torch.tensor([[0, 1, 2, 0, 1]]).expand(2, -1))
    model.backbone.requires_grad_(True)
    for case, extra in (("plain", ()), ("two images", orders)):
        names = ("visual_features", "boxes", "image_ids", "object_ids")
        outputs, mask = model.backbone.encode(ids, **dict(zip(names, (features, boxes, *extra))))
        assert mask.tolist()[1] == [1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1]
        expected = torch.tensor(recorded[case]["encoder"], dtype=torch.float64).view(2, 11, 16)
        torch.testing.assert_close(outputs.last_hidden_state, expected, rtol=1e-5, atol=1e-6)
        scores = model(ids, ids.ne(pad).long(), answer, features, boxes, *extra)
        expected = torch.tensor(recorded[case]["logits"], dtype=torch.float64).view(2, 3, 40)
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)
    (scores * wave((2, 3, 40), 2, 1.0)).sum().backward()
    named = dict(model.backbone.named_parameters())
    for key, numbers in recorded["gradients"].items():
        gradient = named[key].grad
        assert gradient is not None
        found = torch.stack([gradient.norm(), gradient.sum(), *gradient.flatten()[:2]])
        torch.testing.assert_close(found, torch.tensor(numbers, dtype=torch.float64), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", RECORDED)
def test_keys_are_those_of_the_released_files(name: str) -> None:
    old = {"encoder.embed_positions.position_ids"}
    assert set(build(name).backbone.state_dict()) == set(RECORDED[name]["keys"]) - old


@pytest.mark.parametrize(
    "name, options, count",
    [
        ("t5-base", {}, 222_903_552),
        ("bart-base", {}, 139_420_416),
        ("vl-t5", {}, 224_540_160),
        ("vl-bart", {}, 141_156_864),
        ("vl-bart", {"individual_vis_layer_norm": False}, 141_156_864 - 2 * 768),
        # width of CLIP-ViT features of videos
        ("vl-bart", {"feat_dim": 512}, 141_156_864 - 1536 * 768),
    ],
)
def test_counts(name: str, options: dict[str, Any], count: int) -> None:
    model = zoo.load(name, device="meta", **options)
    assert model.num_parameters() == count


@pytest.mark.parametrize(
    "name, adapter, count",
    [
        # VL-Adapter's LoRA of rank 128 on q and v of BART's 18 attentions
        ("vl-bart", {"method": "lora", "rank": 128, "targets": ("q", "v")}, 36 * 128 * 2 * 768),
        # one adapter of width 96 at each of 30 and 60 sublayers
        ("vl-bart", {"method": "adapter", "form": "houlsby", "rank": 96}, 30 * 148_320),
        ("vl-t5", {"method": "adapter", "form": "houlsby", "rank": 96}, 60 * 148_320),
        # 49,152 in BART-base's own norms, and 3,072 in those of the visual embedding
        ("vl-bart", {"method": "norm"}, 49_152 + 3_072),
        ("vl-t5", {"method": "norm"}, 47_616 + 1_536),
    ],
)
def test_trainable_parameters(name: str, adapter: dict[str, Any], count: int) -> None:
    method = adapter.pop("method")
    model = zoo.load(name, zoo.adapter(method, **adapter), device="meta")
    assert model.num_parameters(trainable=True) == count
