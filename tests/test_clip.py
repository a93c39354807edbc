"""The family "clip": open_clip's CLIP and CustomTextCLIP, both towers, by comparison with the library's own modules."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import zoo

pytest.importorskip("open_clip")
import open_clip
from clip_models import IMAGE, MICRO, TEXT, TIMM, batch, library, make, straightforward
from open_clip.transformer import Attention

from multimodal.clip_attention import PackedAttention, widen
from zoo.errors import AttachError, ConfigError, DataError, MismatchError, UnknownNameError
from zoo.fingerprint import fingerprint

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
            vision_cfg=TIMM[kind],
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
    from multimodal.clip_micro import CONFIG

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


# -- prompts and prefixes against the straightforward forms ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "layer scale", "extra norms", "no mask", "average"])
@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
def test_prompts_equal_prompts_in_the_sequence(kind: str, deep: bool) -> None:
    for pool in ("patches", "all") if kind == "average" else ("patches",):
        model = make(kind, zoo.adapter("vpt", num_tokens=3, deep=deep, pool=pool))
        images, ids = batch(model)
        straight = straightforward(model, pool)
        scores, expected = model(images, ids), straight(images, ids)
        torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-9)
        ours = list(model.parameters_to_train().values())
        theirs = [*straight.images, *straight.texts]
        weights = torch.randn(3, 3, dtype=torch.double)
        for a, b in zip(
            torch.autograd.grad((scores * weights).sum(), ours),
            torch.autograd.grad((expected * weights).sum(), theirs),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
        model.set_active()
        assert not torch.allclose(model(images, ids), scores)  # the prompts matter


def test_words_do_not_see_what_follows_them_through_prompts() -> None:
    model = make("plain", zoo.adapter("vpt", num_tokens=3, deep=False))
    blocks: Any = model.backbone.transformer.resblocks  # type: ignore[union-attr]
    seen: list[Tensor] = []
    blocks[1].register_forward_hook(lambda module, args, output: seen.append(output))
    _, ids = batch(model)
    other = ids.clone()
    other[:, 6:] = 5
    for each in (ids, other):
        model.features(texts=each)
    assert seen[0].shape[1] == 3 + TEXT["context_length"]
    torch.testing.assert_close(seen[0][:, : 3 + 6], seen[1][:, : 3 + 6])
    assert not torch.allclose(seen[0], seen[1])


def test_widened_mask() -> None:
    causal = torch.zeros(3, 3).masked_fill(torch.ones(3, 3).triu(1) > 0, float("-inf"))
    shown = (widen(causal, 2, 1) == 0).int().tolist()
    assert shown == [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_prefix_equals_more_keys_by_hand() -> None:
    """Of one causal attention: every word sees the prefix."""
    model = make("plain", zoo.adapter("prefix", num_tokens=4, targets="text.blocks.0.attn.product"))
    own, (_, ids) = library(model), batch(model)
    attention: Any = model.backbone.transformer.resblocks[0].attn  # type: ignore[union-attr,index]
    theirs = own.transformer.resblocks[0].attn
    x = torch.randn(2, 12, 32, dtype=torch.double)
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (2, 16)).transpose(1, 2)
        for w, b in zip(theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3))
    )
    keys, values = model.adapters["prefix"].module_at("text.blocks.0.attn.product")(2)
    scores = q @ torch.cat([keys.expand(2, -1, -1, -1), k], dim=2).mT / 4 + F.pad(own.attn_mask.double(), (4, 0))
    y = scores.softmax(-1) @ torch.cat([values.expand(2, -1, -1, -1), v], dim=2)
    expected = theirs.out_proj(y.transpose(1, 2).flatten(2))
    found = attention(x, x, x, attn_mask=own.attn_mask.double())
    torch.testing.assert_close(found[0] if isinstance(found, tuple) else found, expected)
    assert not torch.allclose(model.features(texts=ids), own.encode_text(ids))


@pytest.mark.parametrize("kind", list(TIMM))
@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
def test_prompts_in_towers_of_timm(kind: str, deep: bool) -> None:
    model = make(kind, zoo.adapter("vpt", num_tokens=3, deep=deep), tower="image")
    images, _ = batch(model)
    own: Any = library(model).visual
    trunk, prefix = own.trunk, own.trunk.num_prefix_tokens
    prompts = [p for k, p in model.adapters["vpt"].named_parameters() if k.endswith("prompt")]
    x, count = trunk.norm_pre(trunk._pos_embed(trunk.patch_embed(images))), 0
    for i, block in enumerate(trunk.blocks):
        if deep or i == 0:
            x = torch.cat([x[:, :prefix], prompts[i].expand(3, -1, -1), x[:, prefix + count :]], dim=1)
            count = 3
        x = block(x)
    x = trunk.norm(torch.cat([x[:, :prefix], x[:, prefix + count :]], dim=1))
    torch.testing.assert_close(model(images), own.head(trunk.forward_head(x)), rtol=1e-9, atol=1e-9)


# -- memory, routing, compiling -------------------------------------------------------------------------------------------


def test_memory_settings_give_equal_gradients() -> None:
    model = make(
        "plain",
        zoo.adapter("lora", rank=2, targets="all-linear"),
        zoo.adapter("vpt", num_tokens=2, deep=False),
        zoo.adapter("prefix", num_tokens=2),
        zoo.adapter("norm"),
    ).train()
    images, ids = batch(model)
    found, kept = {}, {}
    for memory in ("default", "low", "min"):
        model.memory = memory
        kept[memory] = model.saved_bytes(images, ids)
        loss = F.cross_entropy(model(images, ids), torch.arange(3))
        found[memory] = torch.autograd.grad(loss, list(model.parameters_to_train().values()))
    for other in ("low", "min"):
        for a, b in zip(found["default"], found[other]):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert kept["min"] < kept["low"] < kept["default"]


def test_adapters_for_each_sample() -> None:
    model = make("plain", num_classes=None)
    for name, seed in (("one", 0), ("two", 1)):
        torch.manual_seed(seed)
        model.add_adapter(zoo.adapter("lora", rank=2), name=name)
    with torch.no_grad():
        for p in model.adapters.parameters():
            p.normal_(std=0.3)
    images, ids = batch(model, 4)
    names = ["one", None, "two", "one"]
    for inputs in ((images,), (None, ids)):
        together = model(*inputs, adapters=names)
        for i, name in enumerate(names):
            model.set_active(*([name] if name else []))
            single = model(*(None if x is None else x[i : i + 1] for x in inputs))
            torch.testing.assert_close(together[i : i + 1], single)
    with pytest.raises(ConfigError, match="every image with every text"):
        model(images, ids, adapters=names)


def test_compiles_in_one_piece() -> None:
    torch._dynamo.reset()
    one: dict[str, Any] = {"vision_cfg": {**IMAGE, "layers": 1}, "text_cfg": {**TEXT, "layers": 1}}
    model = make("plain", zoo.adapter("lora", rank=2), zoo.adapter("vpt", num_tokens=2, deep=False), **one)
    images, ids = batch(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images, ids), model(images, ids))
    torch._dynamo.reset()


# -- the towers and the classifier ----------------------------------------------------------------------------------------


def test_with_a_classifier_the_image_tower_alone_is_adapted(tmp_path: Path) -> None:
    small: dict[str, Any] = {"vision_cfg": IMAGE, "text_cfg": TEXT, "embed_dim": 24, "pretrained": False}
    torch.manual_seed(0)
    model = zoo.load("clip-micro", "lora", num_classes=5, **small)
    for p in model.adapters.parameters():
        nn.init.normal_(p, std=0.1)
    images = torch.randn(3, 3, 16, 16)
    assert {p.tower for p in model.points} == {"image"} and model(images).shape == (3, 5)
    assert model.backbone_kwargs["tower"] == "image"
    assert model.probe(images) == []
    folder = model.save_adapter(tmp_path / "saved")
    for name, options in ((None, {"pretrained": False}), ("clip-micro", small)):
        torch.manual_seed(0)
        again = zoo.load(name, adapter=folder, **options)
        assert {p.tower for p in again.points} == {"image"} and torch.equal(again(images), model(images))
    assert make("plain", zoo.adapter("full"), num_classes=5).probe(images.double()) == []
    model.reset_head(0)
    assert model(images, ["a", "b"]).shape == (3, 2)


def test_one_tower() -> None:
    for tower in ("image", "text"):
        model = make("plain", zoo.adapter("lora"), tower=tower)
        assert {p.tower for p in model.points} == {tower}
        assert model.probe(*batch(model)) == []
        full = make("plain", zoo.adapter("full"), tower=tower)
        assert full.probe(*batch(full)) == []
        keys = [k.removeprefix("full/backbone.") for k in full.parameters_to_train()]
        assert all(k.startswith("visual.") == (tower == "image") for k in keys)
    with pytest.raises(ConfigError, match="image, text, both"):
        make("plain", tower="both towers")
    with pytest.raises(ConfigError, match="image tower"):
        make("plain", tower="text", num_classes=3)


def test_what_is_not_described_is_refused() -> None:
    with pytest.raises(MismatchError, match=r"ModifiedResNet.*tower='text'"):
        zoo.load("open_clip:RN50", device="meta")
    model = zoo.load("open_clip:RN50", "lora", device="meta", tower="text")
    assert {p.tower for p in model.points} == {"text"}
    with pytest.raises(MismatchError, match="CoCa"):
        zoo.load("open_clip:coca_ViT-B-32", device="meta")
    with pytest.raises(MismatchError, match="SwinTransformer"):
        zoo.load("open_clip:swin_base_patch4_window7_224", device="meta")
    with pytest.raises(AttachError, match="query"):
        make("plain", "vqt")


@pytest.mark.parametrize(
    ("trunk", "packed"), [("vit_pe_core_tiny_patch16_384", False), ("eva02_tiny_patch14_224", True)]
)
def test_towers_with_rotary_positions(trunk: str, packed: bool) -> None:
    """Their queries and keys are turned: projections, sublayers and norms are points, the product is none."""
    model = zoo.load(
        "open_clip:EVA02-B-16",
        zoo.adapter("lora", rank=2, targets="all-linear"),
        pretrained=False,
        vision_cfg={"timm_model_name": trunk},
        text_cfg=TEXT,
        embed_dim=24,
        image_size=64 if "16" in trunk else 28,
    )
    points = model.points.select(tower="image")
    assert {p.kind for p in points} == {"linear", "sublayer", "norm", "block"}
    # a packed weight is read past its module
    assert ("q" in {p.role for p in points}) == (not packed)
    assert model.probe(*batch(model.double())) == []
    model.add_adapter(zoo.adapter("adapter", form="houlsby", rank=2))
    assert model.probe(*batch(model)) == []
    split = zoo.load("open_clip:EVA02-B-16", device="meta").points.select(tower="image", kind="linear")
    assert {p.role for p in split} == {"patch", "proj", "gate", *LINEARS}


# -- full-size members, on the meta device --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("clip-vit-b32", 151_277_313),
        ("clip-vit-b16", 149_620_737),
        ("clip-vit-l14", 427_616_513),
        ("siglip-b16", 203_155_970),
        ("clip-micro", 3_927_169),
    ],
)
def test_full_size(name: str, total: int) -> None:
    model = zoo.load(name, "lora", device="meta")
    assert sum(p.numel() for p in model.backbone.parameters()) == total
    approximate = any(type(m).__name__ == "QuickGELU" for m in model.backbone.modules())
    assert approximate == name.startswith("clip-vit")  # OpenAI's weights were trained with it
    if name == "siglip-b16":
        assert model.mean == (0.5, 0.5, 0.5) and model.family.data_config()["crop_mode"] == "squash"
        assert {p.tower for p in model.points.select("*.blocks.*.attn.q")} == {"image", "text"}


def test_lora_counts_of_both_towers() -> None:
    """d = 768 and 512, 12 blocks each: 8 * (165,888 + 110,592)."""
    model = zoo.load("clip-vit-b16", zoo.adapter("lora", rank=8, targets="all-linear"), device="meta")
    assert model.num_parameters(trainable=True) == 8 * 276_480
    assert len(model.parameters_to_train()) == 24 * 6 * 2
    model = zoo.load("open_clip:ViT-B-32/laion2b_s34b_b79k", "lora", device="meta")
    assert not any(type(m).__name__ == "QuickGELU" for m in model.backbone.modules())


# -- names, weights, preprocessing ----------------------------------------------------------------------------------------


def test_weights_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from multimodal import clip_micro

    monkeypatch.setattr(clip_micro, "WEIGHTS", tmp_path / "none.safetensors")
    with pytest.raises(ConfigError, match="pretrained=False"):
        zoo.load("clip-micro")
    with pytest.raises(ConfigError, match="laion2b_s34b_b79k"):
        zoo.load("open_clip:ViT-B-32")

    def offline(*_: Any, **__: Any) -> Any:
        raise OSError("no network")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", offline)
    with pytest.raises(ConfigError, match=r"no network.*pretrained=False"):
        zoo.load("clip-vit-b32")
    with pytest.raises(ConfigError, match="does not take"):
        zoo.load("clip-micro", pretrained=False, embedding=3)
    with pytest.raises(UnknownNameError, match="ViT-B-32"):
        zoo.load("open_clip:ViT-B-33")


def test_weights_of_open_clip_are_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`pretrained` goes through the library: a file in the library's layout."""
    torch.manual_seed(3)
    small = {
        "vision_cfg": {"layers": 1, "width": 64, "image_size": 32},
        "text_cfg": {"layers": 1, "width": 32, "heads": 2},
    }
    config = open_clip.get_model_config("ViT-B-32")
    theirs = open_clip.CLIP(
        16,
        {**config["vision_cfg"], **small["vision_cfg"]},
        {**config["text_cfg"], **small["text_cfg"]},
        quick_gelu=True,
    )
    torch.save(theirs.state_dict(), tmp_path / "clip.pt")
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(tmp_path / "clip.pt"))
    model = zoo.load("clip-vit-b32", embed_dim=16, **small)
    images, ids = torch.randn(2, 3, 32, 32), model.family.tokenize(["a cat", "two dogs in the snow"])  # type: ignore[attr-defined]
    torch.testing.assert_close(model(images, ids), theirs.eval().get_logits(images, ids)[0], rtol=0, atol=1e-5)
    assert model.family.hub_id() == "timm/vit_base_patch32_clip_224.openai" and model.family.licence() == "mit"


@pytest.mark.parametrize(("name", "size"), [("clip-vit-b32", 224), ("siglip-b16", 224), ("clip-micro", 32)])
def test_preprocessing_is_open_clips(name: str, size: int) -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    model = zoo.load(name, device="meta")
    pixels = np.random.default_rng(0).integers(0, 255, (75, 100, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((300, 260))
    theirs = image_transform_v2(PreprocessCfg(**model.backbone.visual.preprocess_cfg), is_train=False)(image)  # type: ignore[union-attr,arg-type]
    ours = model.preprocess()(image)
    assert ours.shape == (3, size, size) and torch.equal(ours, theirs)
    assert model.preprocess(train=True)(image).shape == (3, size, size)


def test_a_vit_fits_into_the_image_tower_of_micro() -> None:
    from timm.models.vision_transformer import VisionTransformer

    from multimodal.clip_micro import load_vit

    torch.manual_seed(0)
    vit = VisionTransformer(img_size=32, patch_size=4, embed_dim=192, depth=6, num_heads=3, num_classes=100).eval()
    for p in vit.parameters():
        nn.init.normal_(p, std=0.1)
    model = zoo.load("clip-micro", pretrained=False)
    tower: Any = model.backbone.visual
    load_vit(tower, vit.state_dict())
    images = torch.randn(2, 3, 32, 32)
    expected = vit.forward_head(vit.forward_features(images), pre_logits=True) @ tower.proj
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in model.backbone.parameters()) * 2 < 8_000_000


# -- texts ----------------------------------------------------------------------------------------------------------------


def test_texts_are_tokens_of_open_clip() -> None:
    model = zoo.load("clip-vit-b32", device="meta")
    family: Any = model.family
    texts = ["a photo of a cat", "Two dogs!"]
    assert torch.equal(family.tokenize(texts), open_clip.get_tokenizer("ViT-B-32")(texts))
    assert family.tokenize("word " * 75).shape == (1, 77)
    with pytest.raises(DataError, match=r"text 1 has 78 tokens.*77.*'word word"):
        family.tokenize(["short", "word " * 76])
    cut = family.tokenize("word " * 76, truncate=True)
    assert torch.equal(cut, open_clip.get_tokenizer("ViT-B-32")("word " * 76)) and cut[0, -1] == 49407
    for wrong, reason in ((["a", "  "], "text 1 is empty"), ([3], "int"), ([], "no texts")):
        with pytest.raises(DataError, match=reason):
            family.tokenize(wrong)


def test_the_short_vocabulary_of_micro() -> None:
    model = zoo.load("clip-micro", pretrained=False)
    family: Any = model.family
    ids = family.tokenize(["a photo of a zebra, running", "éàü \U0001f600"])
    assert ids.shape == (2, 64) and ids.max() == 3071 and ids[0, 0] == 3070
    assert torch.equal(ids.argmax(1), (ids == 3071).int().argmax(1))  # the end is where the embedding is read
    from multimodal.clip_text import tokenizer

    words = tokenizer("zoo:clip-micro", 64, 3072)
    end = int(ids[0].argmax())
    assert words.decode(ids[0, 1:end].tolist()).strip() == "a photo of a zebra , running"
    full = open_clip.get_tokenizer("ViT-B-32")
    assert words.encode("a photo of the dog") == full.encode("a photo of the dog") or len(words.encode("a dog")) == 2
    assert model(torch.randn(1, 3, 32, 32), ["a dog", "a cat"]).shape == (1, 2)
    with pytest.raises(DataError, match="64"):
        model.features(texts=["zebra " * 40])
    with pytest.raises(DataError, match=r"\(1, 65\)"):
        model.features(texts=torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(DataError, match="neither"):
        model.features()


# -- zero-shot ------------------------------------------------------------------------------------------------------------

CLASSES = ("cat", "dog", "pick-up truck")
TEMPLATES = ("a photo of a {}.", lambda name: f"the {name}", "{}")


@pytest.mark.parametrize("kind", ["plain", "no mask"])
def test_zero_shot_classifier_is_open_clips(kind: str, tmp_path: Path) -> None:
    from multimodal.zero_shot import encode_image, put_zero_shot_classifier
    from zoo.disk import attach, read

    text_cfg = {**TEXT, **MICRO[kind].get("text_cfg", {}), "context_length": 24}
    model = make(kind, zoo.adapter("lora", rank=2), text_cfg=text_cfg)
    own, (images, _) = model.merge(), batch(model)
    head = put_zero_shot_classifier(model, CLASSES, TEMPLATES)
    assert model.num_classes == 3 and model.classes == list(CLASSES) and head.weight.requires_grad
    family: Any = model.family
    functions = [lambda name, t=t: t.format(name) if isinstance(t, str) else t(name) for t in TEMPLATES]
    theirs = open_clip.build_zero_shot_classifier(own, family.tokenize, CLASSES, functions)
    scores = own.logit_scale.exp() * own.encode_image(images, normalize=True) @ theirs  # type: ignore[operator]
    if own.logit_bias is not None:
        scores = scores + own.logit_bias
    torch.testing.assert_close(model(images), scores, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encode_image(model, images), own.encode_image(images, normalize=True))  # type: ignore[operator]

    head = put_zero_shot_classifier(model, CLASSES, TEMPLATES[:1])
    texts = family.tokenize([f"a photo of a {name}." for name in CLASSES])
    torch.testing.assert_close(model(images), model.features(images, texts), rtol=1e-5, atol=1e-5)

    folder = model.save_adapter(tmp_path / "zero-shot")
    again = make(kind, text_cfg=text_cfg)
    attach(again, read(folder))
    assert again.classes == list(CLASSES) and type(again.head) is type(head)
    assert torch.equal(again(images), model(images))


def test_zero_shot_asks_for_names_and_places() -> None:
    from multimodal.zero_shot import encode_text, zero_shot_classifier

    model = make("plain")
    for classes, templates, reason in (
        ((), ("{}",), "names"),
        (("a",), (), "template"),
        (("a",), ("a photo",), "place"),
    ):
        with pytest.raises(ConfigError, match=reason):
            zero_shot_classifier(model, classes, templates)
    with pytest.raises(DataError, match="tokens"):
        zero_shot_classifier(model, ["a very long name of a class indeed, with many words"])
    torch.testing.assert_close(encode_text(model, ["a", "b"]).norm(dim=-1), torch.ones(2, dtype=torch.double))
    with pytest.raises(ConfigError, match="width"):
        model.set_head(nn.Linear(7, 3))
    vit = zoo.load("vit-micro", pretrained=False, num_classes=0, depth=1)
    with pytest.raises(DataError, match="text tower"):
        zero_shot_classifier(vit, ["a"])


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
