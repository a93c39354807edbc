"""NaFlexVit: images, patches with their places, padding that nothing sees, prompts that take the mask with them."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models.naflexvit import create_attention_mask
from torch import Tensor

import zoo
from zoo.errors import AttachError, MismatchError, UnknownNameError

SMALL: dict[str, Any] = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "pos_embed_grid_size": (4, 4)}
NETS: dict[str, tuple[str, dict[str, Any]]] = {
    "map": ("naflexvit_base_patch16_siglip", {}),
    "average, registers": ("naflexvit_base_patch16_parfac_gap", {}),
    "class token": ("naflexvit_base_patch16_radio_v3", {}),
    "keys masked only": ("naflexvit_base_patch16_gap", {"use_key_only_attn_mask": True, "reg_tokens": 2}),
}
EACH = pytest.mark.parametrize("kind", list(NETS))


def load(kind: str, *adapters: Any, **options: Any) -> zoo.Model:
    name, more = NETS[kind]
    torch.manual_seed(0)
    options = {"num_classes": 3, "img_size": 32, **SMALL, **more, **options}
    model = zoo.load(f"timm:{name}", list(adapters), pretrained=False, **options).eval().double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, p in [*model.backbone.named_parameters(), *model.adapters.named_parameters()]:
            scale = 1.0 if key.endswith("prompt") else 0.1
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return model


def patches(lengths: tuple[tuple[int, int], ...] = ((4, 4), (2, 5), (3, 3)), width: int = 16) -> dict[str, Tensor]:
    """Images of several shapes, as timm's collator hands them over."""
    generator = torch.Generator().manual_seed(2)
    count = len(lengths)
    coord, valid = torch.zeros(count, width, 2, dtype=torch.long), torch.zeros(count, width, dtype=torch.bool)
    for i, (height, wide) in enumerate(lengths):
        grid = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(wide), indexing="ij"), dim=-1)
        coord[i, : height * wide], valid[i, : height * wide] = grid.flatten(0, 1), True
    x = torch.randn(count, width, 8 * 8 * 3, dtype=torch.double, generator=generator)
    return {"patches": x, "patch_coord": coord, "patch_valid": valid}


@EACH
def test_the_network_is_timms_on_images_and_on_patches(kind: str) -> None:
    model = load(kind)
    name, more = NETS[kind]
    plain = timm.create_model(name, num_classes=0, **SMALL, **more).eval().double()
    plain.load_state_dict(model.backbone.state_dict())
    x, batch = torch.randn(2, 3, 32, 32, dtype=torch.double), patches()
    assert torch.equal(model.features(x), plain(x))
    assert torch.equal(model.features(batch), plain(batch))
    words = {k: v for k, v in batch.items() if k != "patches"}
    assert torch.equal(model.features(batch["patches"], **words), plain(batch))
    found = {p.module for p in model.points}
    leaves = [m for m in model.backbone.modules() if isinstance(getattr(m, "weight", None), Tensor)]
    assert [m for m in leaves if m not in found] == []


@pytest.mark.parametrize("method", ["lora", "bitfit", "norm", "ssf", "adapter", "ia3", "prefix", "vpt"])
@EACH
def test_nothing_is_dead_and_merges_are_exact_on_patches(kind: str, method: str) -> None:
    model, batch = load(kind, method), patches()
    assert model.probe(batch) == []
    if method in ("lora", "bitfit", "norm", "ssf", "ia3"):
        torch.testing.assert_close(model.merge()(batch), model(batch))


@pytest.mark.parametrize("method", ["lora", "prefix", "vpt", zoo.adapter("vpt", deep=False, num_tokens=3)])
@EACH
def test_padding_changes_nothing(kind: str, method: Any) -> None:
    """A shape alone, without padding, gives what it gives beside longer ones."""
    model, batch = load(kind, method), patches()
    together = model.features(batch)
    for i, length in enumerate((16, 10, 9)):
        alone = {k: v[i : i + 1, :length] for k, v in batch.items()}
        torch.testing.assert_close(model.features(alone), together[i : i + 1], rtol=1e-9, atol=1e-9)
    batch["patches"] = torch.where(batch["patch_valid"][..., None], batch["patches"], 7.0)
    torch.testing.assert_close(model.features(batch), together, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
@EACH
def test_prompts_are_tokens_behind_the_prefix(kind: str, deep: bool) -> None:
    """As if they were registers: timm's own mask of a longer prefix, in every block."""
    model, batch = load(kind, zoo.adapter("vpt", num_tokens=3, deep=deep)), patches()
    found = model.features(batch)
    prompts = [p for k, p in model.adapters["vpt"].named_parameters() if k.endswith("prompt")]
    net: Any = model.backbone
    prefix = net.num_prefix_tokens
    with model.disable():
        bare = model.features(batch)
        valid = batch["patch_valid"]
        x, _ = net.embeds(batch["patches"], patch_coord=batch["patch_coord"], patch_valid=valid)
        keys_only = net.use_key_only_attn_mask
        mask = create_attention_mask(
            valid, prefix + 3, symmetric=not keys_only, q_len=1 if keys_only else None, dtype=x.dtype
        )
        x = net.norm_pre(x)
        for i, block in enumerate(net.blocks):
            if deep or i == 0:
                before = x[:, prefix + 3 * (i > 0) :]
                x = torch.cat([x[:, :prefix], prompts[i].expand(len(x), -1, -1), before], dim=1)
            x = block(x, attn_mask=mask)
        x = net.norm(torch.cat([x[:, :prefix], x[:, prefix + 3 :]], dim=1))
        expected = net.forward_head(x, pre_logits=True, patch_valid=valid)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert (found - bare).abs().max() > 1e-4


def test_routed_and_checkpointed() -> None:
    batch = patches()
    model = load("average, registers", zoo.adapter("vpt", deep=False, num_tokens=2), "lora")
    model.set_active("vpt")
    alone = model(batch)
    model.memory = "min"
    torch.testing.assert_close(model.train()(batch), alone)
    model.eval()
    model.set_active("lora")
    other = model(batch)
    rows = model(
        batch["patches"], adapters=["lora", None, "lora"], **{k: v for k, v in batch.items() if k != "patches"}
    )
    torch.testing.assert_close(rows[[0, 2]], other[[0, 2]])


def test_what_is_refused() -> None:
    with pytest.raises(AttachError, match="padding"):
        load("map", "vqt")
    with pytest.raises(AttachError, match="padding"):
        load("class token", zoo.adapter("vpt", deep=False, pool="all"))
    with pytest.raises(MismatchError, match="make no map"):
        load("map").outputs(patches(), want=("maps",))
    with pytest.raises(UnknownNameError):
        zoo.load("siglip2-naflex-xxl")


def test_outputs_of_images() -> None:
    model, x = load("average, registers"), torch.randn(2, 3, 32, 32, dtype=torch.double)
    found = model.outputs(x, want=("pooled", "tokens", "maps"))
    assert found["maps"][0].shape == (2, 48, 4, 4)
    assert found["tokens"].shape == (2, model.family.num_prefix + 16, 48) and torch.equal(
        found["pooled"], model.features(x)
    )
    assert model.image_size == (32, 32)
    (bands,) = load("map", in_chans=5).example_batch()
    assert bands.shape == (2, 5, 32, 32) and load("map", in_chans=5)(bands).shape == (2, 3)
    meta = zoo.load("siglip2-naflex-b", num_classes=0, device="meta")
    assert meta.num_parameters() == sum(
        p.numel() for p in timm.create_model("naflexvit_base_patch16_siglip", num_classes=0).parameters()
    )
