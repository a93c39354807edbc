"""MEFT: frozen blocks made reversible, so that the activations come back from the outputs instead of being kept.

Idea: two streams run through the frozen blocks, coupled so that a block's inputs can be computed from its outputs; small adapters
are what is trained, and their start is close to nothing, so that the coupled network starts close to the pretrained one.
Points: `block` (verb `run`), `sublayer` (verbs `parallel`, `after`); families whose blocks are a plain sequence.

    x1 = x2 = tokens        y1 = lam x1 + F(x2)        y2 = bet x2 + G(y1)        tokens = (x1 + x2) / 2 behind the last block

| form | F                                       | G                             | goes on as | lam | bet |
| ---- | --------------------------------------- | ----------------------------- | ---------- | --- | --- |
| 1    | the block, an adapter beside its MLP    | an adapter                    | (y2, y1)   | 0.1 | 1   |
| 2    | an adapter                              | the block, as F of form 1     | (y2, y1)   | 1   | 0.1 |
| 3    | attention half, an adapter behind attention | MLP half, an adapter beside the MLP | (y1, y2) | 0.1 | 0.1 |

A block and a half are taken with their residual sums. An adapter is `W_up GELU(W_down x + b_down) + b_up`, W_down (r, d), W_up
(d, r); beside the MLP it reads what the MLP reads, behind attention it is added to attention's output.
Start: W ~ N(0, 0.02^2), b = 0: close to the pretrained function, not equal to it. Forms 1 and 2 answer with the mean of the last
two blocks' outputs.
Defaults: r = 8; all blocks of every tower and stage. Counts: two adapters for each block, 2 (2 d r + r + d); ViT-B r = 8 313,536.
Source: Liao, Tan and Monz, "Make Pre-trained Model Reversible", NeurIPS 2023 (BaohaoLiao/mefts, for BERT).
Deviations: blocks here are mostly pre-norm, and an adapter reads what the sublayer reads. No dropout in the adapters by default
(theirs has BERT's 0.1). Gradients of parameters are handed to autograd instead of being accumulated inside, so hooks, scalers and
distributed buckets see them as any others; the token tensor needs no gradient of its own. Each block with lam = 0.1 loses about
a digit (two in form 3), so all blocks cannot be inverted in one go: `checkpoint` blocks are, and the error is measured in each
backward pass.

In memory (`zoo.engine.reversible`): with `keep="input"`, the default, the tokens and two streams, 5 tokens' worth in float32 (3
with `streams="float32"`) at any depth; streams in between are found again from the front. "segments" keeps two more for each
`checkpoint` blocks and saves that time. "output" is the paper's own; it inverts all blocks in one go, seldom exactly enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from zoo.adapters.base import Adapter
from zoo.adapters.parts.bottleneck import Bottleneck
from zoo.engine.blocks import sequences
from zoo.engine.reversible import Reversible
from zoo.errors import AttachError
from zoo.host import Host
from zoo.points import BlockPoint, Points
from zoo.registry import register_adapter

FORMS = {1: ("block", "module", 0.1, 1.0), 2: ("module", "block", 1.0, 0.1), 3: ("attn", "mlp", 0.1, 0.1)}


@dataclass(frozen=True)
class BlockError:
    """How far the streams in front of a block came back, in this batch."""

    block: str
    relative: float  # norm of the difference by the norm, the larger of the two streams

    def __str__(self) -> str:
        return f"{self.block}: {self.relative:.2g}"


@register_adapter("meft")
@dataclass
class MEFT(Adapter):
    """Reversible adaptation.

    Args:
        form: 1, 2 or 3, see the table. lam, bet: of the coupling; None takes the form's.
        rank: r.
        targets: blocks, by selector; neighbours of one tower and stage make a run.
        checkpoint: how many blocks are inverted in one go. streams: their precision; blocks run in the model's own.
        keep: "input", "segments" or "output".
        limit: largest relative error of streams that came back; beyond it backward raises.
        reversible: false makes an ordinary graph of the same network.
        dropout: of the adapters' hidden values, while training.
    """

    form: Literal[1, 2, 3] = 1
    rank: int = 8
    lam: float | None = None
    bet: float | None = None
    targets: str | tuple[str, ...] = "block"
    checkpoint: int = 2
    streams: Literal["float64", "float32"] = "float64"
    keep: Literal["input", "segments", "output"] = "input"
    limit: float = 1e-2
    reversible: bool = True
    dropout: float = 0.0

    default_lr = 5e-4
    paper = "Liao et al. 2023"
    taxonomy = "system"
    identity = False
    merges = False
    unmerged = (
        "two streams through the blocks are another network. Keep the model as it is, or use a method that can be merged: "
        "lora, ssf, ia3, bitfit."
    )
    trial = {"rank": 2}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.form in FORMS, f"form is {self.form!r}; expected 1, 2 or 3.")
        _, _, lam, bet = FORMS[self.form]
        # filled in here, so that the settings that are saved are the ones in use
        self.lam, self.bet = lam if self.lam is None else self.lam, bet if self.bet is None else self.bet
        for name in ("lam", "bet"):
            value = getattr(self, name)
            self.check(1e-3 <= abs(value) <= 1e3, f"{name} is {value}; expected 0.001 to 1000: it is divided by.")
        for name in ("rank", "checkpoint"):
            self.check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; expected 1 or more.")
        self.check(
            self.keep in ("input", "segments", "output"),
            f"keep is {self.keep!r}; expected 'input', 'segments' or 'output'.",
        )
        self.check(
            self.streams in ("float64", "float32"), f"streams is {self.streams!r}; expected 'float64' or 'float32'."
        )
        self.check(self.limit > 0, f"limit is {self.limit}; expected above 0.")
        self.check(0 <= self.dropout < 1, f"dropout is {self.dropout}; expected 0 <= dropout < 1.")
        self._runs: list[tuple[list[str], Reversible]] = []

    def attach(self, points: Points) -> None:
        """A run for each sequence of blocks, two adapters for each block."""
        points.require("block", "meft")
        chosen: list[BlockPoint] = points.select(self.targets, kind="block")
        self._runs = []
        for blocks in sequences(chosen):
            f, g, _, _ = FORMS[self.form]
            run = Reversible(f, g, self.lam or 1.0, self.bet or 1.0, self.form != 3)
            run.every, run.keep, run.limit, run.reverse = self.checkpoint, self.keep, self.limit, self.reversible
            run.streams = getattr(torch, self.streams)
            for block in blocks:
                inside = points.select(f"{block.name}.*", kind="sublayer")
                if {p.role for p in inside} < {"attn", "mlp"}:
                    raise AttachError(
                        f"'meft' runs a block as two halves, and '{block.name}' of {points.backbone} lacks its attention or its "
                        "MLP. Name blocks that have both (targets=)."
                    )
                mlp = next(p for p in inside if p.role == "mlp")
                mlp.parallel(self._adapter(mlp.dim_out))
                if self.form == 3:
                    next(p for p in inside if p.role == "attn").after(self._adapter(block.dim_out, sequential=True))
                block.run(nn.Module() if self.form == 3 else self._adapter(block.dim_out), run)
            self._runs.append(([b.name for b in blocks], run))

    def _adapter(self, dim: int, sequential: bool = False) -> Bottleneck:
        made = Bottleneck(dim, self.rank, sequential=sequential, activation="gelu", dropout=self.dropout)
        for layer in (made.adapter_down, made.adapter_up):
            nn.init.normal_(layer.weight, std=0.02)
        return made

    def release(self) -> None:
        """Let go of the streams of a pass that broke off."""
        for _, run in self._runs:
            run.release()

    @property
    def error(self) -> float:
        """Largest relative error of streams that came back in backward passes so far."""
        return max((run.error for _, run in self._runs), default=0.0)

    def report(self, model: Host, *batch: Any) -> list[BlockError]:
        """How far each block's inputs come back in the model's present precision, from one forward pass of a batch.

        Every stretch that a backward pass inverts in one go is inverted, and each block's streams compared with the true ones.
        Errors over `limit` are reported, not raised.
        """
        found: list[BlockError] = []
        for _, run in self._runs:
            run.reported = []
        try:
            with torch.no_grad():
                model.features(*batch)
            for names, run in self._runs:
                found += [BlockError(name, error) for name, error in zip(names, run.reported or (), strict=True)]
        finally:
            for _, run in self._runs:
                run.reported = None
        return found
