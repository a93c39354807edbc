"""timm's image towers of Qwen3: EVA's blocks inside of an encoder, with a classifier or a projector behind them."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import zoo
from zoo.errors import AttachError, ConfigError

SMALL: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "pos_embed_grid_size": 4,
}
NETS: dict[str, tuple[str, dict[str, Any]]] = {
    "classifier": ("qwen3_vit_88m", {}),
    "merged": ("qwen3_vit_88m_merge", {"out_features": 24}),
    "encoder": ("qwen3_vit_88m_enc", {"out_features": 24}),
}
EACH = pytest.mark.parametrize("kind", list(NETS))


def load(kind: str, *adapters: Any, **options: Any) -> zoo.Model:
    name, more = NETS[kind]
    torch.manual_seed(0)
    options = {"num_classes": None if kind == "encoder" else 3, **SMALL, **more, **options}
    model = zoo.load(f"timm:{name}", list(adapters), pretrained=False, **options).eval().double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, p in [*model.backbone.named_parameters(), *model.adapters.named_parameters()]:
            p.add_((1.0 if key.endswith("prompt") else 0.1) * torch.randn(p.shape, generator=generator))
    return model


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 32, 32, dtype=torch.double, generator=torch.Generator().manual_seed(2))


@EACH
def test_the_network_is_timms_and_what_has_a_weight_is_a_point(kind: str) -> None:
    name, more = NETS[kind]
    model = load(kind)
    plain = timm.create_model(name, **({} if kind == "encoder" else {"num_classes": 0}), **SMALL, **more)
    plain = plain.eval().double().requires_grad_(False)
    plain.load_state_dict(model.backbone.state_dict())
    assert torch.equal(model.features(images()), plain(images()))
    found = {p.module for p in model.points}
    leaves = [n for n, m in model.backbone.named_modules() if isinstance(getattr(m, "weight", None), Tensor)]
    assert [n for n in leaves if model.backbone.get_submodule(n) not in found] == []


@pytest.mark.parametrize("method", ["lora", "bitfit", "norm", "ssf", "adapter", "ia3", "prefix", "vpt", "vqt"])
@EACH
def test_nothing_is_dead_and_merges_are_exact(kind: str, method: str) -> None:
    if kind == "encoder" and method == "vqt":
        with pytest.raises(AttachError, match="beside pooled ones"):
            load(kind, method)
        return
    model = load(kind, method)
    assert model.probe(images()) == []
    if method in ("lora", "bitfit", "norm", "ssf", "ia3"):
        torch.testing.assert_close(model.merge()(images()), model(images()))


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
@EACH
def test_prompts_stand_in_front_of_the_patches(kind: str, deep: bool) -> None:
    model = load(kind, zoo.adapter("vpt", num_tokens=3, deep=deep))
    prompts = [p for k, p in model.adapters["vpt"].named_parameters() if k.endswith("prompt")]
    found = model.features(images())
    net: Any = model.backbone
    encoder = model.family.encoder  # type: ignore[attr-defined]
    with model.disable():
        bare = model.features(images())
        x, rope = encoder._pos_embed(encoder.patch_embed(images()))
        for i, block in enumerate(encoder.blocks):
            block.attn.num_prefix_tokens = 3
            if deep or i == 0:
                x = torch.cat([prompts[i].expand(len(x), -1, -1), x[:, 3 * (i > 0) :]], dim=1)
            x = block(x, rope=rope)
        x = x[:, 3:].unflatten(1, (4, 4))
        x = x if encoder.merger is None else encoder.merger(x)
        expected = x if kind == "encoder" else net.forward_head(x, pre_logits=True)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert (found - bare).abs().max() > 1e-4


def test_what_is_refused_and_what_comes_out() -> None:
    with pytest.raises(ConfigError, match="no pooled features"):
        load("encoder", num_classes=3)
    with pytest.raises(AttachError, match="cannot be averaged"):
        load("classifier", zoo.adapter("vpt", deep=False, pool="all"))
    found = load("classifier").outputs(images(), want=("pooled", "tokens", "maps"))
    assert found["tokens"].shape == (3, 16, 32) and found["maps"][0].shape == (3, 32, 4, 4)
    assert load("encoder")(images()).shape == (3, 4, 24)
    model = zoo.load("qwen3-vit-306m", num_classes=0, device="meta")
    with torch.device("meta"):
        plain = timm.create_model("qwen3_vit_306m", num_classes=0)
    assert model.num_parameters() == sum(p.numel() for p in plain.parameters())
    assert model.image_size == model.family.encoder.patch_embed.img_size  # type: ignore[attr-defined]
