"""Queries at blocks of transformers that project queries, keys and values apart (`AttentionPoint.query`, `zoo.engine.queries`).

    q = W_q LN1(Q) + b_q        A = softmax(q k^T / sqrt(c)) v        U = Q + W_o A + b_o        Z = U + mlp(LN2(U))

k and v are those of the block's own tokens; queries get no mask and no bias. What other adapters do at these modules is done to
the queries too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from zoo.engine.attention import by_head
from zoo.engine.queries import Stream, read
from zoo.engine.sites import BlockSite, LinearSite, Op, parts
from zoo.families.split_attention import KEY, OUTPUT, QUERY, VALUE, WIDTH, SplitAttention, named

if TYPE_CHECKING:
    from zoo.backbone import Backbone
    from zoo.points import Point
    from zoo.points.recorder import Recorder


@dataclass(eq=False)
class SplitStream(Stream):
    """The way of one adapter's queries through one pre-norm block of these."""

    family: Any = None
    attention: Any = None
    norm: Any = None
    keys: Tensor | None = None

    def catch_keys(self, k: Tensor) -> None:
        """The projected keys (B, N, h c)."""
        if self.armed:
            self.keys = k

    def catch_values(self, v: Tensor) -> None:
        """The projected values (B, N, h c), which come behind the keys."""
        if self.armed and self.keys is not None:
            k, self.keys = self.keys, None
            width = named(self.attention, WIDTH)
            self.catch_own(by_head(k, width), by_head(v, width))

    def run(self, k: Tensor, v: Tensor, normed: bool, batch: int) -> Tensor:
        """Keys and values (B, h, N, c) -> the queries' outputs (B, T, d)."""
        attention = self.attention
        tokens = self.state.context.wide(self.state.tokens(self.module, batch), batch)
        q = by_head(named(attention, QUERY)(self.norm(tokens)), named(attention, WIDTH))
        answers = named(attention, OUTPUT)(read(q, k, v, batch).transpose(1, 2).flatten(2))
        return self.family.half(self.block, "mlp", tokens + self.block.dropout(answers))


def record(
    family: Backbone,
    session: Recorder,
    point: Point,
    module: nn.Module,
    *,
    block: Any,
    attention: Any,
    norm: nn.Module,
    kind: type[SplitAttention] = SplitAttention,
) -> None:
    """Record the ops of `point.query(module)` at a block that adds `dropout` of its branches to its tokens."""
    inside = parts(module)

    def op(at: nn.Module, kind: Any, where: str, fn: Any) -> None:
        session.op(at, Op(session.owner, where, fn, point.name, verb="query", modules=inside, last=True), kind)

    state = session.site(block, BlockSite).state
    stream = SplitStream(session.owner, state, block, module, point.name, False, family, attention, norm)
    op(block, BlockSite, "watch_input", stream.enter)
    op(named(attention, KEY), LinearSite, "watch_output", stream.catch_keys)
    op(named(attention, VALUE), LinearSite, "watch_output", stream.catch_values)
    op(attention, kind, "watch_keys", stream.catch_used)
    op(block, BlockSite, "watch_output", stream.leave)
