"""The family "clip": open_clip's CLIP and CustomTextCLIP, both towers, by comparison with the library's own modules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zoo
import zoo.registry

pytest.importorskip("open_clip")
import open_clip
from clip_models import IMAGE, MICRO, TEXT, TIMM, batch, library, make
from open_clip.transformer import Attention

from multimodal.families.clip.attention import PackedAttention
from zoo.errors import ConfigError, MismatchError
from zoo.model.fingerprint import fingerprint

KINDS = pytest.mark.parametrize("kind", [*MICRO, *TIMM])
LINEARS = ("q", "k", "v", "o", "up", "down")


def reference(model: zoo.Model, kind: str) -> nn.Module:
    """The library's module, built by itself and filled with the model's `state_dict`."""
    if kind in TIMM:
        config = open_clip.get_model_config("ViT-B-16-SigLIP")["text_cfg"]
        module = open_clip.create_model(
            "ViT-B-16-SigLIP",
            embed_dim=24,
            force_image_size=32,
            vision_cfg={"image_size": 32, **TIMM[kind]},
            text_cfg={**config, **TEXT},
        )
    else:
        parts = MICRO[kind]
        module = open_clip.CLIP(
            24,
            {**_micro("vision_cfg"), **IMAGE, **parts.get("vision_cfg", {})},
            {**_micro("text_cfg"), **TEXT, **parts.get("text_cfg", {})},
            init_logit_bias=parts.get("init_logit_bias"),
        )
    module = module.double()
    module.load_state_dict(model.backbone.state_dict())  # strict: the same keys
    return module


def _micro(part: str) -> dict[str, Any]:
    from multimodal.families.clip.micro import CONFIG

    return CONFIG[part]


# -- the library's own numbers ------------------------------------------------------------------------------------------


@KINDS
def test_equals_the_library(kind: str) -> None:
    model = make(kind)
    own, (images, ids) = reference(model, kind), batch(model)
    assert sorted(own.state_dict()) == sorted(model.backbone.state_dict())
    attentions = [m for m in own.modules() if isinstance(m, (nn.MultiheadAttention, Attention))]
    assert len(attentions) == sum(isinstance(m, PackedAttention) for m in model.backbone.modules()) > 0
    for mode in (False, True):
        model.train(mode).backbone.train(mode)
        own.train(mode)
        assert torch.allclose(model(images), own.encode_image(images), rtol=0, atol=1e-6)
        assert torch.allclose(model.features(texts=ids), own.encode_text(ids), rtol=0, atol=1e-6)
        scores = model(images, ids)
        assert scores.shape == (3, 3)
        assert torch.allclose(scores, own.get_logits(images, ids)[0], rtol=0, atol=1e-6)


@KINDS
def test_merging_gives_the_librarys_module(kind: str) -> None:
    # timm's projection to the common space has no bias, into which a shift could be merged
    model = make(kind, zoo.adapter("lora", rank=2, targets=LINEARS), zoo.adapter("ia3" if kind in TIMM else "ssf"))
    images, ids = batch(model)
    expected = model(images, ids)
    plain: Any = model.merge()
    assert not [m for m in plain.modules() if type(m).__module__.startswith(("zoo", "multimodal"))]
    assert sorted(plain.state_dict()) == sorted(model.backbone.state_dict())
    torch.testing.assert_close(plain.get_logits(images, ids)[0], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(images, ids), expected, rtol=0, atol=0)  # the model stays
    assert all(p.requires_grad for p in plain.parameters())


def test_single_precision_and_library_attention_classes() -> None:
    model = make("plain").float()
    own = library(model)
    classes = {type(block.attn) for block in (*own.visual.transformer.resblocks, *own.transformer.resblocks)}
    assert classes in ({nn.MultiheadAttention}, {Attention})  # later releases have the second
    images, ids = batch(model)
    torch.testing.assert_close(model(images.float(), ids), own.get_logits(images.float(), ids)[0], rtol=0, atol=1e-5)


def test_attention_of_later_releases_is_called_with_other_keywords() -> None:
    """Their blocks call `attn(x, k_x=x, v_x=x, attn_mask=m)` and get a tensor."""
    source = Attention(32, 4, qk_norm=True)
    nn.init.normal_(source.in_proj_bias)
    x = torch.randn(2, 5, 32)
    mask = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1) > 0, -1e9)
    expected, keys = source(x, attn_mask=mask), list(source.state_dict())
    ours = PackedAttention(source)
    torch.testing.assert_close(ours(x, k_x=x, v_x=x, attn_mask=mask), expected)
    per_head = mask.expand(2 * 4, 5, 5)
    torch.testing.assert_close(ours(x, attn_mask=per_head), expected)
    assert sorted(ours.state_dict()) == sorted(keys)
    back = ours.library()
    assert back is source
    torch.testing.assert_close(back(x, attn_mask=mask), expected)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (lambda: nn.MultiheadAttention(8, 2), "second place"),
        (lambda: nn.MultiheadAttention(8, 2, kdim=4, batch_first=True), "another width"),
        (lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True, batch_first=True), "keys of its own"),
        (lambda: Attention(8, 2, scaled_cosine=True), "cosines"),
        (lambda: nn.TransformerEncoderLayer(8, 2), "no packed projection"),
    ],
)
def test_other_attentions_are_refused(source: Any, reason: str) -> None:
    with pytest.raises(MismatchError, match=reason):
        PackedAttention(source())


# -- keys, copies ---------------------------------------------------------------------------------------------------------


def test_state_dict_loads_both_ways_and_names_what_is_missing() -> None:
    model, other = make("plain"), make("plain", embed_dim=24)
    own, (images, ids) = library(model), batch(model)
    with torch.no_grad():
        for p in other.backbone.parameters():
            p.mul_(0.5)
    other.backbone.load_state_dict(own.state_dict())
    assert torch.equal(other(images, ids), model(images, ids))
    state = own.state_dict()
    key = "visual.transformer.resblocks.1.attn.in_proj_weight"
    del state[key]
    missing, unexpected = other.backbone.load_state_dict(state, strict=False)
    assert (missing, unexpected) == ([key], [])
    with pytest.raises(RuntimeError, match=r"resblocks\.1\.attn\.in_proj_weight"):
        other.backbone.load_state_dict(state)
    attention: Any = other.backbone.visual.transformer.resblocks[0].attn  # type: ignore[union-attr]
    assert list(attention.state_dict()) == ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
    attention.load_state_dict(attention.state_dict())


def test_copies_keep_to_themselves() -> None:
    prompts, after = zoo.adapter("vpt", num_tokens=2, deep=False), zoo.adapter("adapter", form="houlsby", rank=2)
    model = make("plain", zoo.adapter("lora", rank=2), zoo.adapter("ssf"), prompts, after)
    images, ids = batch(model)
    before = model(images, ids)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images, ids), before)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
    assert torch.equal(model(images, ids), before) and not torch.allclose(twin(images, ids), before)
    assert fingerprint(twin.backbone) != fingerprint(model.backbone) == fingerprint(copy.deepcopy(model.backbone))
    other = make("plain", zoo.adapter("lora", rank=2), zoo.adapter("ssf"), prompts, after)
    other.load_state_dict(twin.state_dict())
    torch.testing.assert_close(twin(images, ids), other(images, ids))
    for name in list(twin.adapters):
        twin.remove_adapter(name)
    torch.testing.assert_close(twin(images, ids), library(twin).get_logits(images, ids)[0])


# -- points ---------------------------------------------------------------------------------------------------------------


def test_points_of_both_towers() -> None:
    model = make("plain")
    points = model.points
    assert {p.tower for p in points} == {"image", "text"}
    q, k = points["image.blocks.1.attn.q"], points["text.blocks.0.attn.k"]
    assert (q.path, q.start, q.stop, q.dim_in) == ("visual.transformer.resblocks.1.attn.in_proj", 0, 48, 48)
    assert (k.path, k.start, k.stop, k.dim_in) == ("transformer.resblocks.0.attn.in_proj", 32, 64, 32)
    assert points["image.patch_embed"].dim_in == 48 and points["image.patch_embed"].role == "patch"
    assert points["text.blocks.0.attn.product"].causal and not points["image.blocks.0.attn.product"].causal
    assert points["text.embed"].kind == "condition"
    first = [p.name for p in points if getattr(p, "first", False)]
    assert [p.name for p in points.select("{image,text}.blocks.0.tokens")] == first
    assert len(points.select(role="mlp", kind="sublayer", tower="text")) == 2
    norms = [p.name for p in make("extra norms").points.select("image.blocks.0.**", kind="norm")]
    names = ("norm1", "attn.q_norm", "attn.k_norm", "attn.norm", "norm_attn", "norm2", "mlp.norm")
    assert norms == [f"image.blocks.0.{n}" for n in names]


@pytest.mark.parametrize("kind", ["plain", "extra norms", "timm"])
@pytest.mark.parametrize(
    "adapter",
    [
        zoo.adapter("lora", rank=2, targets="all-linear"),
        zoo.adapter("lora", rank=2, targets="all-linear", dora=True),
        zoo.adapter("adapter", form="houlsby", rank=2),
        zoo.adapter("prefix", num_tokens=2),
        zoo.adapter("vpt", num_tokens=2),
        zoo.adapter("vpt", num_tokens=2, deep=False),
        zoo.adapter("bitfit"),
    ],
    ids=lambda a: f"{a.method}-{next(iter(a.config().values()))}",
)
def test_nothing_is_dead_and_removal_leaves_no_trace(kind: str, adapter: Any) -> None:
    model = make(kind)
    images, ids = batch(model)
    before, expected = copy.deepcopy(model.backbone.state_dict()), model(images, ids)
    model.add_adapter(adapter, name="one")
    assert model.probe(images, ids) == []
    if adapter.method in ("lora", "adapter", "bitfit"):
        started = model(images, ids)
        exact = adapter.method != "lora" or not adapter.dora or kind == "plain"
        torch.testing.assert_close(started, expected, rtol=0, atol=0 if exact else 1e-12)
    model.remove_adapter("one")
    assert torch.equal(model(images, ids), expected)
    after = model.backbone.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)


def test_lora_reaches_every_projection() -> None:
    """144 tensors on ViT-B/32's 24 blocks, of which wrappers of `nn.MultiheadAttention` leave 48 without a gradient."""
    model = make("plain", zoo.adapter("lora", rank=2, targets="all-linear"))
    assert len(model.parameters_to_train()) == 4 * 6 * 2
    images, ids = batch(model)
    own: Any = library(model)
    adapter: Any = model.adapters["lora"]
    with torch.no_grad():
        for tower, blocks, dim in (
            ("image", own.visual.transformer.resblocks, 48),
            ("text", own.transformer.resblocks, 32),
        ):
            for i, block in enumerate(blocks):
                at = lambda name: adapter.module_at(f"{tower}.blocks.{i}.{name}").delta()  # noqa: B023, E731
                block.attn.in_proj_weight += torch.cat([at("attn.q"), at("attn.k"), at("attn.v")])
                block.attn.out_proj.weight += at("attn.o")
                block.mlp.c_fc.weight += at("mlp.up")
                block.mlp.c_proj.weight += at("mlp.down")
                assert at("attn.q").shape == (dim, dim)
    torch.testing.assert_close(model(images, ids), own.get_logits(images, ids)[0])


def test_trained_parameters_take_the_place_of_packed_ones() -> None:
    model = make("plain", zoo.adapter("full"))
    images, ids = batch(model)
    optimizer = torch.optim.SGD(model.parameters_to_train().values(), lr=0.1)
    F.cross_entropy(model.train()(images, ids), torch.arange(3)).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters_to_train().values())
    optimizer.step()
    plain: Any = model.eval().merge()
    torch.testing.assert_close(plain.get_logits(images, ids)[0], model(images, ids))
    attention = plain.visual.transformer.resblocks[0].attn
    trained = model.parameters_to_train()["full/backbone.visual.transformer.resblocks.0.attn.in_proj.weight"]
    assert torch.equal(attention.in_proj_weight, trained)


# -- the table ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", zoo.list_adapters())
def test_every_method_works_or_is_refused_with_a_reason(method: str) -> None:
    (cell,) = zoo.compatibility(["clip"], [method])
    answers = {step: getattr(cell, step) for step in ("attach", "train", "save", "merge")}
    assert not [a for a in answers.values() if a.startswith("defect")], answers
    if method in ("full", "bitfit", "norm", "lora", "ssf", "ia3"):
        assert set(answers.values()) == {"yes"}
    elif method in ("adapter", "prefix", "vpt"):
        assert [answers[s] for s in ("attach", "train", "save")] == ["yes"] * 3 and "cannot be merged" in answers[
            "merge"
        ]


def test_a_classifier_takes_images_alone() -> None:
    name, options = zoo.registry.family("clip").tiny
    model = zoo.load(name, "lora", num_classes=3, pretrained=False, **options)
    images, ids = model.family.tiny_batch()
    assert model(images).shape == (2, 3)
    with pytest.raises(ConfigError, match="The head takes features of width"):
        model(images, ids)
