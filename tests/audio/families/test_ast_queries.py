"""VQT on AST: against queries in the sequence, written out, with selection of features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from audio.families.parts.positions import BODY
from zoo.disk import attach, read
from zoo.engine import queries as streams

pytest.importorskip("transformers", reason="the extra 'audio' is not installed")

SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "max_length": 40,
    "num_mel_bins": 32,
}


def make(adapter: Any = "vqt", classes: int = 4) -> Any:
    torch.manual_seed(0)
    model = zoo.load("ast-micro", adapter, pretrained=False, num_classes=classes, **SMALL)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def sounds(count: int = 3) -> Tensor:
    return torch.randn(count, 40, 32, generator=torch.Generator().manual_seed(1))


def by_hand(model: Any, head: Any, x: Tensor) -> Tensor:
    """The library's modules: queries stand in front of the tokens, which never see them."""
    body, tokens = model.backbone.get_submodule(BODY), [q.tokens for q in model.adapters["vqt"].queries()]
    hidden, answers = body.embeddings(x), []
    for layer, queries in zip(body.layers, tokens):
        count, attention = len(queries), layer.attention
        both = torch.cat([queries.expand(len(x), -1, -1), hidden], dim=1)
        normed = layer.layernorm_before(both)
        q, k, v = (
            named(normed).unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)
            for named in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        k, v = k[:, :, count:], v[:, :, count:]
        asked = (q @ k.transpose(-1, -2) * attention.head_dim**-0.5).softmax(-1) @ v
        both = both + attention.o_proj(asked.transpose(1, 2).flatten(2))
        both = both + layer.mlp(layer.layernorm_after(both))
        answers.append(both[:, :count])
        hidden = both[:, count:]
    pooled = body.layernorm(hidden)[:, :2].mean(1)
    unit = [t.flatten(1) / t.flatten(1).norm(dim=1, keepdim=True) for t in (pooled, *answers)]
    return head(torch.cat(unit, dim=1))


@pytest.mark.parametrize("few", [0, 4])
@pytest.mark.parametrize("tokens", [1, 3])
def test_equals_the_form_with_queries_in_the_sequence(monkeypatch: pytest.MonkeyPatch, few: int, tokens: int) -> None:
    monkeypatch.setattr(streams, "FEW", few)
    model = make(zoo.adapter("vqt", num_tokens=tokens, dropout=0.0))
    x, targets = sounds(), torch.tensor([1, 3, 0])
    assert model.probe(x) == []
    logits = model(x)
    parameters = dict(model.parameters_to_train())
    found = torch.autograd.grad(F.cross_entropy(logits, targets), list(parameters.values()))
    head = model.head
    with model._bare():
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        hand = by_hand(model, head, x)
        expected = torch.autograd.grad(F.cross_entropy(hand, targets), list(parameters.values()))
    torch.testing.assert_close(logits, hand, rtol=1e-5, atol=1e-5)
    for key, mine, wanted in zip(parameters, found, expected):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item(), msg=key)
    assert logits.shape == (3, 4) and model.head.in_features == 48 * (1 + 2 * tokens)


def test_beside_others_and_per_sample() -> None:
    """LoRA on q is done to the queries, prompts and prefixes are read; a batch of several adapters serves each its own."""
    model = make(zoo.adapter("vqt", dropout=0.0))
    x = sounds()
    alone = model(x)
    for other in ("lora", "prefix", "vpt"):
        model.add_adapter(zoo.adapter(other, **({"num_tokens": 2} if other != "lora" else {"targets": "q,k"})))
        with torch.no_grad():
            for parameter in model.adapters[other].parameters():
                parameter.add_(torch.randn_like(parameter))
        assert model.probe(x) == []
        together = model(x)
        assert not torch.allclose(together, alone, atol=1e-3)
        for i in range(3):
            torch.testing.assert_close(model(x[i : i + 1]), together[i : i + 1], rtol=1e-4, atol=1e-5)
        model.remove_adapter(other)
    torch.testing.assert_close(model(x), alone)


def test_the_backbones_own_tokens_have_no_graph() -> None:
    model = make().train()
    seen: list[Tensor] = []
    layer = model.backbone.get_submodule(BODY).layers[1]
    handle = layer.register_forward_hook(lambda m, a, y: seen.append(y[0] if isinstance(y, tuple) else y))
    model(sounds()).sum().backward()
    handle.remove()
    assert not seen[0].requires_grad


def test_selection_of_features(tmp_path: Path) -> None:
    """Train, weigh columns by a lasso with the queries at rest, keep the half, train the head on them; saved as it is."""
    model = make(zoo.adapter("vqt", dropout=0.0))
    vqt = model.adapters["vqt"]
    x = sounds(16)
    y = torch.arange(16) % 4
    x[:, :, :8] += 3 * y[:, None, None].float()
    rows = torch.utils.data.TensorDataset(x, y)
    options: dict[str, Any] = {"epochs": 6, "batch_size": 8, "lr": 2e-2, "progress": False}
    zoo.fit(model, rows, **options)
    queries = [q.tokens.clone() for q in vqt.queries()]
    model.set_active("vqt", train=())
    vqt.lasso = 0.05
    model.reset_head(4)
    zoo.fit(model, rows, **options)
    assert all(torch.equal(a, b.tokens) for a, b in zip(queries, vqt.queries()))
    lengths = model.head.weight.norm(dim=0)
    kept = vqt.select(model, 0.5)
    assert len(kept) == 72 and lengths[kept].min() >= lengths[[i for i in range(144) if i not in kept]].max()
    vqt.lasso = 0.0
    zoo.fit(model, rows, **{**options, "epochs": 40, "lr": 0.1})
    assert zoo.evaluate(model, rows, progress=False)["accuracy"] >= 0.75
    model.save_adapter(tmp_path / "saved")
    again = make(None, classes=0)
    attach(again, read(tmp_path / "saved"))
    torch.testing.assert_close(again.eval()(x), model.eval()(x), rtol=1e-5, atol=1e-5)
    assert again.adapters["vqt"].plan == {"features": kept}
