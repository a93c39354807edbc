"""UniPELT: prefix tuning, LoRA and a bottleneck adapter together, each behind a gate that the input opens.

Idea: which of the three methods helps differs between tasks and inputs, so all are there, and small gates on the hidden states
learn to open those that fit.
Points: `attention` (verb `extend`) with the `linear` points q and v in front of it, and the `sublayer` points attn (verb `watch`)
and mlp.

    g(x) = mean over tokens of sigmoid(w . x + b)                w (d,), one number for each image

    q = W_q x + g_q(x) B_q A_q x,  v likewise with g_v           x (N, d): input of the attention, behind its norm
    A = softmax(q [g_p(x) P_k; K]^T / sqrt(c)) [g_p(x) P_v; V]   P_k, P_v (T, d), the keys and values of prefix tuning
    y = h + g_a(h) (W_up relu(W_down h + b_down) + b_up)         h (N, d): output of the MLP

The gates of LoRA stand in the place of alpha / r. `central=True` is the authors' shared gate of the attention instead of g_q, g_v
and g_p, a softmax between the two methods there: (c_l, c_p) = softmax(mean over tokens of relu(W_c x + b_c)), W_c (2, d).

Start: B = W_up = b_up = 0; w ~ N(0, 0.02^2) and b = 0, so every gate is about one half; prefixes as in `prefix`, which
take their share of the attention: not the pretrained function. A gate at 0 takes LoRA and adapter away; a prefix of zeros still
has a share.
Defaults: T = 10, r = 8, the adapter's rank d / 16, all three methods. Counts: 2 T d + 4 r d + (2 d k + d + k) + 4 (d + 1) for
each block, k = d / 16; ViT-B/16 12 * (15,360 + 24,576 + 74,544 + 3,076) = 1,410,672.
Source: Mao et al., "UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning", ACL 2022; morningmoni/UniPELT.
Deviations: the prefixes are trained themselves, without the authors' MLP that makes them. Their adapter reads what stands behind
a norm that pre-norm blocks do not have, and starts at N(0, 0.02^2) instead of nothing. Their means run over padding, which makes
an answer depend on what else is in the batch; here a backbone whose inputs are padded to no fixed number of tokens is refused.
(Their `eval()` adds LoRA to the weights with the gate of the last batch in training; here gates are of the input, so nothing is
merged.) Deep prompts of another adapter take no part in the means.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adapters.base import Adapter
from zoo.adapters.parts.bottleneck import Bottleneck
from zoo.adapters.parts.low_rank import LowRank, check_rank
from zoo.adapters.parts.spread import spread
from zoo.adapters.prefix import KeysValues
from zoo.engine.memory import dropped, recomputable
from zoo.errors import AttachError
from zoo.points import AttentionPoint, Points, SublayerPoint
from zoo.points.recorder import Carried
from zoo.registry import register_adapter

METHODS = ("prefix", "lora", "adapter")


def _linear(dim: int, width: int) -> nn.Linear:
    """A gate's projection, at its start."""
    linear = nn.Linear(dim, width)
    nn.init.normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear


def opened(x: Tensor, linear: nn.Linear) -> Tensor:
    """x (B, ..., d) -> mean over tokens of sigmoid(w . x + b), (B, width)."""
    return linear(x.flatten(1, -2)).sigmoid().mean(dim=1)


class Gates(nn.Module):
    """The gates of one attention: sees its input, leaves (B, 3) for q, v and the prefix on the way of this forward pass."""

    def __init__(self, dim: int, names: tuple[str, ...], central: bool, way: Carried) -> None:
        super().__init__()
        self.names, self.way, self.central = names, way, central
        if central:
            self.gate = _linear(dim, 2)
        else:
            self.gates = nn.ModuleDict({name: _linear(dim, 1) for name in names})

    def forward(self, x: Tensor) -> None:
        """x (B, ..., d)."""
        if self.central:
            lora, prefix = self.gate(x.flatten(1, -2)).relu().mean(dim=1).softmax(dim=-1).split(1, dim=-1)
            self.way.put(torch.cat([lora, lora, prefix], dim=-1))
            return
        none = x.new_zeros(x.shape[0], 1)
        found = [opened(x, self.gates[n]) if n in self.names else none for n in ("q", "v", "prefix")]  # type: ignore[arg-type]
        self.way.put(torch.cat([g.to(x.dtype) for g in found], dim=-1))


class GatedPrefix(KeysValues):
    """Keys and values of prefix tuning, times the gate."""

    def __init__(self, num_tokens: int, point: AttentionPoint, gates: Gates) -> None:
        super().__init__(num_tokens, point.num_heads, point.head_dim)
        self.way = gates.way

    def forward(self, batch: int) -> tuple[Tensor, Tensor]:
        """Keys and values, each (B, h, T, c)."""
        gates = self.way.get()
        assert gates is not None, "the attention ran without its sublayer"
        keys, values = super().forward(batch)
        gate = gates[:, 2, None, None, None]
        return keys * gate, values * gate


class GatedLowRank(LowRank):
    """`x (..., dim_in) -> g B A dropout(x)`; g (B,) in column `column` of the gates."""

    def __init__(self, dim_in: int, dim_out: int, rank: int, dropout: float, gates: Gates, column: int) -> None:
        super().__init__(dim_in, dim_out, rank, 1.0, dropout)
        self.way, self.column = gates.way, column

    def forward(self, x: Tensor) -> Tensor:
        """The delta alone."""
        return self._gated(dropped(x, self.drop))

    def _gated(self, x: Tensor) -> Tensor:
        gates = self.way.get(like=x)  # in windows an image's gates are those of all its windows
        assert gates is not None, "the projection ran without its sublayer"
        gate = gates[:, self.column].view(-1, *[1] * (x.dim() - 1))
        return F.linear(recomputable(torch.mul, F.linear(x, self.lora_a), gate), self.lora_b)

    @staticmethod
    def add_group(parts: tuple[tuple[GatedLowRank, int, int], ...], x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        """`y[..., start:stop] + delta(x)` for all parts of one projection."""
        x = dropped(x, parts[0][0].drop)
        return spread(y, ((start, stop, part._gated(x)) for part, start, stop in parts))


class GatedBottleneck(Bottleneck):
    """`y (B, ..., d) -> y + g(y) A(y)`."""

    def __init__(self, dim: int, rank: int, dropout: float) -> None:
        super().__init__(dim, rank, sequential=False, dropout=dropout)
        self.gate = _linear(dim, 1)

    def forward(self, y: Tensor) -> Tensor:
        """The output of the sublayer, changed."""
        gate = opened(y, self.gate).view(-1, *[1] * (y.dim() - 1))
        return y + super().forward(y) * gate


@register_adapter("unipelt")
@dataclass
class UniPELT(Adapter):
    """Three methods behind gates.

    Args:
        methods: those of "prefix", "lora" and "adapter" that there are.
        num_tokens: T, keys and values in front of each attention's own.
        rank: r of LoRA on q and v.
        reduction: the adapter's rank is d / reduction.
        central: one gate for prefix and LoRA of a block, which shares one between them.
        dropout: in LoRA (on its input) and in the adapter (behind relu), while training.
    """

    methods: tuple[str, ...] = METHODS
    num_tokens: int = 10
    rank: int = 8
    reduction: float = 16.0
    central: bool = False
    dropout: float = 0.0

    default_lr = 5e-4
    paper = "Mao et al. 2022"
    taxonomy = "hybrid"
    identity = False
    merges = False
    trial = {"num_tokens": 3, "rank": 2, "reduction": 8.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        known = bool(self.methods) and set(self.methods) <= set(METHODS) and len(set(self.methods)) == len(self.methods)
        self.check(known, f"methods is {self.methods!r}; expected some of {', '.join(METHODS)}, each once.")
        self.check(self.num_tokens >= 1, f"num_tokens is {self.num_tokens}; expected 1 or more.")
        self.check(self.rank >= 1, f"rank is {self.rank}; expected 1 or more.")
        self.check(self.reduction > 0, f"reduction is {self.reduction}; expected above 0.")
        self.check(0 <= self.dropout < 1, f"dropout is {self.dropout}; expected 0 <= dropout < 1.")
        self.check(
            not self.central or {"prefix", "lora"} <= set(self.methods),
            f"central shares one gate between prefix and LoRA, and methods is {self.methods!r}; expected both among them.",
        )

    def attach(self, points: Points) -> None:
        """Gates at every attention, prefix and LoRA behind them; an adapter behind every MLP."""
        if "lora" in self.methods:
            check_rank(self, ((p, self.rank) for p in points.select(kind="linear") if p.role in ("q", "v")))
        products = points.require("attention", "unipelt", each_tower=True)
        for product in products:
            # the mean over tokens must be one over the same tokens whatever else is in the batch
            if product.layout is None or not product.layout.grid:
                raise AttachError(
                    f"'unipelt' takes means over tokens, and at '{product.name}' of {points.backbone} it is not known which of "
                    "them are padding. Use its parts by themselves: prefix, lora, adapter."
                )
        way = points.carried("gates")
        points.context(
            "inputs"
        )  # a value of each sample: prompts of other adapters pass our LoRA once for each of them
        if "lora" in self.methods or "prefix" in self.methods:
            for sublayer in points.select(kind="sublayer", role="attn"):
                self._attend(points, sublayer, way)
        if "adapter" in self.methods:
            for sublayer in points.select(kind="sublayer", role="mlp"):
                dim = sublayer.dim_out
                sublayer.after(GatedBottleneck(dim, max(1, round(dim / self.reduction)), self.dropout))

    def _attend(self, points: Points, sublayer: SublayerPoint, way: Carried) -> None:
        read = [p for p in points.readers(sublayer) if p.role in ("q", "v")] if "lora" in self.methods else []
        product = [p for p in points.select(kind="attention") if p.name.startswith(f"{sublayer.name}.")]
        product = product if "prefix" in self.methods else []
        names = (*(p.role for p in read), *(["prefix"] if product else []))
        gates = Gates(sublayer.dim_in, names, self.central, way)
        sublayer.watch(gates)
        for point in read:
            column = ("q", "v").index(point.role)
            point.add(GatedLowRank(point.dim_in, point.dim_out, self.rank, self.dropout, gates, column))
        for point in product:
            point.extend(GatedPrefix(self.num_tokens, point, gates))
