"""Every kind of block of timm's VisionTransformer: gated MLPs, convolutional stems, norms behind branches, parallel branches."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from straightforward_vpt import StraightViT
from timm.layers import LayerNorm, RmsNorm
from torch import Tensor, nn

import zoo
from zoo.errors import AttachError, ConfigError, MismatchError

SMALL: dict[str, Any] = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3}
NETS: dict[str, tuple[str, dict[str, Any]]] = {
    "swiglu": ("aimv2_large_patch14_224", {**SMALL, "img_size": 28}),
    "packed": ("vit_giant_patch14_dinov2", {**SMALL, "img_size": 28}),
    "post-norm": ("vit_base_patch16_rpn_224", SMALL),
    "things": ("vit_small_patch16_18x2_224", SMALL),
    "side by side": ("vit_pwee_patch16_reg1_gap_256", SMALL),
    "side by side, differential": ("vit_dpwee_patch16_reg1_gap_256", SMALL),
    "differential": ("vit_dwee_patch16_reg1_gap_256", SMALL),
    "differential, normed": ("vit_dwee_patch16_reg1_gap_256", {**SMALL, "qk_norm": True, "scale_attn_norm": True}),
    "gate": ("vit_tiny_patch16_224", {**SMALL, "qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True}),
    "hybrid": ("vit_tiny_r_s16_p8_224", {**SMALL, "img_size": 64}),
    "vitamin": ("vitamin_small_224", {"img_size": 32, "depth": 2}),
}
EACH = pytest.mark.parametrize("kind", list(NETS))
# with an attention that is a module
PLAIN = ("swiglu", "packed", "post-norm", "things", "gate", "hybrid", "vitamin", "differential", "differential, normed")


def load(kind: str, adapter: Any = None, **options: Any) -> zoo.Model:
    name, small = NETS[kind]
    torch.manual_seed(0)
    model = zoo.load(f"timm:{name}", adapter, pretrained=False, **{"num_classes": 5, **small, **options}).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # what starts at zero or one counts too
        for p in [*model.backbone.parameters(), *model.adapters.parameters()]:
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model


def images(kind: str, count: int = 3) -> Tensor:
    size = NETS[kind][1]["img_size"]
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2))


@EACH
def test_the_network_is_timms_and_every_projection_and_norm_of_its_blocks_is_a_point(kind: str) -> None:
    """LoRA on "all-linear" of AIMv2 reached 61 % of the linears: `fc1_g` and `fc1_x` were no points."""
    name, small = NETS[kind]
    model = load(kind)
    plain = timm.create_model(name, num_classes=0, **small).eval()
    plain.load_state_dict(model.backbone.state_dict())
    assert torch.equal(model.features(images(kind)), plain(images(kind)))
    for what, types in (("linear", nn.Linear), ("norm", (LayerNorm, nn.LayerNorm, RmsNorm))):
        found = {p.module for p in model.points.select(kind=what)}
        inside = [m for m in model.backbone.blocks.modules() if isinstance(m, types)]  # type: ignore[union-attr,arg-type]
        assert [m for m in inside if m not in found] == []


@EACH
def test_lora_on_all_linears_reaches_all_and_merges(kind: str) -> None:
    model = load(kind, zoo.adapter("lora", targets="all-linear"))
    x = images(kind)
    assert model.probe(x) == []
    inside = [m for m in model.backbone.blocks.modules() if isinstance(m, nn.Linear)]  # type: ignore[union-attr]
    reached = {p.path for p in model.points.select(kind="linear") if f"lora/{p.name}" in _owned(model)}
    assert len(reached) == len(inside)
    torch.testing.assert_close(model.merge()(x), model(x), rtol=1e-5, atol=1e-5)


def _owned(model: zoo.Model) -> set[str]:
    return {key.rpartition(".")[0] for key in model.parameters_to_train()}


@pytest.mark.parametrize(("name", "gate", "up"), [("swiglu", "fc1_g", "fc1_x"), ("vitamin", "w0", "w1")])
def test_gate_and_up_of_a_gated_mlp(name: str, gate: str, up: str) -> None:
    model = load(name)
    assert model.points["blocks.1.mlp.gate"].module is model.backbone.get_submodule(f"blocks.1.mlp.{gate}")
    assert model.points["blocks.1.mlp.up"].module is model.backbone.get_submodule(f"blocks.1.mlp.{up}")
    assert [p.role for p in model.points.readers(model.points["blocks.1.mlp"])] == ["gate", "up"]


@pytest.mark.parametrize("method", ["bitfit", "norm", "ssf", "adapter", "ia3"])
@EACH
def test_nothing_is_dead(kind: str, method: str) -> None:
    if method == "ia3" and kind == "side by side, differential":  # one projection out of both: there is no `down`
        with pytest.raises(zoo.ZooError, match="'down' matches no linear point"):
            load(kind, method)
        return
    model = load(kind, method)
    assert model.probe(images(kind)) == []
    if method == "ia3":
        torch.testing.assert_close(model.merge()(images(kind)), model(images(kind)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
@pytest.mark.parametrize("kind", PLAIN)
def test_prompts_are_tokens_as_the_paper_has_them(kind: str, deep: bool) -> None:
    model = load(kind, zoo.adapter("vpt", num_tokens=4, deep=deep)).double()
    prompts = [p for k, p in model.adapters["vpt"].named_parameters() if k.endswith("prompt")]
    reference = StraightViT(model.backbone, prompts, deep)
    x = images(kind).double()
    found = torch.autograd.grad(model.features(x).square().sum(), prompts)
    with model.disable():
        expected = reference(x)
    torch.testing.assert_close(model.features(x), expected, rtol=1e-10, atol=1e-10)
    with model.disable():
        wanted = torch.autograd.grad(reference(x).square().sum(), list(reference.prompts))
    for a, b in zip(found, wanted):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", PLAIN)
def test_prefixes_act_and_their_parameters_learn(kind: str) -> None:
    model = load(kind, "prefix")
    x = images(kind)
    assert model.probe(x) == []
    with model.disable():
        bare = model(x)
    assert not torch.equal(model(x), bare)


def test_what_has_no_attention_module_says_so() -> None:
    with pytest.raises(AttachError, match="needs attention points"):
        load("side by side", "prefix")
    with pytest.raises(AttachError, match="is a ParallelScalingBlock"):
        load("side by side", "vpt")
    with pytest.raises(AttachError, match="pre-norm blocks"):
        load("post-norm", "vqt")


@pytest.mark.parametrize("kind", ["side by side", "side by side, differential"])
def test_slices_of_the_one_projection(kind: str) -> None:
    """Up, q, k and v are slices of unequal width of one matrix; a delta changes its own rows."""
    model = load(kind)
    block = model.backbone.blocks[0]  # type: ignore[index,union-attr]
    parts = [model.points[f"blocks.0.{n}"] for n in ("mlp.up", "attn.q", "attn.k", "attn.v")]
    assert [(p.start, p.stop) for p in parts] == [(0, 240), (240, 288), (288, 336), (336, 384)]
    assert block.in_proj.out_features == 384
    with pytest.raises(AttachError, match="does not come in halves"):
        model.family.half(block, "attn", torch.zeros(1, 5, 48))


@pytest.mark.parametrize("kind", ["swiglu", "post-norm", "things", "differential", "gate"])
def test_halves_are_the_block(kind: str) -> None:
    model = load(kind)
    block, x = model.backbone.blocks[1], torch.randn(2, 5, 48)  # type: ignore[index,union-attr]
    half = model.family.half
    assert torch.equal(half(block, "mlp", half(block, "attn", x)), block(x))


def test_two_classifiers_of_a_distilled_network() -> None:
    """With its own classifiers a distilled network gave features where logits were expected."""
    name, options = "deit_tiny_distilled_patch16_224", {"pretrained": False, **SMALL}
    model = zoo.load(f"timm:{name}", zoo.adapter("lora", targets="q"), **options).eval()
    assert model.num_classes == 1000
    plain, x = timm.create_model(name, **SMALL).eval(), torch.randn(2, 3, 32, 32)
    plain.load_state_dict({**model.backbone.state_dict(), **model.head.state_dict()})
    assert torch.equal(model(x), plain(x))
    assert model.probe(x) == []
    with torch.no_grad():
        for p in model.adapters.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    merged = model.merge()
    assert type(merged) is type(plain)
    torch.testing.assert_close(merged(x), model(x), rtol=1e-5, atol=1e-5)
    assert zoo.load(f"timm:{name}", num_classes=3, **options)(x).shape == (2, 3)


def test_tokens_that_are_not_pooled_are_features_and_no_classifier_stands_on_them() -> None:
    """With `global_pool=""` a classifier was put on each token, and training failed inside of torch."""
    x = torch.randn(2, 3, 32, 32)
    for name, shape in (("vit-micro", (2, 65, 192)), ("swin-micro", (2, 4, 4, 192))):
        model = zoo.load(name, "lora", global_pool="", pretrained=False)
        assert model(x).shape == shape and model.num_classes == 0 and model.probe(x) == []
        with pytest.raises(ConfigError, match="no pooled features"):
            zoo.load(name, "lora", global_pool="", pretrained=False, num_classes=3)
        with pytest.raises(MismatchError, match="pooled"):
            model.outputs(x, want=("pooled",))
        with pytest.raises(AttachError, match="beside pooled ones"):
            zoo.load(name, "vqt", global_pool="", pretrained=False)


@pytest.mark.parametrize("kind", ["packed", "gate"])
def test_low_memory_where_a_method_keeps_the_projection_itself(kind: str) -> None:
    """A scale behind the projection needs its output for its own gradient: it is given back, too, by the same product."""
    model = load(kind, "ssf").train()
    x, found, kept = images(kind), [], []
    for setting in ("off", "default", "low"):
        model.memory = setting
        found.append(torch.autograd.grad(model(x).square().sum(), list(model.parameters_to_train().values())))
        kept.append(model.saved_bytes(x))
    assert kept[0] > kept[1] > kept[2]
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@pytest.mark.parametrize("kind", ["swiglu", "packed", "vitamin", "gate"])
def test_low_memory_does_not_keep_the_hidden_tokens_of_gated_mlps(kind: str) -> None:
    """Of a fused gate and up projection nothing was given back: the recipe of the activation held a view of it."""
    model = load(kind, "lora").train()
    x, found, kept = images(kind), [], []
    for setting in ("off", "default", "low"):
        model.memory = setting
        parameters = list(model.parameters_to_train().values())
        found.append(torch.autograd.grad(model(x).square().sum(), parameters))
        kept.append(model.saved_bytes(x))
    assert kept[0] > kept[1] > kept[2]
    block = model.backbone.blocks[0]  # type: ignore[index,union-attr]
    hidden = sum(m.out_features for k, m in block.mlp.named_children() if k in ("fc1", "fc1_g", "fc1_x", "w0", "w1"))
    tokens = model.outputs(x, want=("tokens",))["tokens"][..., 0].numel()
    assert kept[1] - kept[2] >= 4 * 2 * tokens * hidden - 4 * 2 * tokens * block.norm2.weight.numel()
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))
