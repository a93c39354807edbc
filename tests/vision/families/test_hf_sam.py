"""transformers' SAM encoder: against the library's forward, windows with padding, prompts written out by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo
from zoo.errors import AttachError, WeightsError
from zoo.registry import family

transformers = pytest.importorskip("transformers")


def make(adapter: Any = None, **options: Any) -> zoo.Model:
    tiny = family("hf-sam").tiny
    assert tiny is not None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = zoo.load("hf-sam-b", pretrained=False, **{**tiny[1], **options})
        for parameter in model.backbone.parameters():  # positions start as zero
            if not parameter.any():
                nn.init.normal_(parameter, std=0.2)
        if adapter is not None:
            model.add_adapter(adapter)
    return model.double().eval()


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()


def library(model: zoo.Model) -> Any:
    module = transformers.SamVisionModel(copy.deepcopy(model.backbone.config)).double()
    module.load_state_dict(model.backbone.state_dict())
    return module.requires_grad_(False).eval()


def settle(model: zoo.Model) -> None:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        for parameter in model.parameters_to_train().values():
            parameter += 0.05 * torch.randn_like(parameter)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equals_the_library(attention: str) -> None:
    model, x = make(attn_implementation=attention), images()
    expected = library(model)(x).last_hidden_state
    assert torch.equal(model.outputs(x, want=("maps",))["maps"][0], expected)  # to the bit
    assert torch.equal(model.features(x), expected.mean((-2, -1)))
    plain = model.merge().requires_grad_(
        False
    )  # as the library's above: torch has another product for what needs a gradient
    assert [type(m).__module__ for m in plain.modules() if type(m).__module__.startswith("vision")] == []
    assert [layer.window_size for layer in plain.vision_encoder.layers] == [3, 0]  # type: ignore[union-attr]
    assert torch.equal(plain(x).last_hidden_state, expected)


@pytest.mark.parametrize("method", ["bitfit", "norm", "ssf", "ia3", "lora", "full"])
def test_nothing_is_dead_and_merges_are_exact(method: str) -> None:
    model = make(zoo.adapter(method, **({"targets": "all-linear", "rank": 2} if method == "lora" else {})))
    x = images()
    assert model.probe(x) == []
    settle(model)
    torch.testing.assert_close(model.family.run(model.merge(), x), model.features(x), rtol=1e-9, atol=1e-9)
    norms = [m for m in model.backbone.modules() if isinstance(m, nn.LayerNorm)]
    assert {id(p.module) for p in model.points.select(kind="norm")} == {id(m) for m in norms}


def attended(block: Any, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One attention by hand on a map (B, 4, 4, d): windows of 3 x 3 of a map padded to 6 x 6, or the whole map."""
    attention, batch = block.attn, len(x)
    size = attention.map_window or 4
    count = -(-4 // size)
    wide = F.pad(x, (0, 0, 0, size * count - 4, 0, size * count - 4))
    out = torch.zeros_like(wide)
    for i in range(count):
        for j in range(count):
            rows, columns = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
            qkv = attention.qkv(wide[:, rows, columns].reshape(batch, size * size, -1))
            q, k, v = qkv.view(batch, size * size, 3, 3, 16).permute(2, 0, 3, 1, 4)
            place = torch.arange(size)
            high = attention.rel_pos_h[place[:, None] - place + size - 1]  # (rows of queries, rows of keys, c)
            wide_ = attention.rel_pos_w[place[:, None] - place + size - 1]
            grid = q.view(batch, 3, size, size, 16)
            bias = torch.einsum("bnhwc,hkc->bnhwk", grid, high)[..., None]
            bias = bias + torch.einsum("bnhwc,wkc->bnhwk", grid, wide_)[..., None, :]
            scores = q @ torch.cat([keys.expand(batch, -1, -1, -1), k], 2).mT * 16**-0.5
            scores = scores + F.pad(bias.reshape(batch, 3, size * size, size * size), (keys.shape[2], 0))
            y = scores.softmax(-1) @ torch.cat([values.expand(batch, -1, -1, -1), v], 2)
            out[:, rows, columns] = y.transpose(1, 2).reshape(batch, size, size, -1)
    return attention.proj(out[:, :4, :4])  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", ["vpt", "prefix"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_more_keys_equal_the_form_by_hand(method: str, attention: str) -> None:
    model, x = make(method, attn_implementation=attention), images()
    settle(model)
    with torch.no_grad():
        adapter: Any = model.adapters[method]
        encoder: Any = make(attn_implementation=attention).backbone.vision_encoder
        hidden = encoder.patch_embed(x) + encoder.pos_embed
        for i, block in enumerate(encoder.layers):
            if method == "vpt":
                prompts = adapter.module_at(f"blocks.{i}.tokens")(1)
                qkv = block.attn.qkv(block.layer_norm1(prompts)).view(1, -1, 3, 3, 16).permute(2, 0, 3, 1, 4)
                keys, values = qkv[1], qkv[2]
            else:
                keys, values = adapter.module_at(f"blocks.{i}.attn.product")(1)[:2]
            hidden = hidden + attended(block, block.layer_norm1(hidden), keys, values)
            hidden = hidden + block.mlp(block.layer_norm2(hidden))
        expected = encoder.neck(hidden).mean((-2, -1))
        torch.testing.assert_close(model.features(x), expected, rtol=1e-8, atol=1e-9)


def test_an_adapter_for_each_sample() -> None:
    model, x = make(zoo.adapter("lora", rank=2, targets="all-linear")), images()
    model.add_adapter("prefix")
    settle(model)
    expected = []
    for i, name in enumerate(("prefix", "lora")):
        model.set_active(name)
        expected.append(model(x[i : i + 1]))
    torch.testing.assert_close(model(x, adapters=["prefix", "lora"]), torch.cat(expected), rtol=1e-9, atol=1e-9)


def test_blocks_by_hand_and_what_is_refused() -> None:
    model = make(zoo.adapter("adapter", form="adaptformer", source="residual", rank=2))
    settle(model)
    x, run = images(), zoo.blocks(model)
    here = run.start(x)
    for i in range(len(run)):
        tokens = run.half(i, "mlp", here)(run.half(i, "attn", here)(here.tokens))
        here = run.advance(here, 1)
        torch.testing.assert_close(tokens, here.tokens, rtol=1e-12, atol=1e-12)
    assert torch.equal(run.finish(here), model.features(x))
    with pytest.raises(AttachError, match="hand on maps"):
        make(zoo.adapter("vpt", deep=False))
    with pytest.raises(zoo.ZooError, match="does not interpolate"):
        zoo.load("hf-sam-b", num_classes=0, device="meta").family.configure(image_size=512)


def test_checkpoints_and_counts(tmp_path: Path) -> None:
    """A whole SAM: its prompt encoder and mask decoder are left out."""
    from safetensors.torch import load_file, save_file

    tiny = family("hf-sam").tiny
    assert tiny is not None
    config = transformers.SamConfig(
        vision_config=tiny[1],
        prompt_encoder_config={"hidden_size": 24, "image_size": 32, "patch_size": 8},
        mask_decoder_config={"hidden_size": 24, "num_attention_heads": 2, "mlp_dim": 16, "iou_head_hidden_dim": 16},
    )
    whole = transformers.SamModel(config).eval()
    whole.save_pretrained(tmp_path)
    model, x = zoo.load(f"transformers:{tmp_path}", "lora", num_classes=3).eval(), images().float()
    maps = whole.vision_encoder(x).last_hidden_state
    torch.testing.assert_close(model.features(x), maps.mean((-2, -1)), rtol=1e-5, atol=1e-5)
    state = load_file(tmp_path / "model.safetensors")
    extra = {**state, "vision_encoder.layers.9.attn.qkv.bias": torch.ones(3)}
    save_file(extra, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"has over 1: vision_encoder.layers.9"):
        zoo.load(f"transformers:{tmp_path}", num_classes=0)
    assert zoo.load("hf-sam-b", num_classes=0, device="meta").num_parameters() == 89_670_912
