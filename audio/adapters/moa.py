"""MoA: a mixture of bottleneck adapters beside a sublayer, dense or soft.

Idea: several narrow adapters instead of one, and a router that says how much each has to say: for each token (dense), or over a
few slots that are averages of all tokens, so that each adapter computes its slots alone (soft).
Points: `sublayer`, by default the attentions ("Pfeiffer" at MHSA); `targets=("attn", "mlp")` is their "Houlsby".

    u + h + Y,  h = F(x), x = LN u (N, d)    n adapters A_i(z) = U_i gelu(D_i z + b_i) + c_i,  D_i (r, d), U_i (d, r)
    dense:  Y = sum_i g_i(x) A_i(x)          g(x) = softmax(W x + w), W (n, d)
    soft:   Y = C [A_1(S_1); ...; A_n(S_n)]  C = softmax_slots(x Phi), Phi (d, n, p): p slots for each adapter
            S = softmax_tokens(x Phi)^T x

Defaults: soft, n = 7, p = 1, r = d / 128, attentions. D_i Kaiming-uniform(a = sqrt 5), Phi Xavier-normal, the router as
`nn.Linear`, all else zero: the pretrained function, to the bit. AdamW, 5e-3, weight decay 0.1, cosine (betas as for `conformer`);
the study trains the norm in front and the last one besides, `zoo.adapter("norm", targets=("blocks.*.norm1", "norm*"))`.
Count: n (2dr + r + d) + d n p (soft), + n (d + 1) (dense) for each point. AST: soft 903,672, dense 903,756; norms 19,968 more.
Source: Cappellazzo, Falavigna, Brutti, "Efficient Fine-tuning of Audio Spectrogram Transformers via Soft Mixture of Adapters",
Interspeech 2024 (umbertocappellazzo/PETL_AST, `src/MoA.py`); Puigcerver et al., "From Sparse to Soft Mixtures of Experts", 2023.
The soft form averages the tokens that run through the block: not the prompts of one block alone (`vpt`, deep); those that only
query (`vqt`) among themselves.
Deviations:
- Beside the attention alone, their code adds Y twice, behind the attention and again behind the MLP. Here once.
- Their D_i start at zero, too, from where no matrix ever moves.
- Their option to normalise tokens and Phi, which they did not use, is left out. So is their adapter with a convolution, whose
  result they drop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audio.adapters.parts.whole import check_whole
from zoo import Adapter, Points, SublayerPoint, register_adapter
from zoo.adapters.parts.bottleneck import width_at


class Experts(nn.Module):
    """n bottlenecks, their weights one behind the other."""

    def __init__(self, dim: int, rank: int, count: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(count, rank, dim))
        self.down_bias = nn.Parameter(torch.zeros(count, rank))
        self.up = nn.Parameter(torch.zeros(count, dim, rank))
        self.up_bias = nn.Parameter(torch.zeros(count, dim))
        for one in self.down:
            nn.init.kaiming_uniform_(one, a=math.sqrt(5))


class Dense(Experts):
    """`x (..., d) -> sum_i g_i(x) A_i(x)`."""

    def __init__(self, dim: int, rank: int, count: int) -> None:
        super().__init__(dim, rank, count)
        self.router = nn.Linear(dim, count)

    def forward(self, x: Tensor) -> Tensor:
        """Each token by itself."""
        gates = self.router(x).softmax(-1)  # (..., n)
        hidden = F.gelu(F.linear(x, self.down.flatten(0, 1), self.down_bias.flatten()))
        hidden = hidden.unflatten(-1, self.down_bias.shape) * gates.unsqueeze(-1)  # (..., n, r)
        return F.linear(hidden.flatten(-2), self.up.transpose(0, 1).flatten(1)) + gates @ self.up_bias


class Soft(Experts):
    """`x (B, ..., d) -> C A(S)`, over all tokens of a sequence."""

    def __init__(self, dim: int, rank: int, count: int, slots: int) -> None:
        super().__init__(dim, rank, count)
        self.phi = nn.Parameter(nn.init.xavier_normal_(torch.empty(dim, count, slots)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, d) -> (B, N, d); a grid (B, H, W, d) is one sequence."""
        tokens = x.flatten(1, -2)
        scores = tokens @ self.phi.flatten(1)  # (B, N, n p)
        slots = scores.softmax(1).transpose(1, 2) @ tokens  # (B, n p, d)
        slots = slots.unflatten(1, self.phi.shape[1:])  # (B, n, p, d)
        hidden = F.gelu(slots @ self.down.transpose(1, 2) + self.down_bias.unsqueeze(1))
        out = hidden @ self.up.transpose(1, 2) + self.up_bias.unsqueeze(1)  # (B, n, p, d)
        return (scores.softmax(2) @ out.flatten(1, 2)).view_as(x)


@register_adapter("moa")
@dataclass
class MixtureOfAdapters(Adapter):
    """Mixtures of adapters.

    Args:
        form: "soft" or "dense".
        experts: n. slots: p of the soft form.
        reduction: r = d / reduction at each point (at least 1). rank: instead, r itself.
        targets: roles or names of sublayer points; None takes all.
    """

    form: Literal["soft", "dense"] = "soft"
    experts: int = 7
    slots: int = 1
    reduction: float = 128.0
    rank: int | None = None
    targets: str | tuple[str, ...] | None = "attn"

    default_lr = 5e-3
    default_weight_decay = 0.1
    paper = "Cappellazzo et al. 2024"
    taxonomy = "additive"
    merges = False
    unmerged = (
        "how much each adapter has to say depends on the tokens. Keep the model as it is, or use a method that can be merged: "
        "lora, ssf, ia3, bitfit."
    )
    trial = {"experts": 2, "rank": 2}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.form in ("soft", "dense"), f"form is {self.form!r}; expected 'soft' or 'dense'.")
        for name in ("experts", "slots"):
            self.check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; expected 1 or more.")
        self.check(self.form == "soft" or self.slots == 1, "slots are of the soft form; the dense one has none.")
        self.check(self.reduction > 0, f"reduction is {self.reduction}; expected above 0.")
        self.check(self.rank is None or self.rank >= 1, f"rank is {self.rank}; expected 1 or more, or None.")

    def rank_at(self, dim: int) -> int:
        """r at a point of width `dim`."""
        return width_at(dim, self.rank, self.reduction)

    def attach(self, points: Points) -> None:
        """One mixture beside every selected sublayer.

        Raises:
            AttachError: no sublayers; or, for the soft form, tokens that must not see all others.
        """
        points.require("sublayer", "moa")
        chosen: list[SublayerPoint] = points.select(self.targets, kind="sublayer")
        for point in chosen:
            if self.form == "soft":
                check_whole(points, point, "'moa' averages all tokens of a sequence", "form='dense'")
            dim, rank = point.dim_out, self.rank_at(point.dim_out)
            soft = self.form == "soft"
            point.parallel(Soft(dim, rank, self.experts, self.slots) if soft else Dense(dim, rank, self.experts))
