"""Compacter: bottleneck adapters whose matrices are sums of Kronecker products, with one mixing rule for all layers.

Idea: a bottleneck's matrices need neither full rank nor parameters of their own: what mixes the channels' n groups is learned
once for the whole network, and each layer adds n outer products.
Points: `sublayer` (verb `after`); `norm` (verb `train`) with `train_norms`.

    y <- y + Up(f(Down y))                        y the sublayer's output, in front of the residual sum
    Down(x) = x W_d + b_d,  Up(z) = z W_u + b_u   W_d (d, b), W_u (b, d)
    W = sum_{i=1..n} A_i (x) (S_i T_i)            A (n, n, n) ONE for all layers, up and down; S_i (k/n, r), T_i (r, p/n)

f is the GELU by tanh. Start: A ~ N(0, 1e-4^2), S_i and T_i Glorot-uniform with gain sqrt(2), biases 0: close to the pretrained
function, not equal to it (what is added has about 3e-8 of the size of y), and every tensor but W_d's learns at once.

| form          | where                                  | `reduction` |
| ------------- | -------------------------------------- | ----------- |
| `compacter`   | after self-attention (mixer) and MLP   | 32          |
| `compacter++` | after the MLP alone                    | 32          |

n = 4, r = 1, b = d / 32 (the authors also take 16 and 8), not after cross-attention. Their T5 trains its LayerNorms too
(`train_norms=True`); the default leaves them frozen, as on vision.
Counts: 2 r (d + b) + b + d for each point (for r = 1), and n^3. ViT-B/16: b = 24 57,088, b = 48 58,816; ++ 28,576 and 29,440.
T5-base with its norms: 161,728; ++ 104,704.
Source: Karimi Mahabadi, Henderson and Ruder, "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", NeurIPS 2021
(rabeehk/compacter).
Deviations: b from `reduction` is rounded to a multiple of n (where theirs is one already it is the same), so that the defaults
fit every width that n divides; a `bottleneck` that n does not divide is refused, as theirs. The rule stands once in a
saved file, not once for each layer.

In memory: as the sequential bottleneck, b numbers and the input for each token. The matrices are composed anew in backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from zoo.adapters.base import Adapter
from zoo.adapters.parts.bottleneck import ACTIVATIONS, bend
from zoo.adapters.parts.kronecker import KroneckerLinear, Rule
from zoo.errors import ConfigError
from zoo.points import Points, SublayerPoint
from zoo.registry import register_adapter


class KroneckerBottleneck(nn.Module):
    """`y (..., d) -> y + Up(f(Down y))`."""

    def __init__(self, dim: int, bottleneck: int, rule: Rule, rank: int, activation: str) -> None:
        super().__init__()
        self.phm_down = KroneckerLinear(dim, bottleneck, rule, rank)
        self.phm_up = KroneckerLinear(bottleneck, dim, rule, rank)
        self.activation = activation

    def forward(self, y: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        return y + self.phm_up(bend(self.phm_down(y), self.activation))


@register_adapter("compacter")
@dataclass
class Compacter(Adapter):
    """Compacter and Compacter++.

    Args:
        form: "compacter" or "compacter++", see the table above.
        n: groups of channels, and Kronecker products in each sum; divides every width.
        bottleneck: b, the same everywhere, a multiple of n. reduction: instead, b = d / reduction at each point, rounded to one.
        rank: r of the factors.
        targets: roles or names of sublayer points; None takes those of the form.
        activation: f.
        train_norms: train the scale and shift of every normalisation of the backbone too.
        init_std: of A.
    """

    form: Literal["compacter", "compacter++"] = "compacter"
    n: int = 4
    bottleneck: int | None = None
    reduction: float | None = None
    rank: int = 1
    targets: str | tuple[str, ...] | None = None
    activation: Literal["relu", "gelu", "gelu_new", "silu", "tanh", "none"] = "gelu_new"
    train_norms: bool = False
    init_std: float = 1e-4

    default_lr = 3e-3
    paper = "Karimi Mahabadi et al. 2021"
    taxonomy = "additive"
    identity = False
    merges = False
    unmerged = (
        "it is a network of its own behind the sublayer, not a change of the weights. Keep the model as it is, or use a method "
        "that can be merged: lora, ssf, ia3, bitfit."
    )
    trial = {"bottleneck": 8, "init_std": 0.3}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bottleneck is None and self.reduction is None:
            self.reduction = 32.0
        self.check(self.bottleneck is None or self.reduction is None, "bottleneck and reduction are both given.")
        for name in ("n", "rank"):
            self.check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; expected 1 or more.")
        self.check(
            self.bottleneck is None or (self.bottleneck >= 1 and self.bottleneck % self.n == 0),
            f"bottleneck is {self.bottleneck}; expected a multiple of n={self.n}.",
        )
        self.check(self.reduction is None or self.reduction > 0, f"reduction is {self.reduction}; expected above 0.")
        self.check(
            self.activation in ACTIVATIONS, f"activation is {self.activation!r}; known: {', '.join(ACTIVATIONS)}."
        )
        self.check(self.init_std > 0, f"init_std is {self.init_std}; a rule of zeros never learns.")

    def bottleneck_at(self, dim: int) -> int:
        """b at a point of width `dim`.

        Raises:
            ConfigError: n does not divide the width.
        """
        if dim % self.n:
            fits = [n for n in range(1, 2 * self.n) if dim % n == 0]
            raise ConfigError(
                f"compacter: n={self.n} does not divide the width {dim} of this backbone; these do: "
                f"{', '.join(map(str, fits))}."
            )
        if self.bottleneck is not None:
            return self.bottleneck
        return self.n * max(1, round(dim / (self.reduction or 1) / self.n))

    @classmethod
    def of_size(cls, size: int) -> dict[str, int]:
        """By the width between; the rank is that of its factors."""
        return {"bottleneck": size}

    def attach(self, points: Points) -> None:
        """One bottleneck at every selected sublayer, one rule for all of them."""
        points.require("sublayer", "compacter")
        chosen = self._chosen(points)
        sizes = [self.bottleneck_at(point.dim_out) for point in chosen]
        rule = points.share("rule", Rule(self.n, self.init_std))
        for point, size in zip(chosen, sizes, strict=True):
            point.after(KroneckerBottleneck(point.dim_out, size, rule, self.rank, self.activation))
        if self.train_norms:
            for norm in points.require("norm", "compacter with train_norms"):
                norm.train(*(n for n in ("weight", "bias") if norm.module._parameters.get(n) is not None))

    def _chosen(self, points: Points) -> list[SublayerPoint]:
        if self.targets is not None:
            return points.select(self.targets, kind="sublayer")
        roles = [r for r in points.roles("sublayer") if r != "cross"]
        if self.form == "compacter++":
            roles = [r for r in roles if r == "mlp"] or roles
        return points.select(kind="sublayer", role=roles)
