"""timm's image encoder of SAM: windows with padding, relative positions, prefixes in every window, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer_sam import get_decomposed_rel_pos_bias
from torch import Tensor

import zoo
from zoo.errors import AttachError

SMALL: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "window_size": 3,  # 4 x 4 patches: padded to 2 x 2 windows
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "global_attn_indexes": (1,),
    "neck_chans": 16,
}
NETS: dict[str, tuple[str, dict[str, Any]]] = {
    "sam": ("samvit_base_patch16", {}),
    "rotary": ("samvit_base_patch16", {"use_rel_pos": False, "use_rope": True, "window_size": 4}),
    "without a neck": ("samvit_base_patch16_224", {"neck_chans": 0}),
}
EACH = pytest.mark.parametrize("kind", list(NETS))


def load(kind: str, *adapters: Any, **options: Any) -> zoo.Model:
    name, more = NETS[kind]
    torch.manual_seed(0)
    options = {"num_classes": 3, **SMALL, **more, **options}
    model = zoo.load(f"timm:{name}", list(adapters), pretrained=False, **options).eval().double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in [*model.backbone.parameters(), *model.adapters.parameters()]:
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 32, 32, dtype=torch.double, generator=torch.Generator().manual_seed(2))


@EACH
def test_the_network_is_timms_and_what_has_a_weight_is_a_point(kind: str) -> None:
    name, more = NETS[kind]
    model = load(kind)
    plain = timm.create_model(name, num_classes=0, **{**SMALL, **more}).eval().double().requires_grad_(False)
    plain.load_state_dict(model.backbone.state_dict())
    assert torch.equal(model.features(images()), plain(images()))
    found = {p.module for p in model.points}
    leaves = [n for n, m in model.backbone.named_modules() if isinstance(getattr(m, "weight", None), Tensor)]
    assert [n for n in leaves if model.backbone.get_submodule(n) not in found] == []


@pytest.mark.parametrize("method", ["lora", "bitfit", "norm", "adapter", "ia3", "prefix", "vpt"])
@EACH
def test_nothing_is_dead_and_merges_are_exact(kind: str, method: str) -> None:
    model = load(kind, method)
    assert model.probe(images()) == []
    if method in ("lora", "bitfit", "norm", "ia3"):
        torch.testing.assert_close(model.merge()(images()), model(images()))


def test_counts_of_full_size() -> None:
    model = zoo.load("sam-b16", num_classes=0, device="meta")
    with torch.device("meta"):
        plain = timm.create_model("samvit_base_patch16", num_classes=0)
    assert model.num_parameters() == sum(p.numel() for p in plain.parameters())
    assert model.image_size == (1024, 1024)


@pytest.mark.parametrize("method", ["prefix", "vpt"])
@pytest.mark.parametrize("number", [0, 1], ids=["windows", "whole map"])
def test_more_keys_have_no_relative_bias(method: str, number: int) -> None:
    """Against the attention written out; each window of an image sees the same keys, behind its own."""
    model = load("sam", zoo.adapter(method, num_tokens=4))
    block: Any = model.backbone.blocks[number]  # type: ignore[index,union-attr]
    attention = block.attn
    x = torch.randn(2, 4, 4, 32, dtype=torch.double)
    windows, height = (x, 4) if number else (torch.randn(8, 3, 3, 32, dtype=torch.double), 3)
    site = attention.forward.__self__
    site.images = 2
    keys, values = site.pairs(2, x.dtype)[0]
    q, k, v = attention.qkv(windows.flatten(1, 2)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
    rows = len(windows)
    flat = q.reshape(rows * 2, height * height, 16)
    bias = get_decomposed_rel_pos_bias(
        flat, attention.rel_pos_h, attention.rel_pos_w, (height, height), (height, height)
    )
    scores = q @ k.transpose(-1, -2) * attention.scale + bias.unflatten(0, (rows, 2))
    scores = torch.cat([q @ keys.transpose(-1, -2) * attention.scale, scores], dim=-1)
    y = scores.softmax(dim=-1) @ torch.cat([values.expand(rows, -1, -1, -1), v], dim=2)
    torch.testing.assert_close(attention(windows), attention.proj(y.transpose(1, 2).flatten(2)).view_as(windows))


def test_halves_rows_and_recomputation() -> None:
    model = load("sam", "prefix", "lora")
    block, x = model.backbone.blocks[0], torch.randn(2, 4, 4, 32, dtype=torch.double)  # type: ignore[index,union-attr]
    half = model.family.half
    with model.disable():
        torch.testing.assert_close(half(block, "mlp", half(block, "attn", x)), block(x))
    alone = []
    for name in ("prefix", "lora"):
        model.set_active(name)
        alone.append(model(images()))
    rows = model(images(), adapters=["prefix", "lora", "prefix"])
    expected = torch.stack([alone[0][0], alone[1][1], alone[0][2]])
    torch.testing.assert_close(rows, expected)
    model.set_active("prefix")
    model.memory = "min"
    torch.testing.assert_close(model.train()(images()), alone[0])


def test_what_stands_beside_windows() -> None:
    model = load("sam", zoo.adapter("adapter", form="parallel", targets="attn"))
    assert model.probe(images()) == []
    for adapter, reason in (
        (zoo.adapter("adapter", form="parallel", targets="attn", source="residual"), "residual stream is a map"),
        (zoo.adapter("vpt", deep=False), "no place in the maps"),
        (zoo.adapter("vqt"), "no place in the maps"),
    ):
        with pytest.raises(AttachError, match=reason):
            load("sam", adapter)
    found = load("sam").outputs(images(), want=("pooled", "maps"))
    assert found["maps"][0].shape == (3, 16, 4, 4)
    torch.testing.assert_close(found["pooled"], found["maps"][0].mean((2, 3)))
