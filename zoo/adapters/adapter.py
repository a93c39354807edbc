"""Bottleneck adapters: a small two-layer network beside or behind sublayers; Houlsby, Pfeiffer, parallel, AdaptFormer.

Idea: d -> r -> d with r << d, started as nothing, added to what a frozen sublayer `h = F(LN(u))` gives.
Points: `sublayer` points. Four published forms; `A(x) = s (W_up f(W_down x + b_down) + b_up)`, W_down (r, d), W_up (d, r):

| form          | where              | computes          | r      | f    | s   | source                                    |
| ------------- | ------------------ | ----------------- | ------ | ---- | --- | ----------------------------------------- |
| `houlsby`     | after attn and mlp | `u + h + A(h)`    | 64     | GELU | 1   | Houlsby et al. 2019 (adapter-bert)        |
| `pfeiffer`    | after mlp          | `u + h + A(h)`    | d / 16 | ReLU | 1   | Pfeiffer et al. 2020 (adapter-hub)        |
| `parallel`    | beside mlp         | `u + h + A(LN u)` | 16     | ReLU | 2   | He et al. 2022, "scaled parallel adapter" |
| `adaptformer` | beside mlp         | `u + h + A(u)`    | 64     | ReLU | 0.1 | Chen et al. 2022 (ShoufaChen/AdaptFormer) |

The default is `pfeiffer`. `adaptformer` drops 0.1 of f(.) while training. Every entry can be set by itself. Two more settings
are those of a study of forms and places (Cappellazzo et al. 2024, umbertocappellazzo/PETL_AST):

| setting          | sequential        | parallel, x = LN u       |
| ---------------- | ----------------- | ------------------------ |
| as above         | `u + h + A(h)`    | `u + h + A(x)`           |
| `place="before"` | `u + F(x + A(x))` |                          |
| `residual`       | false: `u + A(h)` | true: `u + h + A(x) + x` |

Start: W_down Kaiming-uniform(a = sqrt 5), all else zero: the pretrained function, to the bit (unless `residual` is set).
(Both matrices at zero, as in some published code, would never learn: the gradient of each is a multiple of the other.)
Count: 2 d r + r + d for each point. ViT-B/16: Pfeiffer r = 8 156,768, Houlsby r = 8 313,536, AdaptFormer r = 64 1,189,632.
Deviations: `houlsby` starts at exactly nothing instead of at N(0, 0.001^2) truncated, in pre-norm blocks; `pfeiffer` sits in
front of the residual sum, as a pre-norm block has no norm behind it; `parallel` has the rank and scale that its authors use
for classification (16 and 2; for generation 512 and 4). All sit in front of stochastic depth, which frozen backbones do not
use. PETL_AST's "parallel after" is `pfeiffer` under another name; in its "sequential before", F(A(x)) + A(x), nothing of x
reaches F but through r channels, while here x stays. s multiplies W_up and b_up rather than the output, which is the same sum.

In memory: backward needs r numbers for each token. The sequential forms also need their input h, which
nothing else keeps; the parallel ones read the sublayer's norm (recomputed) or its input (kept anyway).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from zoo.adapters.base import Adapter
from zoo.adapters.parts.bottleneck import ACTIVATIONS, Bottleneck, width_at
from zoo.errors import MergeError
from zoo.points import Points, SublayerPoint
from zoo.points.merger import Merger
from zoo.registry import register_adapter

PRESETS: dict[str, dict[str, Any]] = {
    "houlsby": {"rank": 64, "activation": "gelu", "scale": 1.0, "dropout": 0.0},
    "pfeiffer": {"reduction": 16.0, "activation": "relu", "scale": 1.0, "dropout": 0.0, "targets": "mlp"},
    "parallel": {"rank": 16, "activation": "relu", "scale": 2.0, "dropout": 0.0, "targets": "mlp", "source": "input"},
    "adaptformer": {
        "rank": 64,
        "activation": "relu",
        "scale": 0.1,
        "dropout": 0.1,
        "targets": "mlp",
        "source": "residual",
    },
}


@register_adapter("adapter")
@dataclass
class BottleneckAdapter(Adapter):
    """Bottleneck adapters. Settings left at None are taken from `form`, see the table above.

    Args:
        form: "pfeiffer", "houlsby" (both sequential), "parallel" or "adaptformer".
        rank: r, the same everywhere. reduction: instead, r = d / reduction at each point (at least 1).
        targets: roles or names of sublayer points; None with "houlsby" takes every sublayer.
        activation: f: "relu", "gelu", "gelu_new" (by tanh), "silu", "tanh" or "none".
        scale: s. learn_scale: train it, from this value.
        norm: a LayerNorm of the adapter's own in front of W_down ("in") or behind W_up ("out"), or "none".
        source: of the parallel forms: "input" (behind the sublayer's norm) or "residual" (in front of it).
        dropout: on f(.), while training.
        place: of the sequential forms: "after" or "before" the sublayer.
        residual: whether the adapter's own input is added; None: of the sequential forms.
    """

    form: Literal["pfeiffer", "houlsby", "parallel", "adaptformer"] = "pfeiffer"
    rank: int | None = None
    reduction: float | None = None
    targets: str | tuple[str, ...] | None = None
    activation: Literal["relu", "gelu", "gelu_new", "silu", "tanh", "none"] | None = None
    scale: float | None = None
    learn_scale: bool = False
    norm: Literal["none", "in", "out"] = "none"
    source: Literal["input", "residual"] | None = None
    dropout: float | None = None
    place: Literal["after", "before"] = "after"
    residual: bool | None = None

    later = ("place", "residual")
    default_lr = 1e-3
    paper = "Houlsby et al. 2019; Pfeiffer et al. 2020; He et al. 2022; Chen et al. 2022"
    looks_back = True
    taxonomy = "additive"
    merges = False
    trial = {"rank": 2, "form": "houlsby"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.form in PRESETS, f"form is {self.form!r}; expected one of {', '.join(PRESETS)}.")
        given_rank = self.rank is not None or self.reduction is not None
        for name, value in PRESETS[self.form].items():
            # Filled in here, so that the settings that are saved are the ones in use.
            if getattr(self, name) is None and not (given_rank and name in ("rank", "reduction")):
                setattr(self, name, value)
        if self.residual is None:
            self.residual = self.sequential
        self.check(self.place in ("after", "before"), f"place is {self.place!r}; expected 'after' or 'before'.")
        self.check(
            self.sequential or self.place == "after",
            f"place='before' is of the sequential forms; '{self.form}' reads the sublayer's input as it is.",
        )
        self.check(self.rank is None or self.reduction is None, "rank and reduction are both given; give one of them.")
        self.check(self.rank is None or self.rank >= 1, f"rank is {self.rank}; expected 1 or more.")
        self.check(self.reduction is None or self.reduction > 0, f"reduction is {self.reduction}; expected above 0.")
        self.check(
            self.activation in ACTIVATIONS, f"activation is {self.activation!r}; known: {', '.join(ACTIVATIONS)}."
        )
        self.check(self.norm in ("none", "in", "out"), f"norm is {self.norm!r}; expected 'none', 'in' or 'out'.")
        self.check(0 <= (self.dropout or 0) < 1, f"dropout is {self.dropout}; expected 0 <= dropout < 1.")
        self.check(self.scale != 0, "scale is 0; the adapter could never do anything.")
        if self.sequential:
            self.check(
                self.source is None, f"source is for the parallel forms; '{self.form}' reads the sublayer's output."
            )
        else:
            self.check(
                self.source in ("input", "residual"), f"source is {self.source!r}; expected 'input' or 'residual'."
            )

    @property
    def sequential(self) -> bool:
        """Whether the adapter reads the sublayer's output (or else stands beside it)."""
        return self.form in ("pfeiffer", "houlsby")

    def rank_at(self, dim: int) -> int:
        """r at a point of width `dim`."""
        return width_at(dim, self.rank, self.reduction)

    def attach(self, points: Points) -> None:
        """One bottleneck at every selected sublayer."""
        points.require("sublayer", "adapter")
        chosen: list[SublayerPoint] = points.select(self.targets, kind="sublayer")
        for point in chosen:
            module = Bottleneck(
                point.dim_out,
                self.rank_at(point.dim_out),
                activation=self.activation or "relu",
                scale=1.0 if self.scale is None else self.scale,
                learn_scale=self.learn_scale,
                norm=self.norm,
                dropout=self.dropout or 0.0,
                sequential=bool(self.residual),
            )
            if self.sequential and self.place == "before":
                point.before(module)
            elif self.sequential:
                point.after(module)
            else:
                point.parallel(module, source=self.source or "input")

    def merge(self, merger: Merger) -> None:
        """Never.

        Raises:
            MergeError: always.
        """
        raise MergeError(
            f"'adapter' (form '{self.form}') cannot be merged: it is a network of its own beside the sublayer, not a change of "
            "the weights. Keep the model as it is, or use a method that can be merged: lora, ssf, ia3, bitfit."
        )
