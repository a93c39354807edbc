"""MAM: a short prefix in every attention and a wide scaled adapter beside every MLP (mix-and-match, of the unified view).

Idea: seen as changes of hidden states, h <- h + dh, prefix tuning, adapters and LoRA differ in form, place, and how dh is added.
Few parameters do most in the attention's heads, many do most beside the MLP, and a constant scale is better than a gate: so
take a prefix for the first, and a parallel bottleneck with a scale for the second.
Points: `attention` (verb `extend`), all of them, and the `sublayer` points mlp (verb `parallel`).

    A = softmax(q [P_k; K]^T / sqrt(c)) [P_v; V]                     per head; P_k, P_v (T, h c), the same for every sample
      = (1 - a) A_own + a softmax(q P_k^T / sqrt(c)) P_v             a(q): the share of attention that goes to the prefix
    y = MLP(x) + s (W_up relu(W_down x + b_down) + b_up)             x = LN(u) (..., d): the MLP's own input; s is not learned

W_down Kaiming-uniform(a = sqrt 5), W_up and both biases 0; P ~ N(0, 0.02^2). Prefixes take their share of the attention from the
start: not the pretrained function. With `mlp=m` they are made, while training, from one embedding by one hidden layer (see
`prefix`); what is saved is P alone.
Defaults: those of the authors for classification: T = 16, r = 16, s = 2; for generation T = 30, r = 512, s = 4. No hidden layer
(theirs has m = 800).
Counts: 2 T d for each attention, 2 d r + r + d for each MLP. ViT-B/16 12 * (24,576 + 25,360) = 599,232 (the paper's 0.5 % of
RoBERTa); T = 30, r = 512 10,005,504. While training, the hidden layer adds T d + m (d + 1), and 2 d (m + 1) replace 2 T d.
Source: He et al., "Towards a Unified View of Parameter-Efficient Transfer Learning", ICLR 2022
(jxhe/unify-parameter-efficient-tuning).
Deviations: prefixes are trained directly by default, as papers on vision do, and start as in the authors' own variant of that;
they have no dropout. s multiplies W_up and b_up rather than the output, which is the same sum. All attentions of an
encoder-decoder share one hidden layer, where theirs has three.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from zoo.adapters.base import Adapter
from zoo.adapters.parts.bottleneck import Bottleneck
from zoo.adapters.prefix import Hidden, KeysValues, MadeKeysValues
from zoo.points import AttentionPoint, Points, SublayerPoint
from zoo.registry import register_adapter


@register_adapter("mam")
@dataclass
class MAM(Adapter):
    """Prefixes in the attention, scaled parallel adapters beside the MLP.

    Args:
        num_tokens: T, keys and as many values in front of each attention's own.
        rank: r of the adapters.
        scale: s of the adapters.
        mlp: width of the hidden layer that makes the prefixes while training; None trains them directly.
        dropout: on relu(.) in the adapters, while training.
    """

    num_tokens: int = 16
    rank: int = 16
    scale: float = 2.0
    mlp: int | None = None
    dropout: float = 0.0

    lengths = {"num_tokens": ("*.keys", "*.values")}
    default_lr = 1e-3
    paper = "He et al. 2022"
    taxonomy = "hybrid"
    identity = False
    merges = False
    unmerged = (
        "it adds keys and values to the attention and a network of its own beside the MLP, and no weight of the backbone "
        "stands for them. Keep the model as it is, or use a method that can be merged: lora, ssf, ia3."
    )
    trial = {"num_tokens": 3, "rank": 2}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_tokens", "rank"):
            self.check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; expected 1 or more.")
        self.check(self.scale != 0, "scale is 0; what is learned is multiplied by it, so it could never act.")
        self.check(self.mlp is None or self.mlp >= 1, f"mlp is {self.mlp}; expected a width of 1 or more, or None.")
        self.check(0 <= self.dropout < 1, f"dropout is {self.dropout}; expected 0 <= dropout < 1.")

    @classmethod
    def of_size(cls, size: int) -> dict[str, Any]:
        """As many tokens as the adapters have ranks, as for classification."""
        return {"num_tokens": size, "rank": size}

    def attach(self, points: Points) -> None:
        """Extend every attention, and put an adapter beside every MLP."""
        products: list[AttentionPoint] = points.require("attention", "mam")  # type: ignore[assignment]
        points.require("sublayer", "mam")
        sublayers: list[SublayerPoint] = points.select("mlp", kind="sublayer")  # type: ignore[assignment]
        hidden: Hidden | None = None
        if self.mlp is not None:
            first = products[0]
            hidden = Hidden(self.num_tokens, first.num_heads * first.head_dim, self.mlp)
            self.add_module("hidden", hidden)
        for point in products:
            if hidden is not None:
                point.extend(MadeKeysValues(hidden, point.num_heads, point.head_dim))
                continue
            prefix = KeysValues(self.num_tokens, point.num_heads, point.head_dim)
            nn.init.normal_(prefix.keys, std=0.02)
            nn.init.normal_(prefix.values, std=0.02)
            point.extend(prefix)
        for place in sublayers:
            module = Bottleneck(
                place.dim_out, self.rank, sequential=False, scale=float(self.scale), dropout=self.dropout
            )
            place.parallel(module, source="input")

    def saved(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The prefixes themselves, without what made them."""
        if self.mlp is None:
            return super().saved()
        made = {name: m for name, m in self.named_modules() if isinstance(m, MadeKeysValues)}
        makers = (*(f"{name}." for name in made), "hidden.")
        state = {key: value for key, value in self.state_dict().items() if not key.startswith(makers)}
        for name, module in made.items():
            state[f"{name}.keys"], state[f"{name}.values"] = (rows.detach().clone() for rows in module.rows())
        return {**self.config(), "mlp": None}, state
