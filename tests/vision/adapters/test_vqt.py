"""VQT: against a form written out by hand, and what it promises: an untouched main stream, little memory, no leaks."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from vqt_models import (
    SWIN_NAME,
    TARGETS,
    by_hand,
    gradients,
    images,
    kept,
    make,
    named,
)

import zoo
from zoo.engine import queries as streams
from zoo.engine.memory import saved_bytes


@pytest.mark.parametrize("few", [0, 4])
@pytest.mark.parametrize(
    ("name", "tokens", "options"),
    [
        ("vit-micro", 1, {}),
        ("vit-micro", 3, {"init_values": 0.1, "qk_norm": True}),
        ("vit-micro", 2, {"scale_attn_norm": True, "reg_tokens": 2}),
        (SWIN_NAME, 1, {}),
        (SWIN_NAME, 3, {}),
    ],
)
def test_equals_the_form_with_queries_in_the_sequence(
    monkeypatch: pytest.MonkeyPatch, few: int, name: str, tokens: int, options: dict[str, Any]
) -> None:
    """Both ways to keep what backward needs: covariances, and keys and values."""
    monkeypatch.setattr(streams, "FEW", few)
    model = make(name, zoo.adapter("vqt", num_tokens=tokens, dropout=0.0), **options)
    x = images(model)
    logits, found = gradients(model, x)
    hand = by_hand(model, x)
    torch.testing.assert_close(logits, hand, rtol=1e-5, atol=1e-5)
    parameters = named(model)
    expected = torch.autograd.grad(F.cross_entropy(hand, TARGETS), list(parameters.values()))
    for key, gradient in zip(parameters, expected):
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())
    assert sum("tokens" in key for key in found) == len(model.points.select(kind="attention"))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), logits, rtol=1e-5, atol=1e-5)


# -- the main stream ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit-micro", SWIN_NAME])
def test_the_backbones_own_tokens_are_untouched_and_have_no_graph(name: str) -> None:
    model = make(name, "vqt").train()
    x = images(model)
    seen: list[Tensor] = []
    handles = [
        p.module.register_forward_hook(lambda m, a, y: seen.append(y)) for p in model.points.select(kind="block")
    ]
    model(x).sum().backward()
    assert not any(y.requires_grad for y in seen)
    with_queries, seen[:] = list(seen), []
    with model.disable():
        model(x)
    assert len(seen) == len(with_queries) > 1 and all(torch.equal(a, b) for a, b in zip(with_queries, seen))
    for handle in handles:
        handle.remove()
    assert all(p.grad is None for p in model.backbone.parameters())
    pixels = x.clone().requires_grad_(True)  # who asks for the gradient of the input still gets it
    model(pixels).sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().sum() > 0


def test_memory() -> None:
    """At the width, heads and length of ViT-B/16; two blocks show what twelve keep, but for the constant part."""
    model = zoo.load("vit-b16", "vqt", num_classes=100, pretrained=False, depth=2)
    plain = timm.create_model("vit_base_patch16_224", num_classes=100, depth=2)
    x = torch.randn(2, 3, 224, 224)
    full = saved_bytes(lambda: plain(x), [*plain.parameters(), *plain.buffers(), x])
    # covariances: 12 heads * 64 * 64 of 16 * 197 * 768 values; the rest grows with the one query, not with the 197 tokens
    assert model.saved_bytes(x) <= 0.04 * full
    streams_few, streams.FEW = streams.FEW, 0
    try:
        assert model.saved_bytes(x) <= 0.14 * full  # keys and values: 2 of 16
    finally:
        streams.FEW = streams_few


@pytest.mark.parametrize("memory", ["low", "min"])
@pytest.mark.parametrize("adapters", [["vqt"], ["vqt", "lora"]])
def test_memory_settings_change_no_gradient(memory: str, adapters: list[str]) -> None:
    quiet = [zoo.adapter("vqt", dropout=0.0) if a == "vqt" else zoo.adapter(a) for a in adapters]
    model = make(adapter=quiet)
    x = images(model)
    logits, expected = gradients(model, x)
    model.memory = memory
    again, found = gradients(model, x)
    torch.testing.assert_close(again, logits)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-6)
    assert all(q.caught is None and q.answers is None for q in model.adapters["vqt"].queries())  # type: ignore[operator]


# -- nothing stays behind ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit-micro", SWIN_NAME])
def test_a_forward_pass_leaves_nothing_behind(name: str) -> None:
    model = make(name)
    x = images(model)
    last = model.points.select(kind="block")[-1].module
    refs: list[Any] = []
    handle = last.attn.qkv.register_forward_hook(lambda m, a, y: refs.append(weakref.ref(y)))
    logits = model(x)
    assert all(value is None for value in kept(model))
    del logits
    gc.collect()
    assert refs and all(ref() is None for ref in refs)
    handle.remove()

    def fail(*_: Any) -> None:
        raise RuntimeError("broken off")

    handle = last.mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken off"):
        model(x)
    handle.remove()
    assert all(value is None for value in kept(model))
    before = model(x)
    assert torch.equal(before, model(x))


def test_removal_leaves_the_backbone_as_it_was() -> None:
    model = make()
    x = images(model)
    frozen = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    with model.disable():
        bare = model(x)
    model.remove_adapter("vqt")
    assert torch.equal(model(x), bare)
    assert frozen.keys() == model.backbone.state_dict().keys()
    assert all(torch.equal(v, frozen[k]) for k, v in model.backbone.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.backbone.modules())


# -- compiling, disk, settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters", [["vqt"], ["vqt", "lora"]])
def test_compiles_whole(adapters: list[str]) -> None:
    torch._dynamo.reset()
    model = make(adapter=[zoo.adapter(a, **({"dropout": 0.0} if a == "vqt" else {})) for a in adapters], depth=1)
    x = images(model)
    logits, expected = gradients(model, x)
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), logits)
    found = torch.autograd.grad(F.cross_entropy(compiled(x), TARGETS), list(named(model).values()))
    for gradient, wanted in zip(found, expected.values()):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)
    assert all(value is None for value in kept(model))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


def test_dropout_is_drawn_for_each_image_while_training() -> None:
    model = make(adapter=zoo.adapter("vqt", dropout=0.5)).train()
    x = images(model, 1).expand(2, -1, -1, -1)
    drawn = model.features(x)
    assert torch.allclose(drawn[0, :48], drawn[1, :48]) and not torch.allclose(drawn[0, 48:], drawn[1, 48:])
    model.eval()
    assert torch.allclose(*model.features(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = make()
    x = images(model)
    _, expected = gradients(model, x)
    with torch.autocast("cpu", dtype):
        logits, found = gradients(model, x)
    assert logits.dtype == dtype
    for key in expected:
        if "tokens" in key:
            assert F.cosine_similarity(found[key].flatten(), expected[key].flatten(), dim=0) > 0.98
    half = make(dtype=dtype)
    half(images(half).to(dtype)).float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in half.parameters_to_train().values())  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [{}, {"num_tokens": 3, "combine": "weighted", "targets": "blocks.1.**"}])
def test_saves_and_reloads(tmp_path: Path, config: dict[str, Any]) -> None:
    model = make(adapter=zoo.adapter("vqt", **config))
    x = images(model)
    with torch.no_grad():
        for parameter in named(model).values():
            parameter.add_(torch.randn_like(parameter))
    model.save_adapter(tmp_path / "saved")
    torch.manual_seed(0)
    again = zoo.load(adapter=tmp_path / "saved", pretrained=False)
    assert again.adapters["vqt"].config() == model.adapters["vqt"].config()
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_feature_selection(tmp_path: Path) -> None:
    model = make(adapter=zoo.adapter("vqt", lasso=0.5))
    vqt: Any = model.adapters["vqt"]
    x = images(model)
    penalty = vqt.extra_loss(model, model(x), TARGETS)
    assert penalty.item() == pytest.approx(0.5 * sum(c.norm().item() for c in model.head.weight.T), rel=1e-5)  # type: ignore
    model.set_active("vqt", train=())
    assert set(named(model)) == {"head/weight", "head/bias"}

    model.eval()
    every = model.features(x)
    with torch.no_grad():
        model.head.weight.mul_(torch.linspace(0.1, 1, 144).roll(50))  # type: ignore[union-attr,operator,arg-type]
    lengths = model.head.weight.norm(dim=0)  # type: ignore[union-attr,operator]
    chosen = vqt.select(model, 0.7)
    assert len(chosen) == 100 and lengths[chosen].min() >= lengths[[i for i in range(144) if i not in chosen]].max()
    assert tuple(model.head.weight.shape) == (5, 100)  # type: ignore[union-attr]
    assert torch.equal(model.features(x), every[:, chosen])
    narrower = vqt.select(model, 0.5)
    assert set(narrower) < set(chosen) and torch.equal(model.features(x), every[:, narrower])

    model.save_adapter(tmp_path / "saved")
    torch.manual_seed(0)
    again = zoo.load(adapter=tmp_path / "saved", pretrained=False)
    assert torch.equal(again.eval()(x), model(x))
    for wrong in (0.0, "a", None, True):
        with pytest.raises(zoo.ZooError, match="fraction"):
            vqt.select(model, wrong)


def test_learns() -> None:
    model = make(num_classes=2)
    x = images(model, 32, seed=3)
    y = torch.arange(32) % 2
    x[y == 1, 0] += 1.0
    before = [q.tokens.clone() for q in model.adapters["vqt"].queries()]  # type: ignore[operator]
    optimizer = torch.optim.Adam(model.parameters_to_train().values(), lr=0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(F.cross_entropy(model(x), y))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    after = [q.tokens for q in model.adapters["vqt"].queries()]  # type: ignore[operator]
    assert all((a - b).abs().max() > 0.01 for a, b in zip(after, before))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_tokens": 0}, "1 or more"),
        ({"combine": "max"}, "concat, mean, weighted"),
        ({"combine": "weighted"}, "2 tokens or more"),
        ({"dropout": 1.0}, "dropout < 1"),
        ({"lasso": -1.0}, "0 or more"),
        ({"targets": "blocks.9.attn.product"}, "matches no"),
    ],
)
def test_bad_settings(config: dict[str, Any], message: str) -> None:
    with pytest.raises(zoo.ZooError, match=message):
        make(adapter=zoo.adapter("vqt", **config))


def test_merging_is_refused() -> None:
    with pytest.raises(zoo.ZooError, match="tokens beside the backbone's own"):
        make().merge()
