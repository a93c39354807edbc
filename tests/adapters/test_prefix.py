"""Prefix tuning: against the attention written out, its MLP, and what is saved of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vpt_models import BOTH, images, make

import zoo
from zoo.disk import attach, read
from zoo.errors import ConfigError, MergeError, SelectionError


def by_hand(attention: Any, x: Tensor, prefix: Any, bias: Tensor | float) -> Tensor:
    """(R, N, d) -> (R, N, d): the share of attention that goes to the prefix gates a branch beside the attention."""
    rows, tokens, _ = x.shape
    count = attention.num_heads
    q, k, v = attention.qkv(x).reshape(rows, tokens, 3, count, -1).permute(2, 0, 3, 1, 4)
    p_k, p_v = (t.reshape(len(t), count, -1).transpose(0, 1) for t in (prefix.keys, prefix.values))
    own = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + bias).exp()
    extra = (q @ p_k.transpose(-2, -1) / math.sqrt(q.shape[-1])).exp()
    share = extra.sum(-1, keepdim=True) / (extra.sum(-1, keepdim=True) + own.sum(-1, keepdim=True))
    out = (1 - share) * (own / own.sum(-1, keepdim=True)) @ v + share * (extra / extra.sum(-1, keepdim=True)) @ p_v
    return attention.proj(out.transpose(1, 2).reshape(rows, tokens, -1))


@BOTH
def test_is_a_gated_branch(kind: str) -> None:
    model = make(kind, zoo.adapter("prefix", num_tokens=4)).eval()
    for point in model.points.select(kind="attention"):
        attention: Any = point.module
        prefix = model.adapters["prefix"].module_at(point)  # type: ignore[operator]
        if kind == "vit":
            x = torch.randn(2, 7, 48, dtype=torch.double)
            expected, found = by_hand(attention, x, prefix, 0.0), attention(x)
        else:
            mask = torch.zeros(3, attention.window_area, attention.window_area, dtype=torch.double)
            mask[1, :, :5] = -100
            x = torch.randn(6, attention.window_area, attention.qkv.in_features, dtype=torch.double)
            bias = attention._get_rel_pos_bias() + mask.repeat(2, 1, 1)[:, None]
            attention.forward.__self__.images = 2
            expected, found = by_hand(attention, x, prefix, bias), attention(x, mask=mask)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mlp", [None, 6])
@BOTH
def test_trains_and_is_removed(kind: str, mlp: int | None) -> None:
    model = make(kind)
    x = images(kind)
    before = model(x)
    model.add_adapter(zoo.adapter("prefix", num_tokens=4, mlp=mlp))
    assert model.probe(x) == []
    with pytest.raises(MergeError, match="prefix"):
        model.merge()
    assert not torch.equal(model(x), before)
    model.remove_adapter("prefix")
    assert torch.equal(model(x), before)


def test_counts_and_start() -> None:
    model = zoo.load("vit-micro", pretrained=False, num_classes=0)  # 6 blocks, width 192
    model.add_adapter(zoo.adapter("prefix", num_tokens=7))
    assert model.num_parameters(trainable=True) == 2 * 7 * 192 * 6
    bound = math.sqrt(6 / (8 * 192))
    assert all(0.95 * bound < p.abs().max() <= bound for p in model.adapters["prefix"].parameters())
    model.set_active()
    model.add_adapter(zoo.adapter("prefix", num_tokens=7, mlp=20), "made")
    assert model.num_parameters(trainable=True) == 7 * 192 + 20 * 193 + 6 * 2 * 192 * 21
    model.set_active()
    model.add_adapter(zoo.adapter("prefix", targets="blocks.{0..1}.attn.product"), "early")
    assert model.num_parameters(trainable=True) == 2 * 10 * 192 * 2


@BOTH
def test_what_the_mlp_makes_is_what_is_saved(kind: str, tmp_path: Path) -> None:
    model = make(kind, zoo.adapter("prefix", num_tokens=4, mlp=6)).eval()
    state = dict(model.adapters["prefix"].state_dict())
    model.save_adapter(tmp_path / "saved")
    saved = read(tmp_path / "saved")
    assert saved.adapters[0].config["mlp"] is None
    assert {k.rsplit(".", 1)[1] for k in saved.adapter_tensors("prefix")} == {"keys", "values"}
    twin = make(kind)
    twin.backbone.load_state_dict(model.backbone.state_dict())
    twin.fingerprint = model.fingerprint
    attach(twin, saved)
    blocks = len(model.family.blocks())
    assert len(list(twin.adapters["prefix"].parameters())) == 2 * blocks
    x = images(kind)
    torch.testing.assert_close(twin.eval()(x), model(x), rtol=1e-12, atol=1e-12)
    # the model that was saved trains on in the form that it had
    assert all(torch.equal(v, state[k]) for k, v in model.adapters["prefix"].state_dict().items())


@BOTH
def test_in_evaluation_the_mlp_runs_once(kind: str) -> None:
    model = make(kind, zoo.adapter("prefix", num_tokens=4, mlp=6)).eval()
    hidden: Any = model.adapters["prefix"].hidden
    calls = []
    hidden.register_forward_hook(lambda *_: calls.append(1))
    x = images(kind)
    with torch.no_grad():
        model(x)
        first = len(calls)
        model(x)
        assert len(calls) == first == len(model.family.blocks())
        hidden.embedding.mul_(2)  # shared by all blocks
        changed = model(x)
        assert len(calls) == 2 * first
    torch.testing.assert_close(changed, model(x), rtol=1e-12, atol=1e-12)


@BOTH
def test_keeps_little(kind: str) -> None:
    """The joined keys and values are made again in backward: kept are only the prefixes, which exist anyway."""
    model = make(kind, "bitfit")
    x = images(kind)
    bitfit = model.saved_bytes(x)
    model.remove_adapter("bitfit")
    model.add_adapter(zoo.adapter("prefix", num_tokens=20))
    assert model.saved_bytes(x) <= bitfit


@pytest.mark.parametrize("settings", [{"num_tokens": 0}, {"mlp": 0}, {"mlp": "wide"}])
def test_wrong_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        zoo.adapter("prefix", **settings)


def test_a_selector_that_matches_nothing() -> None:
    with pytest.raises(SelectionError, match="q"):
        make("vit", zoo.adapter("prefix", targets="q"))
