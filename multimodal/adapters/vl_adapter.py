"""VL-Adapter: small networks behind every sublayer of a model that writes text about images, one for all tasks or one for each.

Idea: VL-BART and VL-T5 answer every task by text, so that one small network for all tasks at once, the layer norms and the
embedding of what is seen are enough beside a frozen language model.
Points: `sublayer` (verb `after`), cross-attention too; `norm` (`train`); `condition` (the visual embedding is trained whole, but
for the words that it reads); for the other forms `linear` (`add`, `train`) and `tokens` (`prompt`). Context: `task`, one for
the batch, where a task has something of its own.

    y <- y + W_u f(W_d y + b_d) + b_u      y (..., d) a sublayer's output, in front of the residual sum; f GELU by tanh
                                           W_d (b, d), W_u (d, b)

| form          | what stands there                                       | trained too | sizes                       |
| ------------- | ------------------------------------------------------- | ----------- | --------------------------- |
| `adapter`     | as above                                                | norms       | b = d / 8                   |
| `compacter`   | as above, each W = sum_i A_i (x) W_i, i = 1 .. n        | norms       | b = d / 8, n = 2            |
| `hyperformer` | as above, W_d, b_d, W_u and b_u made linearly of e      | norms       | b = d / 8, m 512, h 128, p 8|
| `lora`        | W x + s B A dropout(x) on q and v of every attention    | all biases  | r 128, s = 32 / r           |
| `prompt`      | W_2 tanh(W_1 E + b_1) + b_2 (T, d) in front of the text | nothing     | T 40, h 800                 |

`compacter`: A (n, n, n) and W_i (in / n, out / n), whole, of each matrix. `hyperformer`: e = LN(W_2 relu(W_1 [task; layer] +
b_1) + b_2), maps for each kind of sublayer, a network for each stack; rows of tasks and layers (m,), W_1 (h, 2 m), W_2 (p, h).
`prompt`: W_1 (h, d), W_2 (d, h); the decoder reads what becomes of the prompts.

| sharing     | of the tasks                                                     |
| ----------- | ---------------------------------------------------------------- |
| `single`    | one for all; a prefix of the question says which task it is      |
| `half-up`   | W_d and b_d are each task's own, W_u and b_u common              |
| `half-down` | W_u and b_u are each task's own, W_d and b_d common              |
| `multiple`  | all is each task's own                                           |

The hypernetwork is shared in its own way (rows of tasks) and takes no `sharing`. Start: `start="normal"` N(0, 0.02^2) with
biases 0, as everything in VL-BART; "linear" as torch starts a linear map, as in VL-T5. W_u is not 0: the start is close to the
pretrained function, not equal to it. Of `compacter` A ~ N(0, 0.01^2), W_i Glorot-uniform with gain sqrt(2); of `hyperformer` as
that method; of `lora` A Kaiming-uniform, B = 0.

Counts on VL-BART, with 1,582,848 of the visual embedding (features 2048 wide), 4 tasks: single 6,081,600, half-up 12,725,760,
multiple 19,430,400; compacter 3,870,240, multiple 10,584,960; hyperformer 8,579,088; lora 8,786,688, multiple 30,020,352; prompt
2,843,936, multiple 6,627,200. Of videos (features 512 wide): 4,901,952, lora 7,607,040, prompt 1,664,288. VL-T5: b = 192 without
norms 19,333,632, prompt 2,842,400, lora with r = 150 18,170,112.
Defaults: theirs for images; trained at 1e-3 (3e-4: multiple adapters, videos), AdamW, 10 % warm-up, gradients clipped at 5.
Source: Sung, Cho and Bansal, "VL-Adapter: Parameter-Efficient Transfer Learning for Vision-and-Language Tasks", CVPR 2022
(ylsung/VL_adapter).
Deviations: theirs has LoRA on BART alone; here it is wherever there are q and v. Their norms of T5 stay frozen, since what
looks for them looks for another class than the network has: `unfreeze="none"` gives that. In VL-BART the language model's own
initialisation runs over the hypernetwork too (maps and rows of layers N(0, 0.02^2)); here it starts as hyperformer's. `extract`
takes a task out as a `single` of its own, which theirs does not do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from multimodal.adapters.parts import of_task
from multimodal.adapters.parts.of_task import (
    BareBottleneck,
    BareMaker,
    MadePrompts,
    OfTask,
    OwnBottleneck,
    OwnPrompts,
    Which,
)
from multimodal.adapters.parts.one_task import one_task
from multimodal.adapters.parts.vl_settings import complete, read_by
from zoo import Adapter, LinearPoint, Merger, Points, SublayerPoint, register_adapter
from zoo.adapters.parts.hypernetwork import HyperNetwork, Projector, Stack
from zoo.adapters.parts.kronecker import WholeKroneckerLinear
from zoo.adapters.parts.low_rank import LowRank
from zoo.engine.changes import BiasDelta
from zoo.errors import MergeError
from zoo.host import Host


@register_adapter("vl-adapter")
@dataclass
class VLAdapter(Adapter):
    """VL-Adapter. Settings left at None are those of `form`, see the table above.

    Args:
        form: "adapter", "compacter", "hyperformer", "lora" or "prompt".
        sharing: "single", "half-up", "half-down" (both of bottlenecks) or "multiple".
        tasks: their names; needed where a task has something of its own.
        rank: b, or r of LoRA. reduction: instead, b = d / reduction at each point.
        n: groups of channels of `compacter`; divides every width.
        alpha: numerator of LoRA's scale.
        dropout: on LoRA's input, while training.
        hidden: h, of the hypernetwork or of the prompts.
        task_dim: m, width of the rows. projected: p.
        num_tokens: T.
        targets: roles or names of sublayers, or for LoRA of linear points; None takes every sublayer, q and v.
        activation: f.
        unfreeze: what of the backbone is trained besides: "norms", "biases" or "none".
        visual: train the visual embedding, where the backbone has one.
        start: "normal" or "linear", see above.
    """

    form: Literal["adapter", "compacter", "hyperformer", "lora", "prompt"] = "adapter"
    sharing: Literal["single", "half-up", "half-down", "multiple"] = "single"
    tasks: tuple[str, ...] = ()
    rank: int | None = None
    reduction: float | None = None
    n: int = 2
    alpha: float | None = None
    dropout: float | None = None
    hidden: int | None = None
    task_dim: int = 512
    projected: int = 8
    num_tokens: int = 40
    targets: str | tuple[str, ...] | None = None
    activation: Literal["relu", "gelu", "gelu_new", "silu", "tanh", "none"] = "gelu_new"
    unfreeze: Literal["norms", "biases", "none"] | None = None
    visual: bool = True
    start: Literal["normal", "linear"] = "normal"

    default_lr = 1e-3
    paper = "Sung et al. 2022"
    taxonomy = "additive"
    identity = False
    merges = False
    trial = {"rank": 4}

    def __post_init__(self) -> None:
        super().__post_init__()
        complete(self)

    @classmethod
    def load_saved(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Folders of before settings were refused that a form does not read may have such."""
        return read_by(cls, config), tensors

    # -- attaching ----------------------------------------------------------------------------------------------------

    def attach(self, points: Points) -> None:
        """What the form puts in, and what it trains of the backbone."""
        if self.form == "prompt":
            points.require("tokens", "vl-adapter (form 'prompt')")
        elif self.form == "lora":
            points.require("linear", "vl-adapter (form 'lora')")
        else:
            points.require("sublayer", "vl-adapter")
        which = None
        if self.tasks:
            task = points.context(
                "task", "batch", required=len(self.tasks) > 1, choices=self.tasks, example=self.tasks[0]
            )
            which = Which(self.tasks, task)
        if self.form == "hyperformer":
            assert which is not None
            self._made(points, which.value)
        elif self.form == "lora":
            for linear in self.linears(points):
                linear.add(self._low_rank(linear, which))
        elif self.form == "prompt":
            for tokens in points.select(kind="tokens"):
                if tokens.first:
                    tokens.prompt(OwnPrompts(OfTask(self._prompts(tokens.dim_in), which)), keep=True, pooled=True)
        else:
            for point in points.select(self.targets, kind="sublayer"):
                point.after(self._bottleneck(point.dim_out, which))
        self._train(points)

    def linears(self, points: Points) -> list[LinearPoint]:
        """Where LoRA stands."""
        return points.linears(self.targets or ("q", "v"), ("q", "v"))

    def _bottleneck(self, dim: int, which: Which | None) -> nn.Module:
        size = self.bottleneck_at(dim)

        def make(dim_in: int, dim_out: int) -> Callable[[], nn.Module]:
            if self.form == "compacter":
                return lambda: WholeKroneckerLinear(dim_in, dim_out, self.n, 0.01)
            return lambda: of_task.plain(dim_in, dim_out, self.start == "normal")

        own_down, own_up = self.sharing in ("half-up", "multiple"), self.sharing in ("half-down", "multiple")
        down = OfTask(make(dim, size), which if own_down else None)
        up = OfTask(make(size, dim), which if own_up else None)
        return OwnBottleneck(down, up, self.activation)

    def bottleneck_at(self, dim: int) -> int:
        """b at a point of width `dim`.

        Raises:
            ConfigError: n of `compacter` does not divide it.
        """
        size = self.rank if self.rank is not None else max(1, round(dim / (self.reduction or 1)))
        for what, width in (("width", dim), ("bottleneck", size)):
            self.check(
                self.form != "compacter" or width % self.n == 0,
                f"n={self.n} does not divide the {what} {width} of this backbone; choose n or rank so that it does.",
            )
        return size

    def _made(self, points: Points, task: Any) -> None:
        chosen = points.select(self.targets, kind="sublayer")

        def stack(group: list[SublayerPoint]) -> Stack:
            dim = group[0].dim_out
            return Stack(
                group,
                self.task_dim,
                lambda width: Projector(width, self.hidden or 1, self.projected),
                lambda: BareMaker(self.projected, dim, self.bottleneck_at(dim)),
            )

        hyper = HyperNetwork(self.tasks, self.task_dim, chosen, lambda p: (p.tower, p.dim_out), stack)
        made = points.generate("hyper", hyper, task)
        for point in chosen:
            point.after(BareBottleneck(made, hyper, point.name, self.activation))

    def _low_rank(self, point: LinearPoint, which: Which | None) -> nn.Module:
        rank = self.rank or 1
        scale = (rank if self.alpha is None else self.alpha) / rank
        if which is None:
            return LowRank(point.dim_in, point.dim_out, rank, scale, self.dropout or 0.0)
        return OfTask(lambda: LowRank(point.dim_in, point.dim_out, rank, scale, self.dropout or 0.0), which)

    def _prompts(self, dim: int) -> Callable[[], nn.Module]:
        return lambda: MadePrompts(self.num_tokens, dim, self.hidden or dim, self.start == "normal")

    def _train(self, points: Points) -> None:
        """Norms or biases outside of the visual embedding, and that."""
        seen = (
            [p for p in points if p.kind == "condition" and p.name.rpartition(".")[2] == "visual"]
            if self.visual
            else []
        )
        inside = tuple(f"{p.name}." for p in seen)
        kinds = {"norms": ("norm",), "biases": ("linear", "norm"), "none": ()}[self.unfreeze or "none"]
        names = ("weight", "bias") if self.unfreeze == "norms" else ("bias",)
        for point in points:
            if point.kind not in kinds or point.name.startswith(inside):
                continue
            if have := [name for name in names if point.holder(name) is not None]:
                point.train(*have)  # type: ignore[attr-defined]
        if seen:
            points.train_everything(within=seen)

    # -- afterwards -----------------------------------------------------------------------------------------------------

    def extract(self, model: Host, task: str, name: str | None = None) -> tuple[str, ...]:
        """Attach what a task has, as a `single` that needs no task (switched off), and return its name in the model.

        Raises:
            UnknownNameError: this adapter has nothing of such a task.
        """
        return one_task(self, model, task, name)

    def merge(self, merger: Merger) -> None:
        """W <- W + s B A of a single LoRA; what is trained of the backbone is in the merged copy already.

        Raises:
            MergeError: another form, or several tasks.
        """
        if self.form != "lora" or self.tasks:
            raise MergeError(
                "'vl-adapter' cannot be merged: it is a network of its own behind the sublayers, or has a change for each task. "
                "Keep the model as it is; form='lora' of a single task can be merged (extract takes one out)."
            )
        for point in self.linears(merger.points):
            merger.add_weight(point, self.module_at(point).delta())
        parts = dict(self.named_modules())
        for linear in merger.points.select(kind="linear"):
            if isinstance(part := parts.get(linear.name), BiasDelta):  # of a slice of a fused projection
                merger.add_bias(linear, part.bias - part.frozen)  # type: ignore[operator]
