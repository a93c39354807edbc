"""Compacter: the Kronecker sum against torch.kron, a hand-written forward, one rule for all layers, start, settings, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from method_models import bare, images, loss_of, shake
from safetensors.torch import load_file
from torch import Tensor

import zoo
from zoo.adapters.parts.kronecker import KroneckerLinear, Rule, kronecker_sum
from zoo.errors import ConfigError


def attached(family: str = "vit", **settings: Any) -> zoo.Model:
    model = bare(family)
    torch.manual_seed(2)
    model.add_adapter(zoo.adapter("compacter", **settings))
    return model


def written_out(x: Tensor, state: dict[str, Tensor], key: str, rule: Tensor) -> Tensor:
    """x W + b with the Kronecker products written out."""
    left, right = state[f"{key}.left"], state[f"{key}.right"]
    weight = sum(torch.kron(rule[i], left[i] @ right[i]) for i in range(len(rule)))
    return x @ weight + state[f"{key}.bias"]  # type: ignore[operator]


def test_kronecker_sum_is_the_explicit_one() -> None:
    rule, factors = torch.randn(3, 2, 5), torch.randn(3, 4, 7)
    expected = sum(torch.kron(a, w) for a, w in zip(rule, factors))
    torch.testing.assert_close(kronecker_sum(rule, factors), expected)


def test_one_group_is_a_rank_one_matrix() -> None:
    """n = 1: W = a s t."""
    rule = Rule(1, 1.0).double()
    layer = KroneckerLinear(6, 4, rule).double()
    expected = rule.rule[0, 0, 0] * layer.left[0] @ layer.right[0]
    torch.testing.assert_close(layer.weight(), expected)
    assert torch.linalg.matrix_rank(layer.weight()) == 1


@pytest.mark.parametrize("rank", [1, 2])
def test_forward_written_out(rank: int) -> None:
    """A whole model: what the sublayers give, changed by the equation, in front of the residual sum."""
    model = attached(bottleneck=8, rank=rank, init_std=0.5)
    shake(model, "compacter")
    state = model.adapters["compacter"].state_dict()
    rule = state["rule.rule"]

    def adapter(y: Tensor, key: str) -> Tensor:
        hidden = F.gelu(written_out(y, state, f"{key}.phm_down", rule), approximate="tanh")
        return y + written_out(hidden, state, f"{key}.phm_up", rule)

    vit: Any = model.backbone
    with torch.no_grad(), model.disable():
        x = vit._pos_embed(vit.patch_embed(images()))
        for i, block in enumerate(vit.blocks):
            x = x + adapter(block.attn(block.norm1(x)), f"blocks.{i}.attn")
            x = x + adapter(block.mlp(block.norm2(x)), f"blocks.{i}.mlp")
        expected = model.head(vit.forward_head(vit.norm(x), pre_logits=True))
    torch.testing.assert_close(model(images()), expected, rtol=1e-5, atol=1e-5)


def test_one_rule_for_all_layers(tmp_path: Path) -> None:
    model = attached(bottleneck=8, init_std=0.5)
    adapter = model.adapters["compacter"]
    assert [k for k in adapter.state_dict() if "rule" in k] == ["rule.rule"]
    layers = [m for m in adapter.modules() if isinstance(m, KroneckerLinear)]
    assert len(layers) == 2 * 2 * 2 and all(layer.shared == (adapter.rule,) for layer in layers)
    model.save_adapter(tmp_path / "out")
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert [k for k in saved if "rule" in k] == ["compacter/rule.rule"]
    # its gradient is the sum over the layers: that of each layer with a rule of its own
    loss_of(model.train()).backward()
    total = adapter.rule.rule.grad.clone()
    apart = []
    for layer in layers:
        own = Rule(4, 1.0)
        own.load_state_dict(adapter.rule.state_dict())
        layer.shared = (own,)
        apart.append(own)
    loss_of(model).backward()
    torch.testing.assert_close(sum(rule.rule.grad for rule in apart), total, rtol=1e-4, atol=1e-6)


def test_start_is_close_and_learns() -> None:
    model, plain = attached(bottleneck=8), bare("vit")
    with torch.no_grad():
        torch.testing.assert_close(model(images()), plain(images()), rtol=0, atol=1e-6)
    loss_of(model.train()).backward()
    for name, parameter in model.adapters["compacter"].named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_counts_and_forms() -> None:
    each = 2 * (48 + 8) + 48 + 8
    assert attached(bottleneck=8).num_parameters(trainable=True, head=False) == 4 * each + 4**3
    assert attached(form="compacter++", bottleneck=8).num_parameters(trainable=True, head=False) == 2 * each + 4**3
    norms = attached(bottleneck=8, train_norms=True)
    assert norms.num_parameters(trainable=True, head=False) == 4 * each + 4**3 + 5 * 2 * 48
    assert norms.train().probe(images()) == []
    swin = attached("swin", reduction=6)  # widths 24 and 48: b = 4 and 8, one rule for both
    assert swin.num_parameters(trainable=True, head=False) == 4 * (3 * (24 + 4) + 3 * (48 + 8)) + 4**3


def test_the_bottleneck_is_a_multiple_of_n() -> None:
    config = zoo.adapter("compacter")
    assert [config.bottleneck_at(d) for d in (768, 192, 24)] == [24, 8, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bottleneck": 6}, "bottleneck is 6; expected a multiple of n=4"),
        ({"n": 5}, "n=5 does not divide the width 48 of this backbone; these do: 1, 2, 3, 4, 6, 8"),
        ({"n": 0}, "n is 0"),
        ({"bottleneck": 8, "reduction": 2.0}, "both given"),
        ({"reduction": 0.0}, "reduction is 0"),
        ({"init_std": 0.0}, "never learns"),
        ({"rank": 0}, "rank is 0"),
        ({"activation": "swish"}, "activation"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    model = bare("vit")
    with pytest.raises(ConfigError, match=message):
        model.add_adapter(zoo.adapter("compacter", **settings))
    assert not model.adapters
