"""Puzzle's parts against numbers recorded from the authors' code.

`puzzle.json` holds what NVIDIA/Model-Optimizer gives on `wave`s in float32: the orders of `IterativeChannelContributionHook`
(W 6 x 10, 4 and 20 batches), `get_pruning_schedule`, `IndependentKvHeadContributionHook` (4 heads of queries of width 2, 2 of
keys), `_init_linear_attn` and `_init_linear_mlp`, `_init_attention_weights` with averaged keys and values (4 heads to 2),
`normalized_mse_loss` with the gradient, `cosine_embedding_loss_batched`, and `run_mip` (CBC) on 8 layers of 5 options. A
tensor is its first three values, its norm and its sum.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from waves import summary, wave

from zoo.errors import ConfigError
from zoo.families.children import product
from zoo.puzzle.importance import Channels, heads_of, schedule
from zoo.puzzle.library import loss_of
from zoo.puzzle.passes import distance
from zoo.puzzle.solver import Option, solve

AUTHORS: dict[str, Any] = json.loads((Path(__file__).parent / "puzzle.json").read_text())


def projection(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight.data.copy_(weight)
    return made


@pytest.mark.parametrize(("name", "rounds"), [("four", 4), ("twenty", 20)])
def test_order_of_channels(name: str, rounds: int) -> None:
    channels = Channels(wave((6, 10), 1, 0.4).float(), rounds)
    for i in range(rounds):
        channels.see(wave((2, 3, 10), i + 2, 1.0).float())
    assert channels.order()[::-1] == AUTHORS[f"order_{name}"]


def test_schedules() -> None:
    for case, expected in AUTHORS["schedules"].items():
        channels, rounds = map(int, case.split("/"))
        assert schedule(channels, rounds) == expected and sum(expected) == channels


def test_scores_of_heads() -> None:
    """Both of their ways; a head of keys has two of queries, 4 channels."""
    found = heads_of(wave((2, 3, 8), 6, 1.0).float(), wave((8, 8), 5, 0.5).float(), 4)
    for way in ("memory", "latency"):
        torch.testing.assert_close(found, torch.tensor(AUTHORS[f"heads_{way}"]), rtol=1e-5, atol=1e-6)


def test_first_weights() -> None:
    values, out = projection(wave((4, 8), 7, 0.5).float()), projection(wave((8, 8), 8, 0.5).float())
    near(product(out, values, repeat=2, width=2)[0], "linear_attn")
    up, down = projection(wave((12, 8), 9, 0.5).float()), projection(wave((8, 12), 10, 0.5).float())
    near(product(down, up)[0], "linear_mlp")
    from multimodal.families.vlm.children import LanguageChildren

    parts = {name: projection(wave((8, 8), 11 + i, 0.5).float()) for i, name in enumerate("qkvo")}
    attention = SimpleNamespace(head_dim=2, _modules={f"{n}_proj": p for n, p in parts.items()})
    for name, part in parts.items():
        setattr(attention, f"{name}_proj", part)
    block: Any = SimpleNamespace(self_attn=attention, _modules={"self_attn": attention})
    LanguageChildren().shrink("block", block, "attn", [0, 1])
    near(parts["k"].weight, "average_k")
    near(parts["v"].weight, "average_v")
    assert attention.num_key_value_groups == 2


def test_losses() -> None:
    child, parent = wave((3, 4, 5), 15, 1.0).float().requires_grad_(), wave((3, 4, 5), 16, 1.0).float()
    loss = loss_of(child, parent)
    loss.backward()
    assert child.grad is not None
    found = torch.tensor([float(loss), *summary(child.grad)])
    torch.testing.assert_close(found, torch.tensor(AUTHORS["nmse"]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(distance(child.detach(), parent), torch.tensor(AUTHORS["cosine"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["one", "two", "none"])
def test_choice(case: str) -> None:
    recorded = AUTHORS["mip"][case]
    scores, sizes, times = (wave((8, 5), 17 + i, scale).abs().tolist() for i, scale in enumerate((1.0, 10.0, 5.0)))
    groups = [
        [Option(scores[layer][i], {"mem": sizes[layer][i], "time": times[layer][i]}) for i in range(5)]
        for layer in range(8)
    ]
    if recorded["value"] is None:
        with pytest.raises(ConfigError, match="No network fits"):
            solve(groups, recorded["budget"], solver="knapsack")
        return
    chosen = solve(groups, recorded["budget"], solver="knapsack")
    assert chosen == recorded["chosen"]
    assert sum(group[i].score for group, i in zip(groups, chosen, strict=True)) == pytest.approx(recorded["value"])


def near(found: Tensor, name: str) -> None:
    torch.testing.assert_close(torch.tensor(summary(found)), torch.tensor(AUTHORS[name]), rtol=1e-5, atol=1e-6)
