"""VQT on the image tower of CLIP: against queries in the sequence of the library's own blocks, with selection of features."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo

pytest.importorskip("open_clip")
from clip_models import IMAGE, TEXT, batch, library, make

from zoo.disk import attach, read
from zoo.engine import queries as streams
from zoo.errors import AttachError, ConfigError

KINDS = ("plain", "layer scale", "extra norms", "average", "timm", "timm pooling", "timm eva02", "timm pe")


def vqt(**settings: Any) -> Any:
    return zoo.adapter("vqt", dropout=0.0, **settings)


def masked(x: Tensor, count: int) -> Tensor:
    """Nobody asks the first `count` of the tokens: an additive mask (N, N)."""
    mask = x.new_zeros(x.shape[1], x.shape[1])
    mask[:, :count] = float("-inf")
    return mask


def by_hand(model: Any, x: Tensor) -> Tensor:
    """The library's own blocks on [queries | tokens], under a mask; then unit lengths, and the head."""
    tokens = [q.tokens for q in model.adapters["vqt"].queries()]
    plain = copy.deepcopy(model)
    plain.remove_adapter("vqt")
    plain.reset_head(0)
    visual = library(plain).visual
    trunk, answers, rope = getattr(visual, "trunk", None), [], None
    if trunk is None:
        hidden, blocks = visual._embeds(x), visual.transformer.resblocks
    else:
        placed, blocks = trunk._pos_embed(trunk.patch_embed(x)), trunk.blocks
        placed, rope = placed if isinstance(placed, tuple) else (placed, None)
        hidden = placed if getattr(trunk, "norm_pre", None) is None else trunk.norm_pre(placed)
    for block, queries in zip(blocks, tokens, strict=True):
        count = len(queries)
        both = torch.cat([queries.expand(len(x), -1, -1), hidden], dim=1)
        options = {"attn_mask": masked(both, count)}
        if rope is not None:
            block.attn.num_prefix_tokens += count  # queries have no place
            options["rope"] = rope
        both = block(both, **options)
        answers.append(both[:, :count])
        hidden = both[:, count:]
    if trunk is None:
        pooled = visual._pool(hidden)[0] @ visual.proj
    else:
        pooled = visual.head(trunk.forward_head(trunk.norm(hidden)))
    unit = [t.flatten(1) / t.flatten(1).norm(dim=1, keepdim=True) for t in (pooled, *answers)]
    return model.head(torch.cat(unit, dim=1))


@pytest.mark.parametrize("few", [0, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_form_with_queries_in_the_sequence(monkeypatch: pytest.MonkeyPatch, kind: str, few: int) -> None:
    monkeypatch.setattr(streams, "FEW", few)
    count = 1 if few else 3
    model = make(kind, vqt(num_tokens=count), num_classes=4)
    x, targets = batch(model)[0], torch.tensor([1, 3, 0])
    assert model.probe(x) == []
    logits = model(x)
    parameters = model.parameters_to_train()
    found = torch.autograd.grad(F.cross_entropy(logits, targets), list(parameters.values()))
    hand = by_hand(model, x)
    expected = torch.autograd.grad(F.cross_entropy(hand, targets), list(parameters.values()))
    torch.testing.assert_close(logits, hand, rtol=1e-7, atol=1e-9)
    for key, mine, wanted in zip(parameters, found, expected):
        torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-9 * wanted.abs().max().item(), msg=key)
    blocks = [p for p in model.points if p.kind == "block"]
    assert {p.tower for p in blocks} == {"image"} and len(parameters) == len(blocks) + 2
    assert model.head.in_features == 24 + count * sum(p.dim_out for p in blocks)  # the common space, and every block's


def test_features_at_full_size() -> None:
    """ViT-B/16: T d for each block, and a head on the 512 of the common space and all answers."""
    for tokens in (1, 10):
        model = zoo.load("clip-vit-b16", zoo.adapter("vqt", num_tokens=tokens), num_classes=100, device="meta")
        assert model.num_parameters(trainable=True, head=False) == 12 * 768 * tokens
        assert model.head.in_features == 512 + 12 * 768 * tokens


@pytest.mark.parametrize("kind", ["plain", "extra norms", "timm"])
def test_beside_others_and_per_sample(kind: str) -> None:
    """LoRA on q is done to the queries, prompts and prefixes are read; a batch of several adapters serves each its own."""
    model = make(kind, vqt(), num_classes=4)
    x = batch(model)[0]
    alone = model(x)
    for other in ("lora", "prefix", "vpt"):
        settings = {"targets": "q,k"} if other == "lora" else {"num_tokens": 2}
        model.add_adapter(zoo.adapter(other, **settings))
        with torch.no_grad():
            for parameter in model.adapters[other].parameters():
                parameter.add_(torch.randn_like(parameter))
        assert model.probe(x) == []
        together = model(x)
        assert not torch.allclose(together, alone, atol=1e-3)
        for i in range(3):
            torch.testing.assert_close(model(x[i : i + 1]), together[i : i + 1])
        model.remove_adapter(other)
    torch.testing.assert_close(model(x), alone)
    model.set_active()
    model.add_adapter(vqt(), name="second")
    with torch.no_grad():
        for queries in model.adapters["second"].queries():
            queries.tokens.add_(1.0)
    second = model(x)
    routed = model(x, adapters=["vqt", "second", "vqt"])
    torch.testing.assert_close(routed, torch.stack([alone[0], second[1], alone[2]]))
    assert all(q.caught is None and q.answers is None for q in model.adapters["vqt"].queries())


def test_the_text_tower_is_refused_and_texts_have_no_such_features() -> None:
    """Scores and texts were features once, of which unit lengths would have been taken."""
    with pytest.raises(AttachError, match=r"text\.blocks\.0.*tower='image'"):
        make("plain", vqt())
    for model in (make("plain", vqt(), tower="image"), make("plain", vqt(targets="image.**"))):
        images, ids = batch(model)
        assert {key.split("/")[1].split(".")[0] for key in model.parameters_to_train()} == {"image"}
        assert model(images).shape == model.features(images).shape == (3, 24 + 2 * 48)
        with pytest.raises(ConfigError, match=r"texts have none.*reset_head"):
            model(images, ids)
        with pytest.raises(ConfigError, match=r"texts have none.*reset_head"):
            model.features(texts=ids)
        model.set_active()
        assert model(images, ids).shape == (3, 3) and model.features(texts=ids).shape == (3, 24)


def test_selection_of_features(tmp_path: Path) -> None:
    """Train, weigh columns by a lasso with the queries at rest, keep the half, train the head on them; saved as it is."""
    options: dict[str, Any] = {"vision_cfg": IMAGE, "text_cfg": TEXT, "embed_dim": 24, "pretrained": False}
    torch.manual_seed(0)
    model = zoo.load("clip-micro", vqt(), num_classes=4, **options)
    adapter: Any = model.adapters["vqt"]
    y = torch.arange(16) % 4
    x = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    x[..., :8] += 3 * y[:, None, None, None].float()
    rows = torch.utils.data.TensorDataset(x, y)
    settings: dict[str, Any] = {"epochs": 6, "batch_size": 8, "lr": 2e-2, "progress": False}
    zoo.fit(model, rows, **settings)
    queries = [q.tokens.clone() for q in adapter.queries()]
    model.set_active("vqt", train=())
    adapter.lasso = 0.05
    model.reset_head(4)
    zoo.fit(model, rows, **settings)
    assert all(torch.equal(a, b.tokens) for a, b in zip(queries, adapter.queries()))
    lengths = model.head.weight.norm(dim=0)
    kept = adapter.select(model, 0.5)
    rest = [i for i in range(24 + 2 * 48) if i not in kept]
    assert len(kept) == 60 and lengths[kept].min() >= lengths[rest].max()
    adapter.lasso = 0.0
    zoo.fit(model, rows, **{**settings, "epochs": 40, "lr": 0.1})
    assert zoo.evaluate(model, rows, progress=False)["accuracy"] >= 0.75
    model.save_adapter(tmp_path / "saved")
    torch.manual_seed(0)
    again = zoo.load("clip-micro", tower="image", **options)
    attach(again, read(tmp_path / "saved"))
    torch.testing.assert_close(again.eval()(x), model.eval()(x), rtol=1e-5, atol=1e-5)
    assert again.adapters["vqt"].plan == {"features": kept}


def test_the_towers_own_tokens_have_no_graph() -> None:
    model = make("plain", vqt(), num_classes=4).train()
    seen: list[Tensor] = []
    handle = model.backbone.visual.transformer.register_forward_hook(lambda m, a, y: seen.append(y))  # type: ignore[union-attr]
    model(batch(model)[0]).sum().backward()
    handle.remove()
    assert len(seen) == 1 and not seen[0].requires_grad
