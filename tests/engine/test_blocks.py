"""Blocks run by hand: equal to the model's own pass to the bit, in slices, in halves, and as copies without our hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from zoo.errors import AttachError, CombinationError, ConfigError
from zoo.table import tiny_model

TINY = {"embed_dim": 24, "depth": 4, "num_heads": 2}
PLAIN = {"vit": None, "ast": None, "wav2vec2": None, "swin": "stages.1", "clip": "image"}
families = pytest.mark.parametrize("family", list(PLAIN))


def build(*methods: Any, **options: Any) -> zoo.Model:
    torch.manual_seed(0)
    model = zoo.load("vit-micro", list(methods) or None, num_classes=3, pretrained=False, **TINY, **options)
    return shaken(model).eval()


def shaken(model: zoo.Model) -> zoo.Model:
    with torch.no_grad():
        for p in model.adapters.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def gradients(model: zoo.Model, features: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    features.square().sum().backward()
    return {k: p.grad.clone() for k, p in model.parameters_to_train().items() if p.grad is not None}


METHODS = {
    "lora": zoo.adapter("lora", targets="all-linear"),
    "adapter": "adapter",
    "bitfit": "bitfit",
    "vpt": zoo.adapter("vpt", num_tokens=3),
    "shallow": zoo.adapter("vpt", num_tokens=3, deep=False),
    "prefix": "prefix",
    "compacter": "compacter",
}


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("memory", ["default", "min", "off"])
def test_slices_are_the_whole(method: str, memory: str) -> None:
    model = build(METHODS[method], memory=memory)
    expected = model.features(images())
    wanted = gradients(model, expected)
    run = zoo.blocks(model)
    here = run.start(images())
    assert here.at == 0 and len(run) == 4
    for count in (1, 2, None):
        here = run.advance(here, count)
    found = run.finish(here)
    assert torch.equal(found, expected)
    got = gradients(model, found)
    assert wanted.keys() == got.keys() and wanted
    assert all(torch.allclose(got[k], wanted[k], rtol=1e-5, atol=1e-6) for k in wanted)
    assert torch.equal(model.features(images()), expected)  # the model is as it was


@families
def test_families(family: str) -> None:
    model, batch = tiny_model(family)
    model.add_adapter("lora")
    shaken(model).eval()
    inputs = batch[:1] if family == "clip" else batch
    expected = model.features(*inputs)
    run = zoo.blocks(model, PLAIN[family])
    here = run.start(*inputs)
    halves = here.tokens
    for i in range(len(run)):
        whole = run.block(i, here)(halves)
        halves = run.half(i, "mlp", here)(run.half(i, "attn", here)(halves))
        torch.testing.assert_close(halves, whole, rtol=1e-5, atol=1e-6)
        assert not torch.equal(run.half(i, "attn", here)(whole), whole)
    here = run.advance(here)
    torch.testing.assert_close(here.tokens, halves, rtol=1e-5, atol=1e-6)
    assert torch.equal(run.finish(here), expected)


def test_the_text_tower_has_a_mask() -> None:
    """Further arguments of the blocks' call are captured: here the causal mask."""
    model, (pictures, texts) = tiny_model("clip")
    model.add_adapter("lora")
    shaken(model).eval()
    expected = model.features(pictures, texts)
    run = zoo.blocks(model, "text")
    here = run.start(pictures, texts)
    masks = [v for v in (*here.args, *here.kwargs.values()) if isinstance(v, Tensor)]
    assert masks and bool((masks[0] == float("-inf")).any())
    assert torch.equal(run.finish(run.advance(here)), expected)


@pytest.mark.parametrize("masked", ["attn_mask", "is_causal"])
def test_masks_of_the_call(masked: str) -> None:
    model = build("lora")
    mask = torch.ones(65, 65, dtype=torch.bool).tril()
    module: Any = model.backbone
    options = {masked: mask if masked == "attn_mask" else True}
    expected = module.forward_features(images(), **options)
    run, tokens = zoo.blocks(model), module._pos_embed(module.patch_embed(images()))
    halves = tokens
    for i in range(len(run)):
        halves = model.family.half(module.blocks[i], "attn", halves, **options)
        halves = model.family.half(module.blocks[i], "mlp", halves, **options)
    torch.testing.assert_close(module.norm(halves), expected)


def test_a_cursor_is_a_value() -> None:
    model = build("lora")
    run = zoo.blocks(model)
    two = run.advance(run.start(images()), 2)
    with torch.no_grad():
        expected = run.finish(run.advance(two))
    changed = run.advance(two, 1)
    with model.disable():
        bare = run.finish(run.advance(changed))  # the last block without the adapter
    assert torch.equal(run.finish(run.advance(two)), expected)
    assert not torch.equal(bare, expected) and two.at == 2
    with torch.no_grad():
        left = zoo.blocks(model).half(0, "attn")(two.tokens)
    assert left.shape == two.tokens.shape and not left.requires_grad


@pytest.mark.parametrize("method", ["lora", "bitfit", "norm", "full", "ssf", "prefix", "vpt", "meft"])
def test_a_clone_is_the_librarys_block(method: str) -> None:
    bare, model = build(), build(method)
    clone = zoo.blocks(model).clone(2)
    tokens = torch.randn(2, 65, 24)
    assert type(clone) is type(bare.backbone.blocks[2])  # type: ignore[index]
    assert torch.equal(clone(tokens), bare.backbone.blocks[2](tokens))  # type: ignore[index,operator]
    for part in clone.modules():
        assert not part._forward_hooks and not part._forward_pre_hooks and "forward" not in part.__dict__
        assert not part._forward_hooks_with_kwargs and not part._forward_pre_hooks_with_kwargs
    theirs = bare.backbone.blocks[2].state_dict()  # type: ignore[index,union-attr]
    assert all(torch.equal(v, theirs[k]) for k, v in clone.state_dict().items())
    assert not any(p.requires_grad for p in clone.parameters())
    assert model.probe(images()) == []


def test_a_clone_keeps_the_users_own_hooks() -> None:
    model, seen = build("lora"), []
    model.backbone.blocks[1].register_forward_hook(  # type: ignore[index,union-attr]
        lambda module, args, kwargs, y: seen.append(1), with_kwargs=True
    )
    zoo.blocks(model).clone(1)(torch.randn(2, 65, 24))
    assert seen == [1]


def test_samples_with_adapters_of_their_own_and_second_derivatives() -> None:
    model = build("lora")
    run = zoo.blocks(model)
    with zoo.second_order(model):
        features = run.finish(run.advance(run.start(images())))
    weights = [p for k, p in model.parameters_to_train().items() if "lora" in k]
    first = torch.autograd.grad(features.square().sum(), weights, create_graph=True)
    assert all(g.requires_grad for g in first)
    assert model(images(), adapters=["lora", None]).shape == (2, 3)  # and the model's own pass is what it was


@pytest.mark.parametrize("part", ["block", "half"])
def test_compiled(part: str) -> None:
    run = zoo.blocks(build("lora"))
    call = run.block(1) if part == "block" else run.half(1, "attn")
    torch._dynamo.reset()
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    tokens = torch.randn(2, 65, 24)
    torch.testing.assert_close(compiled(tokens), call(tokens), rtol=1e-5, atol=1e-6)


def test_what_is_refused() -> None:
    model = build("vqt")
    with pytest.raises(CombinationError, match="'vqt' keeps something from block to block"):
        zoo.blocks(model).start(images())
    with pytest.raises(CombinationError, match="'meft' keeps something"):
        zoo.blocks(build("meft")).start(images())
    for method in (zoo.adapter("ladder", reduction=4), zoo.adapter("hyperformer", tasks=("a",))):
        with pytest.raises(CombinationError, match=f"'{method.method}' reads values that are there only within"):
            zoo.blocks(build(method)).start(images())
    run = zoo.blocks(build("lora"))
    with pytest.raises(ConfigError, match=r"advance\(5\) from block 0: there are 4"):
        run.advance(run.start(images()), 5)
    with pytest.raises(ConfigError, match="stands in front of block 1 of 4"):
        run.finish(run.advance(run.start(images()), 1))
    with pytest.raises(ConfigError, match="'attn' and 'mlp'"):
        run.half(0, "cross")
    with pytest.raises(ConfigError, match="there is no block 4"):
        run.block(4)
    swin, _ = tiny_model("swin")
    with pytest.raises(ConfigError, match=r"'stages.0' \(2 blocks\), 'stages.1' \(2 blocks\)"):
        zoo.blocks(swin)
    clip, (pictures, _) = tiny_model("clip")
    with pytest.raises(ConfigError, match="did not reach 'text"):
        zoo.blocks(clip, "text").start(pictures)
    assert clip.features(pictures).shape[0] == 2


@pytest.mark.parametrize("family", ["groupmamba", "vl-t5", "vl-bart", "dit", "pixart", "flux", "sd3", "cogvideox"])
def test_families_that_are_not_a_plain_sequence(family: str) -> None:
    model, _ = tiny_model(family)
    with pytest.raises(AttachError, match=f"family '{family}' are not a plain sequence"):
        zoo.blocks(model)
