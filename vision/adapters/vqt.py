"""VQT: tokens that only query; a linear head reads their answers, no gradient runs through the backbone.

Idea: in every block a few learned tokens ask the frozen features what they know, and a linear head reads all their answers. The
backbone's own tokens never see them, so nothing is back-propagated through the backbone.
Points: `attention` (verb `query`), all blocks by default.

    Z_m = Block_m(Q_m ; K, V of X_m)                                (B, T, d_m), see zoo/engine/queries.py; X_m stays as it is
    f = [ n(pooled) | n(vec Z_1) | ... | n(vec Z_L) ]               (B, d + sum_m T d_m), n(x) = x / ||x||_2
    logits = W f + b

`combine`: "concat" takes vec Z_m (T d_m values); "mean" the mean over the T outputs, "weighted" their sum with learned weights
w_m (T,) that start at one (both d_m values). Q_m (T, d_m) ~ U(-v, v), v = sqrt(6 / (3 p^2 + d_m)) with p the patch size, as in
VPT; dropout on Q_m while training. The head is VQT's own (another width): Kaiming-normal (fan out), bias -ln 99.
Defaults: T = 1 (the authors: 1 for most of VTAB-1k, 10 or 20 for counting, distance and orientation), dropout 0.1, as in
their scripts (Adam, batch 128, lr {1, .5, .25, .1, .05} * batch / 256, 100 epochs, 10 of warm-up, cosine).
Counts: T * d for each block (ViT-B/16: T * 9,216) and a head of (d + T L d) K + K; with T = 1, 10, 20 it reads 9,984, 92,928
and 185,088 features.

Feature selection (their second stage, which shrinks the head): train the head alone with a group lasso over its columns,
`lasso * sum_j ||W[:, j]||_2`, then keep the columns of largest norm and train the head on them:

    model.set_active("vqt", train=()); vqt.lasso = 1e-4; model.reset_head(K); ...train...
    vqt.select(model, 0.7); vqt.lasso = 0.0; ...train...

As one procedure with all of its fits: `zoo.run(model, "vqt-select", data)`.

What the queries read stands still: `zoo.fit(..., cache_features=True)` runs the backbone once for each image, keeps pooled
features, keys and values, and trains on those, to the same numbers. A step of one query takes 0.21 of the time on vit-micro at
0.6 MB an image, 0.11 on ViT-B/16 at 14.5 MB (ten queries 0.38 and 0.17).

Source: Tu, Mai, Chao, "Visual Query Tuning: Towards Effective Usage of Intermediate Representations for Parameter and Memory
Efficient Transfer Learning", CVPR 2023; andytu28/VQT.
Deviations: the authors concatenate queries and tokens into one sequence, which builds the graph through the whole backbone;
here the queries run apart, with the same outputs and gradients, and of the tokens only the covariance of keys and values is
kept. On Swin (not in their code) the queries read every window and the readings are averaged, as prompts in VPT. Combining the
layers by a self-attention block (an option of their code, not of the paper's results) is left out. On CLIP the image tower's
tokens are asked, and pooled is the embedding in the common space, in front of a classifier; texts have no such features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adapters.base import Adapter
from zoo.errors import ConfigError
from zoo.points import Points
from zoo.registry import register_adapter

COMBINE = ("concat", "mean", "weighted")


class Queries(nn.Module):
    """The queries of one block, and what they brought back from it in this forward pass."""

    def __init__(self, num_tokens: int, dim: int, bound: float, dropout: float, combine: str) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(num_tokens, dim).uniform_(-bound, bound))
        if combine == "weighted":
            self.weights = nn.Parameter(torch.ones(num_tokens))
        self.drop = nn.Dropout(dropout)
        self.combine = combine
        self.caught: Any = None  # used by the stream
        self.answers: Tensor | None = None

    @property
    def width(self) -> int:
        """How many features these queries give."""
        return self.tokens.numel() if self.combine == "concat" else self.tokens.shape[1]

    def forward(self, batch: int) -> Tensor:
        """(1, T, d), or (batch, T, d) while dropout draws for each image."""
        tokens = self.tokens.unsqueeze(0)
        if self.drop.p == 0 or not self.training:
            return tokens
        return self.drop(tokens.expand(batch, -1, -1))

    def receive(self, z: Tensor) -> None:
        """Keep the outputs (B, T, d) until the head's features are put together."""
        self.answers = z

    def take(self) -> Tensor:
        """The features (B, width) of unit length."""
        z, self.answers = self.answers, None
        assert z is not None, "the block of these queries did not run"
        if self.combine == "mean":
            z = z.mean(dim=1)
        elif self.combine == "weighted":
            z = (self.weights.to(z.dtype)[:, None] * z).sum(dim=1)
        return F.normalize(z.flatten(1), dim=1)


def _queries(root: nn.Module) -> list[Queries]:
    # not modules(), whose memo of modules cannot be traced by the compiler
    found: list[Queries] = []
    for child in root._modules.values():
        if isinstance(child, Queries):
            found.append(child)
        elif child is not None:
            found += _queries(child)
    return found


@register_adapter("vqt")
@dataclass
class VQT(Adapter):
    """Visual query tuning.

    Args:
        num_tokens: T, queries in each block.
        combine: how the T outputs of a block become features: "concat", "mean" or "weighted".
        dropout: on the queries, while training.
        targets: selector among attention points; None takes all.
        lasso: weight of the group lasso over the head's columns (feature selection).
    """

    num_tokens: int = 1
    combine: str = "concat"
    dropout: float = 0.1
    targets: str | tuple[str, ...] | None = None
    lasso: float = 0.0

    default_lr = 1e-2
    paper = "Tu, Mai and Chao 2023"
    taxonomy = "additive"
    identity = False
    merges = False
    unmerged = (
        "its queries are tokens beside the backbone's own, and its head reads features that the plain backbone does not have. "
        "Keep the model as it is, or save the adapter with model.save_adapter(folder)."
    )
    trial = {"dropout": 0.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.num_tokens >= 1, f"num_tokens is {self.num_tokens}; expected 1 or more.")
        self.check(self.combine in COMBINE, f"combine is '{self.combine}'; expected one of {', '.join(COMBINE)}.")
        self.check(
            self.combine != "weighted" or self.num_tokens > 1,
            "combine='weighted' with one token: its only weight would be lost in the normalisation. Use 2 tokens or more.",
        )
        self.check(0 <= self.dropout < 1, f"dropout is {self.dropout}; expected 0 <= dropout < 1.")
        self.check(self.lasso >= 0, f"lasso is {self.lasso}; expected 0 or more.")

    def attach(self, points: Points) -> None:
        """Put queries at every selected attention."""
        points.require("attention", "vqt")
        patch = 0  # 3 p^2: what one patch holds
        if "patch" in points.roles("linear"):
            patch = points.select(kind="linear", role="patch")[0].dim_in
        for point in points.select(self.targets, kind="attention"):
            bound = math.sqrt(6 / ((patch or point.dim_in) + point.dim_in))
            point.query(Queries(self.num_tokens, point.dim_in, bound, self.dropout, self.combine))

    def queries(self) -> list[Queries]:
        """The queries of all blocks, in forward order."""
        return _queries(self)

    # -- features ---------------------------------------------------------------------------------------------------

    def features(self, pooled: Tensor) -> Tensor:
        """(B, d) -> (B, feature_dim(d)): the pooled features and every block's answers, each of unit length."""
        parts = [F.normalize(pooled, dim=1)]
        for queries in self.queries():
            parts.append(queries.take())
        features = torch.cat(parts, dim=1)
        kept = self._kept()
        return features if kept is None else features[:, kept]

    def feature_dim(self, dim: int) -> int:
        """d + sum_m T d_m, or as many as were selected."""
        kept = self._kept()
        return dim + sum(q.width for q in self.queries()) if kept is None else len(kept)

    def _kept(self) -> list[int] | None:
        return None if self.plan is None else self.plan["features"]

    def init_head(self, head: Any) -> None:
        """The authors' initial values."""
        nn.init.kaiming_normal_(head.weight, mode="fan_out")
        if head.bias is not None:
            nn.init.constant_(head.bias, -math.log(99))

    def release(self) -> None:
        """Drop the answers and the caught projections of a forward pass that broke off."""
        for queries in self.queries():
            queries.caught = queries.answers = None

    # -- feature selection ------------------------------------------------------------------------------------------

    def extra_loss(self, model: Any, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """lasso * sum of the lengths of the head's columns; W (K, features)."""
        if self.lasso == 0:
            return None
        return self.lasso * model.head.weight.norm(dim=0).sum()

    def select(self, model: Any, fraction: float) -> list[int]:
        """Keep the features that the head weighs most, and give the model a new, narrower head to train.

        Args:
            model: the model that this adapter is attached to, and whose head reads its features.
            fraction: of the features now in use, 0 < fraction <= 1.

        Returns:
            The kept positions among all features, by falling length of their columns; also in `plan`, hence saved.

        Raises:
            ConfigError: the fraction is out of range, or the head reads something else.
        """
        number = isinstance(fraction, (int, float)) and not isinstance(fraction, bool)
        self.check(number and 0 < fraction <= 1, f"fraction is {fraction!r}; expected 0 < fraction <= 1.")
        order = self.order(model)
        return self.keep(model, order[: max(1, int(fraction * len(order)))])

    def order(self, model: Any) -> list[int]:
        """Positions of the features now in use among all, by falling length of the head's columns.

        Raises:
            ConfigError: the head reads something else.
        """
        head = model.head
        if not isinstance(head, nn.Linear) or head.in_features != self.feature_dim(model.family.feature_dim):
            raise ConfigError("the model's head is not a linear one on this adapter's features; train one first.")
        lengths = head.weight.detach().float().norm(dim=0)
        best, before = lengths.argsort(descending=True, stable=True).tolist(), self._kept()
        return best if before is None else [before[i] for i in best]

    def keep(self, model: Any, positions: list[int]) -> list[int]:
        """Use these features alone, and give the model a new head to train on them."""
        self.plan = {"features": positions}
        model.reset_head(model.num_classes, model.classes)
        return positions
