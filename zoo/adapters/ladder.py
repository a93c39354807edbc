"""Ladder side-tuning: a narrow transformer beside the frozen one reads every block; no gradient runs through the backbone.

Idea: a small transformer runs beside the frozen one. It reads every block's output through a down-projection and a learned gate,
and its own last state is the feature. The backbone only feeds it, so nothing is back-propagated through the backbone.
Points: `block` (verb `replay`), and the last `norm` (verb `rescale`: its output becomes the ladder's).

    h_0 = W_0 x_0 + b_0                                           (B, N, w), x_0 (B, N, d) what enters the first block, w = d / r
    h <- mu_i h + (1 - mu_i) (W_i y_i + c_i),  mu_i = sigmoid(alpha_i / T)        y_i (B, N, d) what leaves block i
    h <- SideBlock_i(h)                                           see `parts/side.py`
    tokens = U drop(norm(h)) + u                                  (B, N, d), `add`: + the backbone's own behind its last norm

The family pools these tokens as it pools its own (class token, mean). Where no norm stands behind the last block (post-norm
blocks, ViTs that pool first), the tokens take the place of the last block's output.
Start: the side net is random, so this is not the pretrained function. `init`: "linear" torch's own initial values; "magnitude"
and "fisher" cut the side blocks out of the backbone's (`parts/cut.py`), "fisher" by the squared gradients of `samples` samples.
Defaults: r = 8, T = 0.1, alpha = 0 (mu = 1/2); lr 1e-3 (AdamW, 100 epochs; text: 3e-3).
Counts: ViT-B/16, r = 8: 12 side blocks of 111,840, 13 downs of 73,824, up 74,496, norm 192, 12 gates = 2,376,492.

In memory: of each `rerun` blocks the input alone is kept. In backward these frozen blocks run once more, without a graph, and the
side net's steps over them with one: one further forward pass of the backbone in time, and the same gradients. `rerun = 0` keeps
the blocks' outputs, which the down-projections need. ViT-B/16, of what full fine-tuning keeps: 0.037 (rerun 3), 0.259 (rerun
0). Beside other active adapters the outputs are kept too, and gradients go through the ladder into them, exactly.

`layers` names the blocks that have a rung; the others only run. On Swin, whose stages are of several widths, w follows the
stage, and the state of the side net is merged 2 x 2 between stages.

Source: Sung, Cho, Bansal, "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning", NeurIPS 2022;
ylsung/Ladder-Side-Tuning (seq2seq/third_party/models/t5/modeling_side_t5.py).
Deviations: the authors' side blocks are the backbone's class; ours are pre-norm blocks of its dimensions, without relative
positions (Swin) and without gates in the MLP. They keep all blocks' outputs. The dropped rungs' unused gates do not exist here.
Text models (whose decoder's side attends to the encoder's side) are left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from zoo.adapters.base import Adapter
from zoo.adapters.parts.cut import cut_blocks, squared_gradients
from zoo.adapters.parts.rungs import Rung, Top, one_stream
from zoo.adapters.parts.side import Merge, SideBlock
from zoo.errors import AttachError
from zoo.host import Host
from zoo.points import Point, Points
from zoo.points.recorder import Carried
from zoo.registry import register_adapter
from zoo.tasks import Task

REDUCTIONS = (192, 128, 96, 64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)  # from the smallest network to the largest
INITS = ("linear", "magnitude", "fisher")


@register_adapter("ladder")
@dataclass
class Ladder(Adapter):
    """A narrow transformer beside the frozen one reads every block's output; no gradient runs through the backbone.

    Args:
        reduction: r; the side net's width is d / r.
        layers: numbers of the blocks with a rung, from 0 and in forward order; None: all.
        add: the feature is the sum with the backbone's own; otherwise the ladder's alone.
        init: "linear", "magnitude" or "fisher".
        alpha: initial value of the gates.
        temperature: T of the gates.
        dropout: in front of the up-projection.
        rerun: how many blocks run again together in backward; 0 keeps their outputs.
        samples: of the training data, for init="fisher".
    """

    reduction: int = 8
    layers: tuple[int, ...] | None = None
    add: bool = False
    init: str = "linear"
    alpha: float = 0.0
    temperature: float = 0.1
    dropout: float = 0.0
    rerun: int = 3
    samples: int = 1024

    side_network = True
    identity, merges = False, False
    unmerged = (
        "it is a network of its own beside the backbone. Keep the model as it is, or save the adapter with "
        "model.save_adapter(folder)."
    )
    trial = {"reduction": 4}
    paper = "Sung, Cho and Bansal 2022"
    taxonomy = "additive"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.reduction >= 1, f"reduction is {self.reduction}; expected 1 or more.")
        self.check(
            self.layers is None or len(self.layers) > 0, "layers is empty; name blocks, or leave it out for all."
        )
        self.check(self.init in INITS, f"init is '{self.init}'; expected one of {', '.join(INITS)}.")
        self.check(self.temperature > 0, f"temperature is {self.temperature}; expected more than 0.")
        self.check(0 <= self.dropout < 1, f"dropout is {self.dropout}; expected 0 <= dropout < 1.")
        self.check(self.rerun >= 0, f"rerun is {self.rerun}; expected 0 (keep the blocks' outputs) or more.")
        self.check(self.samples >= 1, f"samples is {self.samples}; expected 1 or more.")
        self.__dict__["needs_calibration"] = self.init == "fisher"

    @classmethod
    def of_size(cls, size: int) -> dict[str, Any] | None:
        """By how many times narrower it is than the backbone."""
        return {"reduction": REDUCTIONS[size - 1]} if size <= len(REDUCTIONS) else None

    def attach(self, points: Points) -> None:
        """A rung at every block, and the up-projection behind the last."""
        blocks = one_stream(points, "ladder")
        layers = tuple(range(len(blocks))) if self.layers is None else self.layers
        self.check(
            len(set(layers)) == len(layers) and all(0 <= i < len(blocks) for i in layers),
            f"layers is {layers}; {points.backbone} has blocks 0 to {len(blocks) - 1}.",
        )
        walk, before = points.carried("walk"), blocks[0]
        width, rungs, inside = max(before.dim_in // self.reduction, 1), [], []
        for i, block in enumerate(blocks[: max(layers) + 1]):
            own = [p for p in points if p.name.startswith(f"{block.name}.")]
            rung = Rung(walk, block, max(block.dim_out // self.reduction, 1), self.rerun)
            if i == 0:
                rung.start = nn.Linear(block.dim_in, width)
            if i in layers:
                if block.stage != before.stage:
                    _check_rows(points, before, block)
                    rung.merge = Merge(width, rung.width, 2 ** ((block.stage or 0) - (before.stage or 0)))
                rung.keep(own, block.dim_out, self.reduction, (self.alpha, self.temperature), i)
                before, width = block, rung.width
            rungs.append(rung)
            inside.append(own)
        self._finish(points, blocks, rungs, width, walk)
        if self.init == "magnitude":
            cut_blocks([r.side for r in rungs], inside)

    def _finish(self, points: Points, blocks: list[Point], rungs: list[Rung], width: int, walk: Carried) -> None:
        last = blocks[-1]
        if width != max(last.dim_out // self.reduction, 1):
            self.check(False, "layers leaves out the last stage, whose tokens the ladder has to end with.")
        behind = [p for p in points[points.index(last) :] if p.kind == "norm" and p.block is None and p.name == "norm"]
        norm = behind[0].module if behind else next(p.module for p in points if p.kind == "norm")
        top = Top(walk, width, last.dim_out, norm, self.dropout, self.add)
        for block, rung in zip(blocks, rungs):
            ends = not behind and block is last
            if ends:
                rung.top = top
            block.replay(rung, changes=ends)  # type: ignore[attr-defined]
        if behind:
            behind[0].rescale(top)
        elif len(rungs) < len(blocks):
            self.check(
                False, f"layers must name the last block, {len(blocks) - 1}, since {points.backbone} has no last norm."
            )

    def calibrate(self, model: Host, batches: Iterable[Any], task: Task | None = None) -> None:
        """init="fisher": cut side blocks out of the backbone's by squared gradients of the task's loss over `samples` samples."""
        blocks = one_stream(model.points, "ladder")
        inside = [[p for p in model.points if p.name.startswith(f"{b.name}.")] for b in blocks]
        importance = squared_gradients(
            model, [p for own in inside for p in own if p.kind == "linear"], batches, self.samples
        )
        found = [self._side_at(b) for b in blocks]
        cut_blocks(found, inside, importance)
        self.plan = {"init": self.init}

    def _side_at(self, block: Point) -> SideBlock | None:
        try:
            rung = self.module_at(block)
        except AttributeError:
            return None
        return rung.side if isinstance(rung, Rung) else None


def _check_rows(points: Points, *blocks: Point) -> None:
    if any(p.layout is None or p.layout.prefix for p in blocks):
        raise AttachError(
            f"'ladder' joins neighbours between stages, and the tokens of {points.backbone} at '{blocks[0].name}' do not stand "
            "row by row. Use a backbone whose stages hand on maps, such as Swin, or one without stages."
        )
