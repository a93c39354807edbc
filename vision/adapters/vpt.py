"""VPT: learned prompt tokens in front of every block (deep) or the first (shallow).

Idea: T learned tokens stand among the patches, in front of the first block (shallow) or of every block (deep); the
backbone is frozen.
Points: `tokens` (verb `prompt`).

    shallow:  x_0 = [cls | P | patches]             P (T, d); from there on they are tokens like all others
    deep:     [x_i | _] = Block_i([x_{i-1} | P_i])  P_i (T, d_i); what comes out of the prompts is dropped

P ~ U(-v, v), v = sqrt(6 / (3 p^2 + d)) with p the patch size and d the width of the first block (of the prompts, if they
are projected); `start="normal"` is N(0, 0.02^2) instead. `start="prototypes"` (which the paper compares with chance) calibrates:
of each class of the training data the mean of the pooled features of the frozen network, x_k (d,), is a prompt of every block; of
more classes than T, T centres of k-means over the x_k; of fewer, the other prompts are drawn as above. `project=e`: P (T, e), and
one linear map e -> d for all blocks of width d, Kaiming-normal (fan out).
Dropout is on the prompts, behind the map, drawn for each image.
Defaults: T = 10, deep, no dropout. The authors choose T for each data set from {1, 5, 10, 50, 100, 200} (Swin: up to 50) and
train by SGD (momentum 0.9, 100 epochs, 10 of warm-up, cosine) at a learning rate of {50, 25, 10, 5, 2.5, 1, .5, .25, .1,
.05} * batch / 256; dropout is 0 in their code. Our default rate is for AdamW.
Counts: shallow T d, deep T sum_i d_i. ViT-B/16: shallow-50 38,400, deep-10 92,160, deep-50 460,800; Swin-T deep-50 220,800,
Swin-B deep-50 601,600.
Source: Jia et al., "Visual Prompt Tuning", ECCV 2022; KMnP/vpt.

In a deep block nobody reads what becomes of the prompts, so they are computed as keys and values only, once for the whole
batch (`zoo.engine.attention`): equal outputs and gradients in fewer steps. On Swin they are in every window, without
position bias or
mask.

`pool`: where the pooling is an average, the authors' code averages over patches and prompts ("all": always in their Swin, and
in their MAE under "original"). Here the default is "patches": the average then describes the image alone, deep prompts keep
the cheap form in the last block too, and the map of features keeps its shape. Their Swin numbers need pool="all". A
class token is read alone in either case.

Deviations, besides that default:
- In the authors' shallow form on Swin, windows of one image get the prompts of another (prompts are expanded window-major,
  windows are batch-major). Here an image's output depends on this image alone; for one image the two agree.
- Their deep form on Swin draws one dropout mask for the whole batch (except in the first block), and has a projection that
  it never applies. Here both are as on ViT.
- Starts from prototypes are in the paper (T as many as classes) and not in their code. Where T is another number the rule is
  ours, and so is the condition that blocks and features have one width, which excludes Swin, and CLIP's features.
- Their mean over the windows stands behind the output projection, ours in front of it, which is the same linear map.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vision.adapters.parts.prototypes import centres, prototypes
from zoo.adapters.base import Adapter
from zoo.host import Host
from zoo.points import Points
from zoo.registry import register_adapter
from zoo.tasks.base import Task

STD = 0.02
STARTS = ("uniform", "normal", "prototypes")


class Prompt(nn.Module):
    """The prompts of one block. `project`, if any, belongs to the adapter and is shared by blocks.

    They start in U(-bound, bound), without a bound in N(0, 0.02^2).
    """

    def __init__(
        self, num_tokens: int, dim: int, bound: float | None, dropout: float, project: nn.Linear | None
    ) -> None:
        super().__init__()
        tokens = torch.empty(num_tokens, dim)
        self.prompt = nn.Parameter(tokens.normal_(0, STD) if bound is None else tokens.uniform_(-bound, bound))
        self.drop = nn.Dropout(dropout)
        self.shared = () if project is None else (project,)  # in a tuple, so that it is registered only once

    def forward(self, batch: int) -> Tensor:
        """(1, T, d), or (batch, T, d) while dropout draws for each image."""
        tokens = self.prompt.unsqueeze(0)
        for project in self.shared:
            tokens = project(tokens)
        if self.training and self.drop.p > 0:
            tokens = self.drop(tokens.expand(batch, -1, -1))
        return tokens


@register_adapter("vpt")
@dataclass
class VPT(Adapter):
    """Visual prompt tuning.

    Args:
        num_tokens: T, prompts in front of the first block, or of every block.
        deep: own prompts for every block; otherwise those of the first flow through all.
        dropout: on the prompts, while training.
        pool: where the features are an average over tokens: over the "patches", or over "all", prompts included.
        project: width of the prompts in front of a shared linear map; None: they have the block's width.
        start: "uniform", as the authors', "normal", or "prototypes" of the training data's classes.
    """

    num_tokens: int = 10
    deep: bool = True
    dropout: float = 0.0
    pool: str = "patches"
    project: int | None = None
    start: Literal["uniform", "normal", "prototypes"] = "uniform"

    later = ("start",)
    translated = ("start",)  # how random values are drawn, which those of a source are not
    default_lr = 1e-2
    paper = "Jia et al. 2022"
    looks_back = True
    taxonomy = "additive"
    identity = False
    merges = False
    trial = {"num_tokens": 3}
    lengths = {"num_tokens": ("*.prompt",)}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.num_tokens >= 1, f"num_tokens is {self.num_tokens}; expected 1 or more.")
        self.check(0 <= self.dropout < 1, f"dropout is {self.dropout}; expected 0 <= dropout < 1.")
        self.check(self.pool in ("patches", "all"), f"pool is '{self.pool}'; expected 'patches' or 'all'.")
        self.check(
            self.project is None or self.project >= 1, f"project is {self.project}; expected 1 or more, or None."
        )
        self.check(self.start in STARTS, f"start is {self.start!r}; expected {', '.join(STARTS)}.")
        self.check(
            self.start != "prototypes" or self.project is None,
            "prototypes have the width of the features, so that start='prototypes' takes no project.",
        )
        self.__dict__["needs_calibration"] = self.start == "prototypes"

    def attach(self, points: Points) -> None:
        """Put prompts in front of the first block, or of every block."""
        tokens = [p for p in points.require("tokens", "vpt", each_tower=True) if self.deep or p.first]
        patch = [p.dim_in for p in points if p.role == "patch"]  # 3 p^2: what one patch holds
        for point in tokens:
            width = self.project or tokens[0].dim_in
            bound = math.sqrt(6 / ((patch[0] if patch else width) + width)) if self.start != "normal" else None
            module = Prompt(self.num_tokens, self.project or point.dim_in, bound, self.dropout, self._map(point.dim_in))
            point.prompt(module, keep=not self.deep, pooled=self.pool == "all")

    def calibrate(self, model: Host, batches: Iterable[Any], task: Task | None = None) -> None:
        """With start="prototypes": prompts from the classes of (inputs, labels) of the training data.

        Raises:
            ConfigError: features of another width than the prompts. DataError: targets that are no labels of classes.
        """
        if self.start != "prototypes":
            return
        prompts: list[Any] = [part for part in self.modules() if isinstance(part, Prompt)]
        dim, widths = model.family.feature_dim, {part.prompt.shape[1] for part in prompts}
        self.check(
            widths == {dim},
            f"start='prototypes' puts features (width {dim}) where prompts of width {', '.join(map(str, sorted(widths)))} stand. "
            "Take start='uniform', or a backbone whose blocks and features are of one width.",
        )
        found = centres(prototypes(model, batches, task, self.method), self.num_tokens)
        with torch.no_grad():
            for part in prompts:
                part.prompt[: len(found)] = found.to(part.prompt)
        self.plan = {"prototypes": len(found)}

    def started(self, source: Adapter, tensors: dict[str, Tensor], points: Points) -> dict[str, Tensor]:
        """The values as they are.

        Raises:
            ConfigError: prototypes would take their place.
        """
        self.check(
            self.start != "prototypes" or self.plan is not None,
            "init= and start='prototypes' both say what the prompts start as; give one of them.",
        )
        return tensors

    def _map(self, dim: int) -> nn.Linear | None:
        """The projection for blocks of one width, made when first asked for."""
        if self.project is None:
            return None
        name = f"project_{dim}"
        if name not in self._modules:
            linear = nn.Linear(self.project, dim)
            nn.init.kaiming_normal_(linear.weight, mode="fan_out")
            self.add_module(name, linear)
        return self.get_submodule(name)  # type: ignore[return-value]
