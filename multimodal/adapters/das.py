"""DAS: blocks that a task can do without are not run, small networks stand in for them and beside those that stay.

Idea: which blocks are dispensable is estimated while a supernet is trained: subsets of blocks are left out in turn, and a bandit
learns from the loss on validation data which of them are missed least. Those are left out for good, which saves their work.
Points: `block` (verb `skip`), and `sublayer` (verb `parallel`, on the residual stream) in the blocks that run.

    skipped block      y = x + W_u relu(W_d LN(x) + b_d) + b_u            W_d (s b, d), W_u (d, s b), s: its sublayers
    kept sublayer F    y = x + F(x) + W_u relu(W_d LN(x) + b_d) + b_u     W_d (b, d), W_u (d, b)

`skip` says which of the candidates are left out, by their numbers; candidates are the blocks of `targets` that can be. With
`search = k` the adapter is the supernet instead: both stand at every candidate, and

    p = sigmoid(a), a = 0 (n,)                                           how dispensable a candidate is
    in each step of training: k of n are left out, drawn without replacement, proportional to p
    every `turn` steps from epoch `warmup` on: `draws` different subsets S_j, one batch of the stream "val", R_j = exp(-loss_j)
        a_i <- a_i + rate (R_j - mean R) p_i (1 - p_i)                   for i in S_j

Evaluations leave out the k of the largest a, and so does what is saved: the fixed network, without what the others had. The
regime `das` searches, then trains that network afresh.

W ~ N(0, 0.02^2), biases 0, LN the identity: a skipped block is nearly, not exactly, the identity, and the start is not the
pretrained function.
Defaults: b = 96, 3 draws, every 10 steps, rate 1, from the second of 3 epochs of search on; k = 4 of METER's 12 fusion blocks.
Counts (d = 768): b = 96 149,856; two of them 299,712, against 297,408 in a skipped block of two sublayers (b = 192); three
449,568, against 444,960 (b = 288). So the count hardly depends on which blocks are skipped.
Source: Wu et al., "Parameter and Computation Efficient Transfer Learning for Vision-Language Pre-trained Models", NeurIPS 2023;
DoubtedSteam/DAS (METER, ViLT).

Deviations: METER's blocks have their norms behind; its adapter of the MLP is added behind that norm, ours, as its others, in
front of it. Gates are updated behind the step, theirs in front of it, and in evaluation mode (no dropout). In METER a step size
of 0.1 is defined and not used; 1 is what acts there, too. Where two gates are equal theirs is undecided, ours takes the later
block. The first blocks of T5's and BART's stacks make what the others read, and stay.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from multimodal.adapters.parts.skipping import Bottleneck, Gates, updated
from zoo import Adapter, Points, probing, register_adapter
from zoo.data.seeds import mixed_seed
from zoo.errors import AttachError
from zoo.host import Host

STREAM = "val"


@register_adapter("das")
@dataclass
class DAS(Adapter):
    """Skipped blocks, and small networks in their place and beside the others.

    Args:
        skip: numbers of the candidates that do not run.
        search: k, how many a supernet leaves out; 0: no supernet.
        bottleneck: b, width beside one sublayer; in place of a block of s sublayers s b.
        targets: selector of block points that may be skipped; None: all that can be.
        draws: subsets in one update of the gates. turn: steps from one to the next. rate: step size. warmup: epochs before it.
        seed: of the subsets that are drawn.
    """

    skip: tuple[int, ...] = ()
    search: int = 0
    bottleneck: int = 96
    targets: str | tuple[str, ...] | None = None
    draws: int = 3
    turn: int = 10
    rate: float = 1.0
    warmup: int = 1
    seed: int = 0

    default_lr = 1e-3
    paper = "Wu et al. 2023"
    taxonomy = "hybrid"
    identity = False
    merges = False
    trial = {"bottleneck": 16}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("bottleneck", "turn"):
            self.check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; expected 1 or more.")
        self.check(self.draws >= 2, f"draws is {self.draws}; expected 2 or more, whose rewards can be compared.")
        for name in ("search", "warmup", "seed"):
            self.check(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; expected 0 or more.")
        self.check(self.rate > 0, f"rate is {self.rate}; expected more than 0.")
        self.check(
            len(set(self.skip)) == len(self.skip) and min(self.skip, default=0) >= 0,
            f"skip is {self.skip}; expected different numbers of blocks, counted from 0.",
        )
        self.check(not (self.skip and self.search), "give either skip, or search, which finds what to skip.")
        self.candidates: list[str] = []  # names of the blocks that may be skipped
        self._count = self._epoch = self._update = 0
        self._stream: Any = None

    # -- attaching --------------------------------------------------------------------------------------------------

    def attach(self, points: Points) -> None:
        """Put a network in place of each skipped block, and one beside each sublayer of the others; a supernet has both."""
        blocks = points.require("block", "das")
        chosen = [p for p in points.select(self.targets, kind="block") if p.skippable]
        if not chosen:
            raise AttachError(
                f"'das' skips blocks, and none of {points.backbone} can be: those behind read something that each makes, or how "
                "they are called is not described."
            )
        self.candidates, count = [p.name for p in chosen], len(chosen)
        self.check(
            max(self.skip, default=0) < count and len(self.skip) < len(blocks),
            f"skip is {self.skip}, and {count} blocks of {points.backbone} can be skipped (0 .. {count - 1}); one at least has "
            "to stay.",
        )
        if self.search:
            self.check(
                self.search < count and math.comb(count, self.search) >= self.draws,
                f"search is {self.search} of {count} blocks, which has fewer than {self.draws} subsets to compare.",
            )
            points.beside("gates", Gates(count))
        skipped = {chosen[i].name for i in self.skip}
        for block in blocks:
            place = (block.tower, block.stage, block.block)
            inside = [p for p in points if p.kind == "sublayer" and (p.tower, p.stage, p.block) == place]
            if not inside:
                raise AttachError(
                    f"'das' stands beside the sublayers of a block, and '{block.name}' of {points.backbone} has none."
                )
            searched = bool(self.search) and block.name in self.candidates
            if searched or block.name in skipped:
                instead = Bottleneck(block.dim_in, self.bottleneck * len(inside), residual=True)
                instead.always = not searched
                block.skip(instead)
            if searched or block.name not in skipped:
                for sublayer in inside:
                    beside = Bottleneck(sublayer.dim_in, self.bottleneck, residual=False)
                    sublayer.parallel(beside, source="residual")  # type: ignore[attr-defined]
        if self.search:
            self._leave_out(self.chosen())

    def chosen(self) -> list[int]:
        """Numbers of the candidates that are left out: `skip`, or those of the largest gates."""
        if not self.search:
            return list(self.skip)
        gates: Tensor = self.module_at("gates").values
        if gates.device.type == "meta":
            return list(range(len(gates)))[-self.search :]  # as of gates that are equal
        return sorted(gates.cpu().sort(stable=True).indices[-self.search :].tolist())

    def _leave_out(self, numbers: list[int]) -> None:
        for number, name in enumerate(self.candidates):
            self.module_at(name).skipping = number in numbers

    def _draw(self, *place: int | str) -> list[int]:
        """k candidates, drawn without replacement, proportional to p; the same for the same place on every process."""
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, "das", *place))
        p = torch.sigmoid(self.module_at("gates").values.detach().float().cpu())
        return sorted(torch.multinomial(p, self.search, generator=generator).tolist())

    # -- the search -------------------------------------------------------------------------------------------------

    def fit_start(self, model: Host, optimizer: Any, total_steps: int) -> None:
        """A search needs a stream of validation data."""
        if self.search:
            self.check(
                STREAM in optimizer.streams,
                f"a search compares blocks on validation data: zoo.fit(..., streams={{'{STREAM}': ...}}), or the regime 'das'.",
            )
            self._stream = optimizer

    def epoch_start(self, model: Host, epoch: int) -> None:
        """Which epoch it is decides whether gates are updated."""
        self._epoch = epoch

    def step_start(self, model: Host, step: int) -> None:
        """A supernet: leave out the blocks of this step."""
        if self.search:
            self._leave_out(self._draw("step", step))
            self._count += 1

    def step_end(self, model: Host, step: int) -> None:
        """After `turn` steps: compare subsets, and move the gates."""
        if not self.search or self._count < self.turn or self._epoch < self.warmup:
            return
        self._count = 0
        picks: list[list[int]] = []
        for attempt in itertools.count():  # different subsets; there are enough, see `attach`
            if len(picks) == self.draws:
                break
            if (picked := self._draw("compare", self._update, attempt)) not in picks:
                picks.append(picked)
        stream, rewards = self._stream.streams[STREAM], []
        inputs, targets = stream.batch(self._update)
        with probing(model, stream.task) as probe, torch.no_grad():
            for picked in picks:
                self._leave_out(picked)
                rewards.append(math.exp(-float(probe.loss(inputs, targets).detach())))
        self._update += 1
        gates = self.module_at("gates").values
        gates.copy_(updated(gates, picks, rewards, self.rate))

    def eval_start(self, model: Host) -> None:
        """The blocks that are dispensable by now."""
        if self.search:
            self._leave_out(self.chosen())

    def fit_end(self, model: Host) -> None:
        """As in an evaluation."""
        self.eval_start(model)
        self._stream = None

    # -- saving -----------------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any] | None:
        """How far the search is."""
        return {"count": self._count, "epoch": self._epoch, "update": self._update} if self.search else None

    def load_extra_state(self, model: Host, state: dict[str, Any]) -> None:
        """Go on there."""
        self._count, self._epoch, self._update = state["count"], state["epoch"], state["update"]

    def saved(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A supernet is saved as the network that it has found."""
        config, tensors = super().saved()
        if not self.search:
            return config, tensors
        out = [self.candidates[i] for i in self.chosen()]
        own = ("ln.", "down.", "up.")

        def stays(key: str) -> bool:
            name = next((n for n in self.candidates if key.startswith(f"{n}.")), None)
            if name is None:
                return not key.startswith("gates.")
            return key[len(name) + 1 :].startswith(own) == (name in out)

        return {**config, "search": 0, "skip": self.chosen()}, {k: v for k, v in tensors.items() if stays(k)}
