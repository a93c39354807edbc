"""Hiera: counts, blocks whose width grows, more keys where attention is global, what is refused in mask units."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import zoo
from zoo.errors import AttachError, ConfigError

SMALL: dict[str, Any] = {"img_size": (64, 64), "embed_dim": 12, "stages": (1, 2, 2, 2)}
NETS = {"hiera": "hiera_tiny_224", "absolute windows": "hiera_small_abswin_256"}
EACH = pytest.mark.parametrize("kind", list(NETS))


def load(kind: str = "hiera", adapter: Any = None, **options: Any) -> zoo.Model:
    torch.manual_seed(0)
    model = zoo.load(f"timm:{NETS[kind]}", adapter, pretrained=False, **{"num_classes": 3, **SMALL, **options}).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in [*model.backbone.parameters(), *model.adapters.parameters()]:
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("hiera-t", 27_141_216),
        ("hiera-s", 34_239_072),
        ("hiera-b", 50_755_968),
        ("hiera-b-plus", 68_999_616),
        ("hiera-l", 212_586_912),
        ("hiera-h", 670_730_752),
    ],
)
def test_counts_without_head(name: str, count: int) -> None:
    assert zoo.load(name, num_classes=0, device="meta").num_parameters() == count


@pytest.mark.parametrize(
    ("name", "targets", "count"),
    [("hiera-b", "all-linear", 163_872), ("hiera-b", "q,v", 35_520), ("hiera-t", "all-linear", 82_656)],
)
def test_counts_of_a_rank(name: str, targets: str, count: int) -> None:
    model = zoo.load(name, zoo.adapter("lora", targets=targets, rank=1), num_classes=0, device="meta")
    assert model.num_parameters(trainable=True) == count


@EACH
def test_the_network_is_timms_and_everything_with_a_weight_is_a_point(kind: str) -> None:
    model = load(kind)
    plain = timm.create_model(NETS[kind], num_classes=0, **SMALL).eval()
    plain.load_state_dict(model.backbone.state_dict())
    assert torch.equal(model.features(images()), plain(images()))
    found = {p.module for p in model.points}
    leaves = [m for m in model.backbone.modules() if isinstance(getattr(m, "weight", None), Tensor)]
    assert [m for m in leaves if m not in found] == []


@pytest.mark.parametrize("method", ["lora", "bitfit", "norm", "ssf", "adapter", "ia3", "vpt"])
@EACH
def test_nothing_is_dead_and_merges_are_exact(kind: str, method: str) -> None:
    model = load(kind, method)
    assert model.probe(images()) == []
    if method not in ("adapter", "vpt"):
        torch.testing.assert_close(model.merge()(images()), model(images()), rtol=1e-4, atol=1e-5)


def test_widths_of_a_block_that_pools() -> None:
    model = load()
    wide = {name: model.points[f"stages.1.blocks.0.{name}"] for name in ("attn.q", "attn.o", "shortcut", "attn", "mlp")}
    assert {k: (p.dim_in, p.dim_out) for k, p in wide.items()} == {
        "attn.q": (12, 24),
        "attn.o": (24, 24),
        "shortcut": (12, 24),
        "attn": (12, 24),
        "mlp": (24, 24),
    }
    assert (model.points["stages.1.blocks.0"].dim_in, model.points["stages.1.blocks.1"].dim_in) == (12, 24)
    places = [p.layout for p in model.points.select(kind="block")]
    assert places[:-1] == [None] * 6 and places[-1] is not None and places[-1].grid == (2, 2)
    with pytest.raises(AttachError, match=r"changes the width of its tokens from 12 to 24"):
        load(adapter=zoo.adapter("adapter", form="parallel", targets="attn"))
    houlsby = load(adapter=zoo.adapter("adapter", form="houlsby"))
    assert houlsby.probe(images()) == []


def test_prompts_are_tokens_of_blocks_with_global_attention() -> None:
    """As tokens among the others of the block they give the same, and their outputs are dropped."""
    model = load(adapter=zoo.adapter("vpt", num_tokens=3)).double()
    names = [p.name for p in model.points.select(kind="tokens")]
    assert names == ["stages.2.blocks.1.tokens", "stages.3.blocks.1.tokens"]
    prompts = {p.path: model.adapters["vpt"].module_at(p.name).prompt for p in model.points.select(kind="tokens")}
    x = images().double()
    found = model.features(x)
    net: Any = model.backbone
    with model.disable():
        bare = net.forward_head(net.forward_features(x), pre_logits=True)
        tokens = net.unroll(net._pos_embed(net.patch_embed(x)))
        for i, block in enumerate(net.blocks):
            prompt = prompts.get(f"blocks.{i}")
            if prompt is None:
                tokens = block(tokens)
                continue
            count = len(prompt)
            tokens = block(torch.cat([prompt.expand(len(tokens), -1, -1), tokens], dim=1))[:, count:]
        expected = net.forward_head(tokens, pre_logits=True)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert (expected - bare).abs().max() > 1e-3


def test_prefixes_where_attention_is_global_and_nowhere_else() -> None:
    able = [p.name for p in load().points.select(kind="attention") if p.window is None]
    assert able == [f"stages.{s}.blocks.{b}.attn.product" for s, b in ((2, 1), (3, 0), (3, 1))]
    model = load(adapter=zoo.adapter("prefix", targets=able))
    assert model.probe(images()) == []
    with model.disable():
        bare = model(images())
    assert not torch.equal(model(images()), bare)
    with pytest.raises(AttachError, match=r"mask units of 64 tokens.*stages\.2\.blocks\.1\.attn\.product"):
        load(adapter="prefix")


def test_pooled_queries_with_more_keys() -> None:
    """Behind the pooling of the queries, keys that no query likes change nothing."""
    model = load(adapter=zoo.adapter("prefix", targets="stages.3.blocks.0.attn.product", num_tokens=2))
    attention: Any = model.points["stages.3.blocks.0.attn.product"].module
    assert attention.q_stride == 4
    x = torch.randn(2, 16, attention.dim)
    site = attention.forward.__self__
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4)
    q = q.reshape(2, attention.heads, 4, 4, -1).amax(dim=2)
    (keys, values) = site.pairs(2, x.dtype)[0]
    k, v = (torch.cat([e.expand(2, -1, -1, -1), own], dim=2) for e, own in ((keys, k), (values, v)))
    weights = (q @ k.transpose(-1, -2) * attention.scale).softmax(dim=-1)
    torch.testing.assert_close(attention(x), attention.proj((weights @ v).transpose(1, 2).flatten(2)))


def test_what_is_refused() -> None:
    for method, reason in (("vqt", "mask units"), ("meft", "by hand"), ("ladder", "row by row")):
        with pytest.raises(AttachError, match=reason):
            load(adapter=method)
    with pytest.raises(AttachError, match="no point"):
        load(adapter=zoo.adapter("vpt", deep=False))
    with pytest.raises(AttachError, match="prompts of one block"):
        load(adapter=zoo.adapter("vpt", pool="all"))


def test_a_size_that_no_whole_units_fill_is_refused() -> None:
    for size in (50, (64, 48)):
        with pytest.raises(ConfigError, match="32 x 32 pixels"):
            load(img_size=size)


def test_maps_of_all_stages() -> None:
    model = load()
    found = model.outputs(images(), want=("pooled", "maps"))
    assert [tuple(m.shape) for m in found["maps"]] == [(3, 12, 16, 16), (3, 24, 8, 8), (3, 48, 4, 4), (3, 96, 2, 2)]
    norm: Any = model.points["norm"].module
    assert isinstance(norm, nn.LayerNorm)
    torch.testing.assert_close(found["pooled"], norm(found["maps"][-1].mean((2, 3))))
    assert model.image_size == (64, 64)
    assert zoo.load("hiera-t", img_size=64, device="meta").image_size == (64, 64)
