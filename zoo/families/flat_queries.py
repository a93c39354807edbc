"""Queries on EVA and BEiT (`AttentionPoint.query`): as on a ViT (`zoo.families.fused_queries`), on turned keys.

    q = W_q LN1(Q) + b_q        A = softmax(q k^T / sqrt(c)) v

k and v are those of the block's own product, so keys of patches are turned by their places. Queries are not, as a class token is
not; they have no relative bias either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from zoo.engine.queries import Stream, read
from zoo.engine.sites import BlockSite, Op, parts
from zoo.families import timm_attention as flat
from zoo.points import Point

if TYPE_CHECKING:
    from zoo.points.recorder import Recorder


@dataclass(eq=False)
class FlatStream(Stream):
    """The way of one adapter's queries through one block of these."""

    def run(self, k: Tensor, v: Tensor, normed: bool, batch: int) -> Tensor:
        """Keys and values (B, h, N, c) -> the queries' outputs (B, T, d)."""
        block, attention = self.block, self.block.attn
        tokens = self.state.context.wide(self.module(batch), batch)
        hidden = flat.entering(attention, flat.norm_in_front(block)(tokens))
        # a copy, so that a graph does not hold on to the storage of all three
        q = flat.project(attention, hidden)[0].contiguous()
        answers = flat.finish(attention, read(q, k, v, batch), flat.gate_of(attention, hidden))
        return flat.half(block, "mlp", flat.attended(block, tokens, answers))


def record(session: Recorder, point: Point, module: nn.Module, block: Any) -> None:
    """Record the ops of `point.query(module)` in a block."""
    inside = parts(module)

    def op(at: nn.Module, kind: Any, where: str, fn: Any) -> None:
        session.op(at, Op(session.owner, where, fn, point.name, verb="query", modules=inside, last=True), kind)

    stream = FlatStream(session.owner, session.site(block, BlockSite).state, block, module, point.name)
    op(block, BlockSite, "watch_input", stream.enter)
    flat.read_keys(session, point, inside, stream.catch_own)
    op(block.attn, flat.kind_of(point, block.attn), "watch_keys", stream.catch_used)
    op(block, BlockSite, "watch_output", stream.leave)
