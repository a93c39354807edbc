"""MaPLe: a form written down straightforwardly, beside prompts of another method, and its settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo

pytest.importorskip("open_clip")
from clip_models import TEXT, make

from zoo.errors import AttachError, ConfigError

NAMES = ["cat", "dog", "pick-up_truck"]


def build(*others: Any, **settings: Any) -> zoo.Model:
    adapter = zoo.adapter("maple", **{"num_tokens": 2, "init": "", **settings})
    return make("plain", adapter, *others, classes=NAMES, tower="both", text_cfg={**TEXT, "context_length": 24})


def pictures(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(5), dtype=torch.double)


def straightforward(model: zoo.Model, images: Tensor) -> Tensor:
    """Two blocks in each tower; the words begin at position 3, since two vectors stand in front."""
    own, adapter = model.backbone, model.adapters["maple"]
    texts: Any = [adapter.module_at(f"text.blocks.{i}.tokens") for i in range(2)]
    maps: Any = [adapter.module_at(f"image.blocks.{i}.tokens").project for i in range(2)]
    p = [texts[0].context, texts[1].prompt]
    ids = model.family.tokenize([f"x x {name.replace('_', ' ')}." for name in NAMES])  # type: ignore[attr-defined]
    y = own.token_embedding(ids)
    y = torch.cat([y[:, :1], p[0].expand(3, -1, -1), y[:, 3:]], dim=1) + own.positional_embedding
    x = own.visual._embeds(images)
    x = torch.cat([x, maps[0](p[0]).expand(len(x), -1, -1)], dim=1)
    for i in range(2):
        if i:
            y = torch.cat([y[:, :1], p[i].expand(3, -1, -1), y[:, 3:]], dim=1)
            x = torch.cat([x[:, :-2], maps[i](p[i]).expand(len(x), -1, -1)], dim=1)
        y = own.transformer.resblocks[i](y, attn_mask=own.attn_mask)
        x = own.visual.transformer.resblocks[i](x)
    t = own.ln_final(y)[torch.arange(3), ids.argmax(1)] @ own.text_projection
    image = own.visual.ln_post(x[:, 0]) @ own.visual.proj
    return own.logit_scale.exp() * F.normalize(image, dim=-1) @ F.normalize(t, dim=-1).T


def test_straightforward_form() -> None:
    model = build().train()
    logits = model(pictures())
    parameters = list(model.adapters["maple"].parameters())
    weights = torch.randn(3, 3, generator=torch.Generator().manual_seed(6), dtype=torch.double)
    found = torch.autograd.grad((logits * weights).sum(), parameters)
    model.set_active()
    model.adapters["maple"].requires_grad_(True)
    expected = straightforward(model, pictures())
    torch.testing.assert_close(logits, expected)
    for a, b in zip(found, torch.autograd.grad((expected * weights).sum(), parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_prompts_of_another_method_in_front_of_the_words() -> None:
    """They move the words, and what is replaced in later blocks moves with them: zeroed, MaPLe's own still act there."""
    model = build(zoo.adapter("vpt", deep=False, num_tokens=3))
    deep: Any = model.adapters["maple"].module_at("text.blocks.1.tokens")
    found = caught(model, lambda: model(pictures()))
    before = deep.prompt.expand(3, -1, -1)
    torch.testing.assert_close(found[:, 4:6], before)  # [start | 3 prompts | 2 vectors | words]
    assert not torch.equal(found[:, 1:3], before)


def caught(model: zoo.Model, run: Any) -> Tensor:
    """What enters the second block of the text tower."""
    seen: list[Tensor] = []
    block: Any = model.backbone.transformer.resblocks[1].ln_1  # type: ignore[union-attr,index]
    handle = block.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        run()
    handle.remove()
    return seen[0]


def test_texts_of_ones_own_are_left_alone() -> None:
    model = build()
    with torch.no_grad():
        found = model.features(texts=["a cat"])
        with model.disable():
            assert torch.equal(found, model.features(texts=["a cat"]))


def test_settings() -> None:
    assert len(list(build(depth=9).adapters["maple"].parameters())) == 2 + 2 * 2  # two blocks are there
    shallow = build(depth=1)
    assert set(shallow.parameters_to_train()) == {
        "maple/text.blocks.0.tokens.context",
        "maple/image.blocks.0.tokens.project.weight",
        "maple/image.blocks.0.tokens.project.bias",
    }
    with pytest.raises(ConfigError, match="has 2 words, and num_tokens=3"):
        zoo.adapter("maple", num_tokens=3, init="a photo")
    with pytest.raises(ConfigError, match="depth"):
        zoo.adapter("maple", depth=0)
    with pytest.raises(AttachError, match="text tower and an image tower"):
        make("plain", "maple", tower="text")
