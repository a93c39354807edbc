"""NOAH: prompts, LoRA and adapters in each block, of sizes that a search finds; and the supernet in which it searches.

Idea: which of the three methods helps, and where, differs between data sets; so all of them stand in a supernet whose parts share
weights with their narrower selves, and the sizes are searched for instead of chosen (the regime `noah`).
Points: `tokens` (verb `prompt`), `linear` q, k, v, `sublayer` mlp, in every block.

    prompts   T_i tokens P_i (T_i, d) beside those of block i, as in VPT-deep
    lora      [q; k; v] = W x + b + B A x                    A (r_i, d) one for the three, B (3 d, r_i), no alpha / r
    adapter   y = h + W_up g(W_down h + b_down) + b_up       h (N, d) output of the MLP, W_down (k_i, d), W_up (d, k_i)

g(z) = z sigmoid(1.702 z). A size is one number for all blocks, or one for each (0: nothing there).
Weight entanglement: the part of width w of a supernet is its first w tokens, rows of A and W_down, columns of B and W_up. With
`widths` this adapter is a supernet: before each step of training another sub-network is drawn, each part in the first D blocks, D
of `depths`, with a width from `widths` in each. `choose` names the one that is evaluated (the plan: it is saved and copied with
the numbers), `inherit` takes the slices over.

Start: P ~ U(-v, v), v = sqrt(6 / ((T + 1) d)); A Kaiming-uniform(a = sqrt 5), B = 0; W_down, W_up Xavier-uniform, biases
N(0, 1e-6^2), all as the authors': not the pretrained function.
Defaults: 10 of each, in all blocks, no dropout. Counts, for each block: T d + r (i + 3 o) + 2 k d + k + d. ViT-B/16: the supernet
of width 100 921,600 + 3,686,400 + 1,853,616 = 6,461,616; their sub-network for CIFAR-100 52,992 + 144,384 + 122,954 = 320,330.
Source: Zhang, Zhou, Liu, "Neural Prompt Search", 2022 (ZhangYuanhan-AI/NOAH).
Deviations: what a sub-network is drawn from is the number of the step, theirs the number of the epoch. Prompts of the last block
that has some are dropped behind it, as those of all others; theirs stay among the tokens from there on. Their model has prompts
in front of the first block besides its own, which that block replaces before anybody reads them (they count them in the cap).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision.adapters.parts.subnets import Sizes, Space, depths_of
from zoo import Adapter, Points, recomputable, register_adapter
from zoo.adapters.parts.bottleneck import quick_gelu
from zoo.adapters.parts.spread import spread
from zoo.host import Host

PARTS = ("prompts", "lora", "adapter")


class Sliced(nn.Module):
    """A module of which the first `now` rows are in use, of `width`."""

    chosen: Tensor

    def __init__(self, part: str, block: int, width: int, dropout: float) -> None:
        super().__init__()
        self.part, self.block, self.width, self.now = part, block, width, width
        self.drop = nn.Dropout(dropout)
        # besides the number a tensor: what evaluation keeps of prompts hangs on tensors
        self.register_buffer("chosen", torch.zeros(()), persistent=False)

    def choose(self, width: int) -> None:
        """Use the first `width` rows."""
        self.now = width
        self.chosen.fill_(width)

    def narrow(self, name: str, tensor: Tensor, width: int) -> Tensor:
        """The slice of a parameter that a module of this width has."""
        return tensor[:width]


class Prompts(Sliced):
    """P (T, d)."""

    def __init__(self, block: int, width: int, dim: int, dropout: float) -> None:
        super().__init__("prompts", block, width, dropout)
        bound = math.sqrt(6 / ((width + 1) * dim))
        self.prompt = nn.Parameter(torch.empty(width, dim).uniform_(-bound, bound))

    def forward(self, batch: int) -> Tensor:
        """(1, now, d), or (batch, now, d) while dropout draws for each image."""
        tokens = self.prompt[: self.now].unsqueeze(0)
        if self.training and self.drop.p > 0:
            tokens = self.drop(tokens.expand(batch, -1, -1))
        return tokens


class LowRankOfThree(Sliced):
    """`x -> B A dropout(x)` for one of q, k and v; A belongs to the first of them."""

    def __init__(self, block: int, width: int, dim_in: int, dim_out: int, dropout: float, first: Any) -> None:
        super().__init__("lora", block, width, dropout)
        if first is None:
            self.lora_a = nn.Parameter(torch.empty(width, dim_in))
            nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.lora_b = nn.Parameter(torch.zeros(dim_out, width))
        self.shared = () if first is None else (first,)

    def narrow(self, name: str, tensor: Tensor, width: int) -> Tensor:
        """Rows of A, columns of B."""
        return tensor[:width] if name == "lora_a" else tensor[:, :width]

    def down(self, x: Tensor) -> Tensor:
        """A dropout(x), (..., now)."""
        owner: Any = self.shared[0] if self.shared else self
        return F.linear(owner.drop(x), owner.lora_a[: self.now])

    def forward(self, x: Tensor) -> Tensor:
        """The delta alone."""
        return F.linear(self.down(x), self.lora_b[:, : self.now])

    @staticmethod
    def add_group(parts: tuple[tuple[LowRankOfThree, int, int], ...], x: Tensor, y: Tensor) -> Tensor:
        """`y[..., start:stop] + delta(x)` for all parts of one projection, which read one A x."""
        first = parts[0][0]
        if not first.now:
            return y
        hidden = first.down(x)
        return spread(y, ((start, stop, F.linear(hidden, p.lora_b[:, : p.now])) for p, start, stop in parts))


class Bottleneck(Sliced):
    """`h -> h + W_up g(W_down h + b_down) + b_up`."""

    def __init__(self, block: int, width: int, dim: int, dropout: float) -> None:
        super().__init__("adapter", block, width, dropout)
        self.down, self.up = nn.Linear(dim, width), nn.Linear(width, dim)
        for linear in (self.down, self.up):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=1e-6)

    def narrow(self, name: str, tensor: Tensor, width: int) -> Tensor:
        """Rows of W_down and its bias, columns of W_up; the other bias is whole."""
        return tensor[:, :width] if name == "up.weight" else tensor if name == "up.bias" else tensor[:width]

    def forward(self, h: Tensor) -> Tensor:
        """The sublayer's output, changed."""
        if not self.now:
            return h
        hidden = F.linear(h, self.down.weight[: self.now], self.down.bias[: self.now])
        return h + F.linear(self.drop(recomputable(quick_gelu, hidden)), self.up.weight[:, : self.now], self.up.bias)


@register_adapter("noah")
@dataclass
class NOAH(Adapter):
    """Prompts, LoRA and adapters of sizes of their own in each block.

    Args:
        prompts, lora, adapter: how many tokens, and the ranks: one number for all blocks, or one for each (0: none there).
        widths: of a supernet, what the parts of its sub-networks can have; None: no supernet, all of it is always used.
        depths: in which shares of the blocks, from the first, a part of a sub-network can be.
        dropout: on prompts, on the input of LoRA and on g(.), while training.
        seed: of the sub-networks that are drawn.
    """

    prompts: int | tuple[int, ...] = 10
    lora: int | tuple[int, ...] = 10
    adapter: int | tuple[int, ...] = 10
    widths: tuple[int, ...] | None = None
    depths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    dropout: float = 0.0
    seed: int = 0

    default_lr = 1e-3
    default_weight_decay = 1e-4
    paper = "Zhang, Zhou and Liu 2022"
    taxonomy = "hybrid"
    identity = False
    merges = False
    trial = {"prompts": 3, "lora": 2, "adapter": 4}

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {part: getattr(self, part) for part in PARTS}
        for part, sizes in given.items():
            least = min((sizes,) if isinstance(sizes, int) else sizes, default=-1)
            self.check(least >= 0, f"{part} is {sizes!r}; expected 0 or more, for all blocks or for each.")
        used = [max((s,) if isinstance(s, int) else s) for s in given.values()]
        self.check(any(used), "prompts, lora and adapter are all 0; there is nothing to train.")
        if self.widths is not None:
            self.check(
                bool(self.widths) and min(self.widths) >= 1 and len(set(self.widths)) == len(self.widths),
                f"widths is {self.widths!r}; expected different numbers of 1 and more.",
            )
            self.check(
                all(s == 0 or (isinstance(s, int) and s >= max(self.widths)) for s in given.values()),
                f"widths go up to {max(self.widths)}; a supernet is at least as wide in all blocks, or has no such part.",
            )
        self.check(
            bool(self.depths) and all(0 < share <= 1 for share in self.depths),
            f"depths is {self.depths!r}; expected shares of the blocks, above 0 and up to 1.",
        )
        self.check(0 <= self.dropout < 1, f"dropout is {self.dropout}; expected 0 <= dropout < 1.")
        self.blocks = 0  # of the backbone

    # -- attaching --------------------------------------------------------------------------------------------------

    def attach(self, points: Points) -> None:
        """Prompts, LoRA and a bottleneck in every block, where their size is not 0."""
        tokens = points.require("tokens", "noah", each_tower=True)
        self.blocks = len(tokens)
        sizes = self.whole()
        for number, point in enumerate(tokens):
            inside = [p for p in points if (p.tower, p.stage, p.block) == (point.tower, point.stage, point.block)]
            if width := sizes["prompts"][number]:
                point.prompt(Prompts(number, width, point.dim_in, self.dropout))
            if width := sizes["lora"][number]:
                first: LowRankOfThree | None = None
                for linear in (p for p in inside if p.kind == "linear" and p.role in ("q", "k", "v")):
                    made = LowRankOfThree(number, width, linear.dim_in, linear.dim_out, self.dropout, first)
                    first = first or made
                    linear.add(made)  # type: ignore[attr-defined]
            if width := sizes["adapter"][number]:
                for sublayer in (p for p in inside if p.kind == "sublayer" and p.role == "mlp"):
                    sublayer.after(Bottleneck(number, width, sublayer.dim_out, self.dropout))  # type: ignore[attr-defined]
        if self.plan is not None:
            self.choose(self.plan.get("sizes", "no plan"))

    def whole(self) -> Sizes:
        """The size of each part in each block."""
        found: Sizes = {}
        for part in PARTS:
            given = getattr(self, part)
            found[part] = (given,) * self.blocks if isinstance(given, int) else tuple(given)
            self.check(
                len(found[part]) == self.blocks,
                f"{part} has {len(found[part])} sizes, and the backbone has {self.blocks} blocks. Expected one for each.",
            )
        return found

    # -- sub-networks -----------------------------------------------------------------------------------------------

    @property
    def space(self) -> Space:
        """The sub-networks of this supernet."""
        self.check(self.widths is not None, "it has no widths to draw sub-networks from: it is no supernet.")
        parts = tuple(part for part in PARTS if getattr(self, part))
        return Space(parts, self.blocks, self.widths or (), depths_of(self.blocks, self.depths))

    def modules_of(self) -> list[tuple[str, Sliced]]:
        """All sliced modules, by the names of their points."""
        return [(name, m) for name, m in self.named_modules() if isinstance(m, Sliced)]

    def choose(self, sizes: Mapping[str, Sequence[int]] | None) -> None:
        """Use this sub-network from now on, also in evaluations; None: all of it. A part that is not named is left out."""
        whole = self.whole()
        known = sizes is None or (isinstance(sizes, Mapping) and set(sizes) <= set(PARTS))
        self.check(known, f"the sub-network is {sizes!r}; expected sizes by part: {', '.join(PARTS)}.")
        wanted: Any = whole if sizes is None else {p: sizes.get(p, (0,) * self.blocks) for p in PARTS}
        for part, widths in wanted.items():
            fits = isinstance(widths, (tuple, list)) and len(widths) == self.blocks
            fits = fits and all(type(w) is int and 0 <= w <= most for w, most in zip(widths, whole[part]))
            self.check(fits, f"{part} of the sub-network is {widths!r}; expected at most {list(whole[part])}.")
        self.plan = None if sizes is None else {"sizes": {part: list(widths) for part, widths in wanted.items()}}
        self._use(wanted)

    @property
    def evaluated(self) -> Any:
        """The sizes of the sub-network that was chosen; None: none was."""
        return None if self.plan is None else self.plan.get("sizes")

    def _use(self, sizes: Sizes) -> None:
        for _, module in self.modules_of():
            module.choose(sizes[module.part][module.block] if module.part in sizes else 0)

    def cost(self, sizes: Mapping[str, Sequence[int]]) -> int:
        """Parameters of a sub-network."""
        total = 0
        for _, module in self.modules_of():
            width = sizes[module.part][module.block] if module.part in sizes else 0
            if width:
                total += sum(module.narrow(name, p, width).numel() for name, p in _own(module))
        return total

    @torch.no_grad()
    def inherit(self, supernet: NOAH) -> None:
        """Take the first rows and columns of each of the supernet's parts."""
        sources = dict(supernet.modules_of())
        for name, module in self.modules_of():
            for key, parameter in _own(module):
                parameter.copy_(module.narrow(key, sources[name].get_parameter(key), module.width))

    # -- training ---------------------------------------------------------------------------------------------------

    def step_start(self, model: Host, step: int) -> None:
        """A supernet: draw the sub-network of this step."""
        if self.widths is not None:
            self._use(self.space.draw(random.Random(f"{self.seed}/{step}")))

    def eval_start(self, model: Host) -> None:
        """The chosen sub-network."""
        self._use(self.evaluated or self.whole())

    def fit_end(self, model: Host) -> None:
        """All of it."""
        self._use(self.evaluated or self.whole())


def _own(module: Sliced) -> list[tuple[str, nn.Parameter]]:
    """The module's own parameters: points inside of it have theirs."""
    own = [*module.named_parameters(recurse=False)]
    for child in ("down", "up"):
        linear = module._modules.get(child)
        if isinstance(linear, nn.Linear):
            own += [(f"{child}.{name}", p) for name, p in linear.named_parameters(recurse=False)]
    return own
