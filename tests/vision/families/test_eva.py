"""EVA, EVA-02, DINOv3, Perception Encoder, RoPE ViTs and BEiT: equal to timm, nothing dead, merges exact, counts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flat_models import MODELS, asked, images, library, prompted, shaken, with_prefix, wrapped
from torch import nn

import zoo
from vision.adapters.parts.sensitivity import candidates
from zoo.adapters.prefix import Prefix
from zoo.errors import AttachError, MergeError

each_kind = pytest.mark.parametrize("kind", list(MODELS))
TARGETS = torch.tensor([0, 3, 1])


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_to_the_library_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    """Also where q and v have biases beside their projection, which timm adds in one product (bf16: another rounding if not)."""
    source, model = library(kind).to(dtype), wrapped(kind, dtype=dtype)
    keys = [k for k in source.state_dict() if not k.startswith("head.")]
    assert list(model.backbone.state_dict()) == keys
    with torch.no_grad():
        assert torch.equal(model(images().to(dtype)), source(images().to(dtype)))


def test_biases_beside_a_projection_are_added_in_its_product_at_full_width() -> None:
    """Added afterwards (timm's `qkv_bias_separate`), they round otherwise: 5e-7 apart at this width."""
    torch.manual_seed(0)
    source = shaken(zoo.load("timm:vit_base_patch16_dinov3_qkvb", pretrained=False, num_classes=0, depth=1).merge())
    model = zoo.load("timm:vit_base_patch16_dinov3_qkvb", "lora", pretrained=False, num_classes=0, depth=1)
    model.backbone.load_state_dict(source.state_dict())
    attention = source.blocks[0].attn
    assert type(attention).__name__ == "EvaAttention" and type(attention.qkv) is nn.Linear
    assert attention.q_bias.any() and attention.qkv.bias is None
    x = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), source.eval()(x))


@each_kind
def test_full_form_of_every_method_is_alive_and_merges(kind: str) -> None:
    for method in ("lora", "bitfit", "norm", "ssf", "ia3", "vpt", "prefix", "vqt", "adapter", "full"):
        adapter = zoo.adapter(method, **({"targets": "all-linear"} if method == "lora" else {}))
        model = wrapped(kind, adapter).train()
        assert model.probe(images()) == [], method
        logits = model(images())
        F.cross_entropy(logits, TARGETS).backward()
        dead = [k for k, p in model.parameters_to_train().items() if p.grad is None or not p.grad.any()]
        assert dead == [], method
        if method in ("lora", "bitfit", "norm", "ia3", "full"):
            plain = model.eval().merge()
            assert type(plain.blocks[0].attn).__module__.startswith("timm.")
            assert {type(m) for m in plain.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
            with torch.no_grad():
                torch.testing.assert_close(plain(images()), model(images()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["beit", "beit-shared", "eva-g", "eva02-e"])
def test_ssf_merges_where_a_shift_of_all_keys_changes_nothing(kind: str) -> None:
    model = wrapped(kind, "ssf")
    with torch.no_grad():
        torch.testing.assert_close(model.merge()(images()), model(images()), rtol=1e-5, atol=1e-5)


def test_ssf_on_turned_keys_without_a_bias_is_refused_when_merging() -> None:
    with pytest.raises(MergeError, match=r"attn\.k' has no bias to merge into"):
        wrapped("dinov3-biases", "ssf").merge()


def test_shifts_of_patches_without_a_bias_go_into_their_positions() -> None:
    model = wrapped("pe-core", zoo.adapter("ssf", targets="patch_embed"))
    assert model.points["patch_embed"].module.bias is None
    with torch.no_grad():
        torch.testing.assert_close(model.merge()(images()), model(images()), rtol=1e-5, atol=1e-5)


@each_kind
@pytest.mark.parametrize("deep", [True, False])
def test_prompts_are_prefix_tokens_of_the_model_and_of_every_attention(kind: str, deep: bool) -> None:
    model = wrapped(kind, zoo.adapter("vpt", num_tokens=4, deep=deep))
    prompts = [p.prompt for p in model.adapters["vpt"].modules() if hasattr(p, "prompt")]
    source = library(kind)
    ours = model(images())
    expected = prompted(source, prompts, deep)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(F.cross_entropy(ours, TARGETS), prompts)
    wanted = torch.autograd.grad(F.cross_entropy(expected, TARGETS), prompts)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert model.family.num_prefix == source.num_prefix_tokens


@each_kind
def test_prefixes_and_the_attention_by_hand(kind: str) -> None:
    model = wrapped(kind, zoo.adapter("prefix", num_tokens=3))
    block, source = model.backbone.blocks[1], library(kind).blocks[1]
    seen: list[Any] = []
    handle = block.attn.register_forward_hook(lambda m, a, k, y: seen.append((a[0], k, y)), with_kwargs=True)
    model(images())
    handle.remove()
    ((x, further, y),) = seen
    part = model.adapters["prefix"].module_at("blocks.1.attn.product")
    keys, values = part(1)
    bias: Any = 0.0
    if "beit" in kind:
        shared = further["shared_rel_pos_bias"]
        bias = source.attn._get_rel_pos_bias() if shared is None else shared
    expected = with_prefix(source.attn, x, keys[0], values[0], further.get("rope"), bias)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@each_kind
def test_queries_read_the_turned_keys_and_change_nothing(kind: str) -> None:
    model, source = wrapped(kind, zoo.adapter("vqt", num_tokens=2, dropout=0.0)), library(kind)
    entering: list[Any] = []
    for block in source.blocks:
        block.register_forward_hook(lambda m, a, k, y: entering.append((a[0], k)), with_kwargs=True)
    received: list[Any] = []
    queries = list(model.adapters["vqt"].queries())  # type: ignore[operator]
    for each in queries:
        each.receive = received.append
    with torch.no_grad():
        expected = source.forward_features(images())
        assert torch.equal(model.backbone.forward_features(images()), expected)
    for each, block, (x, further), z in zip(queries, source.blocks, entering, received, strict=True):
        wanted = asked(block, each(1)[0], x, further.get("rope"))
        torch.testing.assert_close(z, wanted, rtol=1e-4, atol=1e-5)


def test_grouped_keys_have_a_prefix_for_each_head_of_the_queries() -> None:
    model = wrapped("sapiens2-grouped", "prefix")
    point = model.points["blocks.0.attn.product"]
    assert (point.num_heads, point.module.num_kv_heads) == (3, 1)
    assert model.points["blocks.0.attn.k"].dim_out == 16 and isinstance(model.adapters["prefix"], Prefix)


def test_bitfit_trains_the_biases_beside_the_projection() -> None:
    model = wrapped("dinov3-biases", "bitfit")
    names = [k for k in model.parameters_to_train() if ".attn." in k]
    assert [n.removeprefix("bitfit/blocks.0.attn.") for n in names[:3]] == ["q.bias", "v.bias", "o.bias"]
    frozen = library("dinov3-biases")
    with torch.no_grad():
        trained = model.adapters["bitfit"].get_parameter("blocks.0.attn.q.bias").add_(1.0)
        plain = model.merge()
        assert torch.equal(plain.blocks[0].attn.q_bias, trained)
        torch.testing.assert_close(plain(images()), model(images()))
        with model.disable():
            assert torch.equal(model(images()), frozen(images()))


def test_prompts_kept_for_evaluation_notice_a_bias_that_was_trained() -> None:
    model = wrapped("dinov3-biases", zoo.adapter("vpt", num_tokens=4))
    model.add_adapter("bitfit")
    model.eval()
    with torch.no_grad():
        before = model(images())
        assert torch.equal(model(images()), before)
        model.adapters["bitfit"].get_parameter("blocks.1.attn.v.bias").add_(0.5)
        after = model(images())
        model.memory = "off"  # nothing that was kept before is left
        model.train().eval()
        torch.testing.assert_close(after, model(images()))
    assert not torch.allclose(after, before)


def test_a_copy_has_biases_of_its_own() -> None:
    model = wrapped("eva-g", "lora")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.backbone.blocks[0].attn._parameters["v_bias"].add_(1.0)
        assert not torch.equal(twin(images()), model(images()))
        model.remove_adapter("lora")
        assert torch.equal(model(images()), library("eva-g")(images()))


def test_spt_scores_and_tunes_biases_beside_the_projection() -> None:
    everything = sum(c.size for c in candidates(wrapped("eva02-packed").points, "lora", 8, 10, 5))
    model = wrapped("eva02-packed", zoo.adapter("spt", budget=everything / 1e6))
    model.adapters["spt"].calibrate(model, [(images(), TARGETS)])
    assert model.probe(images()) == []
    with torch.no_grad():
        torch.testing.assert_close(model.merge()(images()), model(images()), rtol=1e-5, atol=1e-5)


def test_blocks_by_hand() -> None:
    for kind in ("dinov3", "eva02-e", "beit"):
        model = wrapped(kind, "lora")
        run = zoo.blocks(model)
        here = run.start(images())
        with torch.no_grad():
            tokens = run.half(0, "mlp", here)(run.half(0, "attn", here)(here.tokens))
            torch.testing.assert_close(tokens, run.advance(here, 1).tokens)
            assert torch.equal(run.finish(run.advance(here)), model.features(images()))
    with pytest.raises(AttachError, match="plain sequence"):
        zoo.blocks(wrapped("rope-mixed"))


# -- counts -----------------------------------------------------------------------------------------------------------


def _bare(name: str) -> zoo.Model:
    return zoo.load(name, num_classes=0, device="meta")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("dinov3-s16", 21_586_944),
        ("dinov3-s16-plus", 28_683_264),
        ("dinov3-b16", 85_641_216),
        ("eva02-ti14", 5_502_144),
        ("eva02-s14", 21_621_120),
        ("eva02-b14", 85_758_720),
        ("timm:vit_base_patch16_dinov3_qkvb", 85_659_648),
        ("timm:eva02_base_patch16_clip_224", 85_869_312),
    ],
)
def test_parameters_without_head(name: str, parameters: int) -> None:
    assert sum(p.numel() for p in _bare(name).backbone.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "adapter", "count"),
    [
        ("dinov3-b16", zoo.adapter("lora", rank=8, targets=("q", "v")), 294_912),
        ("dinov3-b16", zoo.adapter("norm"), 38_400),
        ("dinov3-b16", zoo.adapter("bitfit"), 75_264),
        ("timm:vit_base_patch16_dinov3_qkvb", zoo.adapter("bitfit"), 93_696),
        ("dinov3-b16", zoo.adapter("lora", rank=1, targets="all-linear"), 165_888),
        ("eva02-b14", zoo.adapter("lora", rank=1, targets="all-linear"), 175_104),
        ("dinov3-s16-plus", zoo.adapter("lora", rank=1, targets="all-linear"), 105_984),
        ("eva02-b14", zoo.adapter("ia3"), 43_008),
    ],
)
def test_what_methods_train(name: str, adapter: Any, count: int) -> None:
    model = _bare(name)
    model.add_adapter(adapter)
    assert model.num_parameters(trainable=True, head=False) == count


@pytest.mark.parametrize(
    "name",
    ["pe-core-s16", "eva02-b14", "timm:eva02_base_patch16_clip_224", "beit-b16", "timm:vit_base_patch16_sapiens2"],
)
def test_every_norm_is_a_point_and_every_linear_of_the_blocks(name: str) -> None:
    model = _bare(name)
    norms = {id(m) for m in model.backbone.modules() if "Norm" in type(m).__name__}
    assert {id(p.module) for p in model.points.select(kind="norm")} == norms
    linears = {id(m) for m in model.backbone.modules() if isinstance(m, nn.Linear)}
    assert {id(p.module) for p in model.points.select(kind="linear") if p.role != "patch"} == linears
