"""Queries: tokens that read a block's keys and values and leave the block's own tokens alone (`AttentionPoint.query`).

The tokens Q (1 or B, T, d) run through a copy of block m's forward in which they only ask; nobody asks them:

    q = W_q norm1(Q) + b_q                                                      (1 or B, h, T, c)
    A = mean over the windows w of softmax(q k_w^T / sqrt(c)) v_w               (B, h, T, c)

k_w, v_w (B, h, N, c) are those that the block has just used for its own N tokens, prompts and prefixes of other adapters
included; attention over the whole sequence is one window. What is around this differs between families: each has a `Stream` of
its own whose `run` is the rest of the block (`fused_queries`, `flat_queries` and `split_queries` of `zoo.families`).

In memory: if nothing trainable stands in front, the block's tokens have no graph, and backward needs of them only

    dq = C dA        C = scale * sum_n a_n k_n (v_n - A)^T        (B, h, T, c, c), a_n the attention of token n

the covariance of keys and values under the query's own attention. It does not grow with the number of tokens: T c d values
for each image instead of 2 N d for keys and values (ViT-B/16 at T = 1: a sixth). For many queries keys and values are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.engine.second_order import exact, first_order
from zoo.engine.state import State
from zoo.errors import CombinationError

# Covariances cost one product of N c^2 for each query, so a few queries are where they pay.
FEW = 4


class _Read(torch.autograd.Function):
    """Windowed attention of a few queries over frozen tokens; keeps the covariances C and nothing of the tokens."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (1 or B, h, T, c); k, v (B, h, W, N, c), contiguous -> (B, h, T, c)."""
        windows, scale = k.shape[2], q.shape[-1] ** -0.5
        scores = (q.unsqueeze(2) @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * scale
        attention = scores.softmax(dim=-1).to(v.dtype)  # (B, h, W, T, N)
        read = attention @ v  # (B, h, W, T, c)
        weights = attention * (scale / windows)
        parts = []
        for t in range(q.shape[2]):
            keys = weights[..., t, :, None] * k
            values = v - read[..., t, None, :]  # centred before the product: no cancellation in half precision
            parts.append(keys.flatten(2, 3).transpose(-1, -2) @ values.flatten(2, 3))
        ctx.save_for_backward(torch.stack(parts, dim=2))
        ctx.shared = q.shape[0] == 1
        return read.mean(dim=2)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """dA (B, h, T, c) -> dq."""
        (covariance,) = ctx.saved_tensors
        grad_q = (covariance * grad.unsqueeze(-2)).sum(dim=-1)  # faster than so many products with one column
        return grad_q.sum(dim=0, keepdim=True) if ctx.shared else grad_q, None, None


def read(q: Tensor, k: Tensor, v: Tensor, batch: int) -> Tensor:
    """What queries read: attention in each window, averaged over the windows.

    Args:
        q: (1 or B, h, T, c).
        k, v: (B * W, h, N, c), usually views; the windows of an image stand together.
        batch: B.

    Returns:
        (B, h, T, c)
    """
    rows, _, tokens, width = k.shape
    windows, count = rows // max(1, batch), q.shape[2]
    frozen = not k.requires_grad and not v.requires_grad
    learning = q.requires_grad and torch.is_grad_enabled() and not exact()
    if frozen and learning and count <= FEW and count * width <= 2 * windows * tokens:
        # (B, h, W, N, c), contiguous since both are read several times
        k, v = (t.unflatten(0, (batch, windows)).transpose(1, 2).contiguous() for t in (k, v))
        return _Read.apply(q, k, v)
    if frozen and learning:  # what is kept must not hold on to the storage of all three projections
        k, v = k.contiguous(), v.contiguous()
    q = q.unsqueeze(1).expand(batch, windows, -1, -1, -1).flatten(0, 1)
    return F.scaled_dot_product_attention(q, k, v).unflatten(0, (batch, windows)).mean(dim=1)


@dataclass(eq=False)
class Stream:
    """The way of one adapter's queries through one block.

    `module(batch) -> (1 or batch, T, d)` gives the queries, `module.receive(z)` gets what becomes of them. `module.caught` holds
    keys and values from the block's attention to its end; they stand there so that `Adapter.release` can drop them.
    """

    owner: str
    state: State
    block: Any
    module: Any
    point: str
    armed: bool = False

    def enter(self, x: Tensor) -> None:
        """The block begins: the next projection is that of its own tokens (and not of anybody's queries)."""
        self.armed = True

    def catch_own(self, k: Tensor, v: Tensor) -> None:
        """The product's keys and values (B, h, N, c), with their norm."""
        if self.armed:
            self.armed, self.module.caught = False, (k, v, True)

    def catch_used(self, k: Tensor, v: Tensor) -> None:
        """The attention goes on with these instead, (B * W, h, N, c): prompts or prefixes of other adapters are among them."""
        if self.module.caught is not None:  # not while a checkpointed block is recomputed
            self.module.caught = (k, v, True)

    def leave(self, y: Tensor) -> None:
        """The block is done: run the queries. y (B, ..., d)."""
        caught, self.module.caught, self.armed = self.module.caught, None, False
        if caught is None:
            raise CombinationError(
                f"the queries of '{self.owner}' at '{self.point}' found no keys and values: another adapter replaces or skips "
                "the block's attention. Leave the block out of the targets, or switch that adapter off."
            )
        serving = self.state.serving
        if self.state.route is not None:  # these rows belong to this adapter alone
            self.state.serving = self.owner
        try:
            k, v, normed = caught
            z = self.run(k, v, normed, y.shape[0])
        finally:
            self.state.serving = serving
        self.module.receive(z)

    def run(self, k: Tensor, v: Tensor, normed: bool, batch: int) -> Tensor:
        """Keys (which may lack their norm) and values (B * W, h, N, c) -> the queries' outputs (B, T, d)."""
        raise NotImplementedError
