"""Prefix tuning: learned keys and values in front of those of every attention.

Idea: what a prompt does to the other tokens, it does through its keys and values; so learn these themselves.
Points: `attention` (verb `extend`), all of them by default.

    A = softmax(q [P_k; K]^T / sqrt(c)) [P_v; V]        per head; P_k, P_v (T, h c), the same for every image

which is `(1 - a) A_own + a softmax(q P_k^T / sqrt(c)) P_v`, a(q) being the share of attention that goes to the prefix: a gated
branch in parallel to the attention, as the unified view has it (He et al. 2022). Behind the projections there is no
position: prefixes have no position bias, and are seen by every query, on Swin in every window.

P ~ U(-b, b), b = sqrt(6 / ((T + 1) d)): Xavier as NOAH applies it to a (1, T, d) tensor. With `mlp=m` all prefixes are
made, while training, from one embedding by one hidden layer, which the first paper found steadier than training P directly:

    [P_k | P_v] = W_i tanh(W_0 E + b_0) + b_i           E (T, d_1), W_0 (m, d_1), W_i (2 d_i, m) for attention i

It multiplies what is trained; what is saved is P alone, so a loaded adapter is a plain prefix.

LAE trains a factor for the keys and one for the values of each attention (`learn_scale`, 2 numbers) and divides the prefix's
share of attention by its sum (`compensate`), which makes it an additive branch; the own keys' share stays what it was:

    A = softmax(q [P_k; K]^T / sqrt(c)) [0; V] + softmax(q P_k^T / sqrt(c)) P_v

Defaults: T = 10 (LAE, the middle of NOAH's range), no MLP: papers on vision leave it out (m: 512 in the first paper, 800 in the
unified view).
Counts: 2 T sum_i d_i. ViT-B/16: T = 10 184,320, T = 20 368,640 (the 0.36 M of V-PETL Bench). With the MLP, while training:
T d_1 + m (d_1 + 1) + sum_i 2 d_i (m + 1).
Source: Li and Liang, "Prefix-Tuning", ACL 2021; on ViT NOAH (ZhangYuanhan-AI/NOAH) and LAE (gqk/LAE); He et al., "Towards a
Unified View of Parameter-Efficient Transfer Learning", ICLR 2022 (jxhe/unify-parameter-efficient-tuning).
Deviations: NOAH puts the prefix behind the own keys, which is the same; dropout on prefixes is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.adapters.base import Adapter
from zoo.points import AttentionPoint, Points
from zoo.registry import register_adapter


def _heads(rows: Tensor, count: int) -> Tensor:
    """(T, h c) -> (1, h, T, c)."""
    return rows.unflatten(-1, (count, -1)).transpose(0, 1).unsqueeze(0)


class KeysValues(nn.Module):
    """The prefix of one attention."""

    def __init__(
        self,
        num_tokens: int,
        num_heads: int,
        head_dim: int,
        init: str = "xavier",
        learn_scale: bool = False,
        compensate: bool = False,
    ) -> None:
        super().__init__()
        dim = num_heads * head_dim
        bound = math.sqrt(6 / ((num_tokens + 1) * dim))
        low, high = (-bound, bound) if init == "xavier" else (0.0, 0.01)
        self.keys = nn.Parameter(torch.empty(num_tokens, dim).uniform_(low, high))
        self.values = nn.Parameter(torch.empty(num_tokens, dim).uniform_(low, high))
        self.key_scale = nn.Parameter(torch.ones(())) if learn_scale else None
        self.value_scale = nn.Parameter(torch.ones(())) if learn_scale else None
        self.num_heads, self.compensate = num_heads, compensate

    def forward(self, batch: int) -> tuple[Tensor, Tensor]:
        """Keys and values, each (1, h, T, c)."""
        keys: Tensor = self.keys
        values: Tensor = self.values
        if self.key_scale is not None and self.value_scale is not None:
            keys, values = self.key_scale * keys, self.value_scale * values
        return _heads(keys, self.num_heads), _heads(values, self.num_heads)


class Hidden(nn.Module):
    """`tanh(W_0 E + b_0)` (T, m), from which all prefixes are made."""

    def __init__(self, num_tokens: int, dim: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(num_tokens, dim))
        self.linear = nn.Linear(dim, width)

    def forward(self) -> Tensor:
        """(T, m)."""
        return self.linear(self.embedding).tanh()


class MadeKeysValues(nn.Module):
    """The prefix of one attention, made from the hidden layer that the adapter's attentions share."""

    def __init__(self, hidden: Hidden, num_heads: int, head_dim: int, compensate: bool = False) -> None:
        super().__init__()
        self.compensate = compensate
        self.up = nn.Linear(hidden.linear.out_features, 2 * num_heads * head_dim)
        self.shared = (hidden,)  # in a tuple, so that it is registered only once
        self.num_heads = num_heads

    def rows(self) -> tuple[Tensor, Tensor]:
        """P_k and P_v, each (T, h c)."""
        keys, values = self.up(self.shared[0]()).chunk(2, dim=-1)
        return keys, values

    def forward(self, batch: int) -> tuple[Tensor, Tensor]:
        """Keys and values, each (1, h, T, c)."""
        keys, values = self.rows()
        return _heads(keys, self.num_heads), _heads(values, self.num_heads)


@register_adapter("prefix")
@dataclass
class Prefix(Adapter):
    """Prefix tuning.

    Args:
        num_tokens: T, keys and as many values in front of each attention's own.
        targets: selector among attention points; None takes all.
        mlp: width of the hidden layer that makes the prefixes while training; None trains them directly.
        learn_scale: one trained factor for the keys and one for the values of each attention, from 1.
        compensate: the attention of the prefix is divided by its own sum.
        init: "xavier", or "uniform" for U(0, 0.01).
    """

    num_tokens: int = 10
    targets: str | tuple[str, ...] | None = None
    mlp: int | None = None
    learn_scale: bool = False
    compensate: bool = False
    init: Literal["xavier", "uniform"] = "xavier"

    later = ("learn_scale", "compensate", "init")
    lengths = {"num_tokens": ("*.keys", "*.values")}
    translated = ("init",)  # how random values are drawn, which these are not
    default_lr = 5e-3
    paper = "Li and Liang 2021"
    looks_back = True
    taxonomy = "additive"
    identity = False
    merges = False
    unmerged = (
        "it adds keys and values to the attention, and no weight of the backbone stands for them. Keep the model as it is; in "
        "evaluation they cost next to nothing."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.num_tokens >= 1, f"num_tokens is {self.num_tokens}; expected 1 or more.")
        self.check(self.mlp is None or self.mlp >= 1, f"mlp is {self.mlp}; expected a width of 1 or more, or None.")
        self.check(self.init in ("xavier", "uniform"), f"init is {self.init!r}; expected 'xavier' or 'uniform'.")
        self.check(
            self.mlp is None or (not self.learn_scale and self.init == "xavier"),
            "learn_scale and init are of prefixes that are trained directly; with mlp they are made. Leave one of them out.",
        )

    def attach(self, points: Points) -> None:
        """Extend every selected attention."""
        points.require("attention", "prefix")
        chosen: list[AttentionPoint] = points.select(self.targets, kind="attention")  # type: ignore[assignment]
        if self.mlp is None:
            for point in chosen:
                own = (self.num_tokens, point.num_heads, point.head_dim)
                point.extend(KeysValues(*own, self.init, self.learn_scale, self.compensate))
            return
        first = chosen[0]
        hidden = Hidden(self.num_tokens, first.num_heads * first.head_dim, self.mlp)
        self.add_module("hidden", hidden)
        for point in chosen:
            point.extend(MadeKeysValues(hidden, point.num_heads, point.head_dim, self.compensate))

    def saved(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The prefixes themselves, without what made them."""
        if self.mlp is None:
            return super().saved()
        state: dict[str, Tensor] = {}
        for name, module in self.named_modules():
            if isinstance(module, MadeKeysValues):
                state[f"{name}.keys"], state[f"{name}.values"] = (rows.detach().clone() for rows in module.rows())
        return {**self.config(), "mlp": None}, state
