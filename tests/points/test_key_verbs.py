"""Masked and gated keys, and prompts that come in at later blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train_parts import easy_data, tiny_model
from verb_parts import SEEN, Extra, Tokens, attached, of

import zoo
from zoo import registry
from zoo.errors import AttachError, ConfigError

FAMILIES = [f for f in registry.families() if registry.family(f).tiny]


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_keys_are_as_if_they_were_not_there(family: str) -> None:
    """A mask that hides one of three keys gives what the other two give; one that hides all gives the bare backbone."""
    model, batch = of(family)
    points = [p for p in model.points if p.kind == "attention"]
    if not points:
        return
    # the mask units of a Hiera are of a fixed size, and take no more keys
    name = next(p.name for p in points if family != "hiera" or p.window is None)

    def put(mask: Tensor | None, keep: Any = None) -> Callable[[Any], None]:
        def attach(points: Any) -> None:
            extra = Extra(points[name], mask)
            if keep is not None:
                extra.keys = nn.Parameter(extra.keys.detach()[:, :, keep])
                extra.values = nn.Parameter(extra.values.detach()[:, :, keep])
            points[name].extend(extra)

        return attach

    with torch.no_grad():
        bare = model(*batch)
        found = []
        for mask, keep in ((SEEN, None), (None, [0, 2]), (SEEN.float().log(), None), (SEEN & False, None)):
            model.add_adapter(attached(put(mask, keep)))
            found.append(model(*batch))
            torch.testing.assert_close(model(*batch), found[-1])  # kept for evaluation
            model.remove_adapter("trial")
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[2], found[1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[3], bare, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found[0], bare)


def test_a_mask_for_each_image_and_query() -> None:
    model = tiny_model(None)
    images = easy_data(4).tensors[0]
    mask = torch.rand(4, 1, 5, 3, generator=torch.Generator().manual_seed(2)) > 0.5
    model.add_adapter(
        attached(lambda points: points["blocks.1.attn.product"].extend(Extra(points["blocks.1.attn.product"], mask)))
    )
    with torch.no_grad():
        changed = model.eval()(images)
        extra: Any = model.adapters["trial"].module_at("blocks.1.attn.product")
        model.set_active()
        attention: Any = model.backbone.blocks[1].attn  # type: ignore[union-attr,index]

        def forward(x: Tensor, **_: Any) -> Tensor:
            q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
            k, v = (torch.cat([e.expand(4, -1, -1, -1), t], 2) for e, t in ((extra.keys, k), (extra.values, v)))
            scores = q @ k.transpose(-2, -1) * attention.scale
            scores[..., :3] = scores[..., :3].masked_fill(~mask, float("-inf"))
            return attention.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

        attention.forward = forward
        torch.testing.assert_close(changed, model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gated_second_softmax(family: str) -> None:
    """Nothing at a gate of 0; the change is linear in the gate of one attention's product."""
    model, batch = of(family)
    points = [p for p in model.points if p.kind == "attention"]
    if not points:
        return
    name = points[-1].name
    with torch.no_grad():
        before = model(*batch)
        model.add_adapter(attached(lambda points: points[name].gate(Extra(points[name], gate=True))))
        torch.testing.assert_close(model(*batch), before, rtol=1e-5, atol=1e-6)
        model.adapters["trial"].module_at(name).gate.fill_(0.7)
        assert not torch.allclose(model(*batch), before)
    assert model.train().probe(*batch) == []


def test_a_gated_second_softmax_is_llama_adapters() -> None:
    """On a ViT written down straightforwardly, alone and beside a prefix, for each sample, recomputed."""
    model = tiny_model(None)
    images, name = easy_data(4).tensors[0], "blocks.0.attn.product"
    model.add_adapter(attached(lambda points: points[name].gate(Extra(points[name], gate=True)), "gated"))
    model.add_adapter(zoo.adapter("prefix", num_tokens=2, targets="blocks.0.attn.product"))
    gated: Any = model.adapters["gated"].module_at(name)
    prefix: Any = model.adapters["prefix"].module_at(name)
    attention: Any = model.backbone.blocks[0].attn  # type: ignore[union-attr,index]
    with torch.no_grad():
        gated.gate.copy_(torch.randn(gated.gate.shape, generator=torch.Generator().manual_seed(4)))
    model.train()
    weights = torch.randn(4, 4, generator=torch.Generator().manual_seed(5))
    named = dict(model.named_parameters())
    learned = [p for k, p in named.items() if p.requires_grad]
    found = []
    for setting in ("default", "low", "min"):
        model.memory = setting
        found.append((model(images), torch.autograd.grad((model(images) * weights).sum(), learned)))
    model.memory = "default"
    rows = ["gated", None, "prefix", "gated"]
    with torch.no_grad():
        routed = model(images, adapters=rows)
        for i, row in enumerate(rows):
            model.set_active(*([row] if row else []))
            torch.testing.assert_close(routed[i], model(images)[i], rtol=1e-5, atol=1e-6)
    model.set_active("gated", "prefix")
    model.set_active()
    for p in learned:
        p.requires_grad_(True)

    def forward(x: Tensor, **_: Any) -> Tensor:
        q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        extra = prefix(1)
        keys, values = (torch.cat([e.expand(4, -1, -1, -1), t], 2) for e, t in zip(extra, (k, v)))
        y = (q @ keys.transpose(-2, -1) * attention.scale).softmax(-1) @ values
        second = (q @ gated.keys.transpose(-2, -1) * attention.scale).softmax(-1) @ gated.values
        return attention.proj((y + gated.gate * second).transpose(1, 2).flatten(2))

    attention.forward = forward
    expected = model(images)
    gradients = torch.autograd.grad((expected * weights).sum(), learned)
    for logits, got in found:
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        for a, b in zip(got, gradients):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["accumulated", "replaced", "both"])
def test_prompts_that_come_in_later(way: str) -> None:
    """A ViT of three blocks, written down: prompts behind the class token, dropped behind the last block."""
    model = zoo.load(
        "vit-micro", pretrained=False, num_classes=3, img_size=8, patch_size=4, embed_dim=24, depth=3, num_heads=2
    )

    def put(points: Any) -> None:
        first, second, third = points.select(kind="tokens")
        first.prompt(Tokens(24, 0), keep=True)
        second.prompt(Tokens(24, 1), keep=True, replace=way == "replaced")
        third.prompt(Tokens(24, 2), keep=True, replace=way != "accumulated")

    model.add_adapter(attached(put))
    images = torch.randn(3, 3, 8, 8)
    adapter: Any = model.adapters["trial"]
    p = [adapter.module_at(f"blocks.{i}.tokens").prompt for i in range(3)]
    found = {}
    for setting in ("default", "low", "min"):
        model.memory = setting
        found[setting] = (model(images), torch.autograd.grad(model(images).square().sum(), p))
    vit: Any = model.backbone
    model.set_active()
    for parameter in p:
        parameter.requires_grad_(True)
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    count = 0
    for i, block in enumerate(vit.blocks):
        if way == "replaced" and i:
            x = torch.cat([x[:, :1], p[i].expand(3, -1, -1), x[:, 3:]], dim=1)
        elif way == "both" and i == 2:  # the first block's stand behind the second's
            x = torch.cat([x[:, :3], p[i].expand(3, -1, -1), x[:, 5:]], dim=1)
        else:
            x = torch.cat([x[:, :1], p[i].expand(3, -1, -1), x[:, 1:]], dim=1)
            count += 2
        x = block(x)
    x = vit.norm(torch.cat([x[:, :1], x[:, 1 + count :]], dim=1))
    expected = model.head(vit.forward_head(x, pre_logits=True))
    gradients = torch.autograd.grad(expected.square().sum(), p)
    for logits, got in found.values():
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        for a, b in zip(got, gradients):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model.set_active("trial")
        bare = model(images, adapters=[None, "trial", None])
        torch.testing.assert_close(bare[1], model(images)[1])
        with model.disable():
            torch.testing.assert_close(bare[0], model(images)[0])


def test_prompts_that_cannot_come_in_later_are_refused() -> None:
    model = tiny_model(None)
    later, first = "blocks.1.tokens", "blocks.0.tokens"
    for put, reason in (
        (lambda points: points[later].prompt(Tokens(24, 0), keep=True, replace=True), "nothing to replace"),
        (lambda points: points[first].prompt(Tokens(24, 0), keep=True, replace=True), "stand behind the first"),
        (lambda points: points[later].prompt(Tokens(24, 0), replace=True), "are kept"),
        (lambda points: points[first].words(Tokens(24, 0)), "no words of a text"),
    ):
        with pytest.raises(AttachError, match=reason):
            model.add_adapter(attached(put))
        assert not model.adapters

    def unequal(points: Any) -> None:
        points[first].prompt(Tokens(24, 0), keep=True)
        points[later].prompt(Tokens(24, 1, count=3), keep=True, replace=True)

    model.add_adapter(attached(unequal))
    with pytest.raises(ConfigError, match="3 prompts cannot take the place of 2"):
        model(easy_data(4).tensors[0])
    swin = of("swin")[0]
    name = [p.name for p in swin.points if p.kind == "tokens"][1]
    with pytest.raises(AttachError, match="only start at the first block"):
        swin.add_adapter(attached(lambda points: points[name].prompt(Tokens(24, 0), keep=True)))
