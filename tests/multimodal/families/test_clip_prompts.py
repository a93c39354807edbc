"""CLIP: prompts and prefixes in both towers against straightforward forms; memory, per-sample adapters, the compiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo

pytest.importorskip("open_clip")
from clip_models import IMAGE, TEXT, TIMM, batch, library, make, straightforward

from multimodal.families.clip.attention import widen
from zoo.errors import ConfigError

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
    placed = trunk._pos_embed(trunk.patch_embed(images))
    further = (
        {"rope": placed[1]} if isinstance(placed, tuple) else {}
    )  # timm counts what is not turned in each attention
    x, count = trunk.norm_pre(placed[0] if further else placed), 0
    for i, block in enumerate(trunk.blocks):
        block.attn.num_prefix_tokens = prefix + 3
        if deep or i == 0:
            x = torch.cat([x[:, :prefix], prompts[i].expand(3, -1, -1), x[:, prefix + count :]], dim=1)
            count = 3
        x = block(x, **further)
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
