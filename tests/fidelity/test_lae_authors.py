"""LAE's adapter, LoRA and prefix against the authors' modules (gqk/LAE) on the same weights: `lae.json` holds their numbers.

Their code ran in float64 around an attention of width 12 with 3 heads, filled as `ramp` fills ours; the loss is <output, ramp>.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from zoo.regimes.lae import FORMS

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "lae.json").read_text())
D, H, N, B = 12, 3, 5, 2


def ramp(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.3


@pytest.mark.parametrize("form", list(FORMS))
def test_counts(form: str) -> None:
    """On ViT-B/16, blocks 0 to 4."""
    model = zoo.load("vit-b16", FORMS[form](), num_classes=0, device="meta")
    assert model.num_parameters(trainable=True) == RECORDED["counts"][form]


# our name of each of the authors' parameters, and their seed: 20, 40, 60 and up in the order of their module
NAMES = {
    "adapter": [
        "attn.adapter_down.weight",
        "attn.adapter_down.bias",
        "attn.adapter_up.weight",
        "attn.adapter_up.bias",
        "attn.adapter_scale",
    ],
    "lora": [
        "attn.k.lora_a",
        "attn.v.lora_a",
        "attn.k.lora_b",
        "attn.v.lora_b",
        "attn.k.lora_scale",
        "attn.v.lora_scale",
    ],
    "prefix": [f"attn.product.{part}" for part in ("keys", "key_scale", "values", "value_scale")],
}
SIZES: dict[str, dict[str, Any]] = {"adapter": {"rank": 2}, "lora": {"rank": 2}, "prefix": {"num_tokens": 4}}


@pytest.mark.parametrize("form", list(FORMS))
def test_outputs_and_gradients(form: str) -> None:
    model = zoo.load("vit-micro", pretrained=False, num_classes=0, embed_dim=D, num_heads=H, depth=5).double()
    adapter = model.add_adapter(FORMS[form](**SIZES[form]))
    block: Any = model.backbone.blocks[0]  # type: ignore[index]
    parameters = [adapter.get_parameter(f"blocks.0.{name}") for name in NAMES[form]]
    with torch.no_grad():
        for seed, parameter in enumerate((block.attn.qkv.weight, block.attn.qkv.bias, block.attn.proj.weight), 1):
            parameter.copy_(ramp(*parameter.shape, seed=seed))
        block.attn.proj.bias.copy_(ramp(D, seed=4))
        for i, parameter in enumerate(parameters):
            start = {"adapter": 20, "lora": 40, "prefix": 60}[form]
            scalar = parameter.numel() == 1
            parameter.copy_(
                torch.full_like(parameter, 1.3 + 0.2 * i) if scalar else ramp(*parameter.shape, seed=start + i)
            )
    block.norm1.forward = lambda x: x  # theirs is given the normed tokens
    y = block.drop_path1(block.attn(block.norm1(ramp(B, N, D, seed=5))))
    (y * ramp(B, N, D, seed=6)).sum().backward()
    recorded = RECORDED[form]
    assert float((y.detach().flatten() - torch.tensor(recorded["output"], dtype=torch.float64)).abs().max()) < 1e-7
    for name, parameter, theirs in zip(NAMES[form], parameters, recorded["names"], strict=True):
        expected = torch.tensor(recorded["gradients"][theirs], dtype=torch.float64)
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.flatten(), expected, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("family", ["vit-micro", "timm:swin_tiny_patch4_window7_224"])
def test_rows_memory_and_files(form: str, family: str, tmp_path: Path) -> None:
    """Per sample, with less memory, from a file: the same numbers; every parameter learns."""
    swin = {"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
    sizes = {"depth": 5, "embed_dim": 48, "num_heads": 3} if family == "vit-micro" else swin
    all_blocks = {"adapter": "attn", "lora": "k,v", "prefix": None}[form]
    targets = {} if family == "vit-micro" else {"targets": all_blocks}
    torch.manual_seed(0)
    model = zoo.load(family, FORMS[form](**targets), pretrained=False, num_classes=3, **sizes)
    name, images = form, torch.randn(3, 3, 32, 32)
    assert model.probe(images) == []
    with torch.no_grad():
        for p in model.adapters[name].parameters():
            p.add_(0.3 * torch.randn_like(p))
    expected = model(images)
    with model.disable():
        bare = model(images)
    mixed = model(images, adapters=[name, None, name])
    torch.testing.assert_close(mixed[[0, 2]], expected[[0, 2]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1], bare[1], rtol=1e-4, atol=1e-5)
    gradients = []
    for memory in ("default", "low", "min"):
        model.memory = memory
        model.zero_grad()
        model.train()(images).square().sum().backward()
        gradients.append(
            torch.cat([p.grad.flatten() for p in model.parameters_to_train().values() if p.grad is not None])
        )
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-3, atol=1e-4)
    model.memory = "default"
    model.eval().save_adapter(tmp_path)
    torch.manual_seed(0)
    again = zoo.load(family, adapter=tmp_path, pretrained=False, num_classes=3, **sizes)
    torch.testing.assert_close(again.features(images), model.features(images))
