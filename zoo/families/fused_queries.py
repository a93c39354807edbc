"""Queries on timm's ViT and Swin (`AttentionPoint.query`, `zoo.engine.queries`).

    q = W_q norm1(Q) + b_q                          A what they read, the mean over the windows        (B, h, T, c)
    U = Q + ls1(W_o A + b_o)        Z = U + ls2(mlp(norm2(U)))                                          (B, T, d)

Queries get no mask and no relative position bias. The stream runs behind the block, through the block's own modules, so what
other adapters do there (LoRA on q, a bottleneck behind the MLP, a trained norm) is done to the queries too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from timm.layers.attention import Attention
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from zoo.engine.attention import heads
from zoo.engine.queries import Stream, read
from zoo.engine.sites import BlockSite, LinearSite, Op, Site, parts
from zoo.errors import AttachError
from zoo.points import Point

if TYPE_CHECKING:
    from zoo.points.recorder import Recorder


@dataclass(eq=False)
class FusedStream(Stream):
    """The way of one adapter's queries through one block whose attention has one projection for all three."""

    def catch(self, qkv: Tensor) -> None:
        """Keep keys and values out of the projections (B * W, N, 3 h c), as all adapters have left them."""
        if self.armed:
            _, k, v = heads(qkv, self.block.attn.num_heads)
            self.armed, self.module.caught = False, (k, v, False)

    def run(self, k: Tensor, v: Tensor, normed: bool, batch: int) -> Tensor:
        """Keys (which may lack their norm) and values (B * W, h, N, c) -> the queries' outputs (B, T, d)."""
        block, attention = self.block, self.block.attn
        tokens = self.state.context.wide(self.state.tokens(self.module, batch), batch)
        hidden = block.norm1(tokens)
        # a copy of the first third, so that a graph does not hold on to the storage of all three
        q = heads(attention.qkv(hidden), attention.num_heads)[0].contiguous()
        vit = isinstance(attention, Attention)
        if vit:
            q, k = attention.q_norm(q), k if normed else attention.k_norm(k)
        out = read(q, k, v, batch).transpose(1, 2).flatten(2)
        if vit:
            out = attention.norm(out)
            gate = getattr(attention, "gate", None)
            out = out if gate is None else out * gate(hidden).sigmoid()
        out = attention.proj_drop(attention.proj(out))
        tokens = tokens + block.drop_path1(_scaled(block, "ls1", out))
        return tokens + block.drop_path2(_scaled(block, "ls2", block.mlp(block.norm2(tokens))))


def _scaled(block: nn.Module, name: str, x: Tensor) -> Tensor:
    scale = block._modules.get(name)  # Swin has none
    return x if scale is None else scale(x)


def record(session: Recorder, point: Point, module: nn.Module, block: nn.Module) -> None:
    """Record the ops of `point.query(module)` in a block.

    Raises:
        AttachError: an attention of a class that this file does not describe.
    """
    attention = point.module
    if type(attention) not in (Attention, WindowAttention):
        raise AttachError(
            f"the attention at '{point.name}' is a {type(attention).__name__}; queries are described for timm's Attention and "
            "WindowAttention. Use a backbone with one of these, or leave the point out of the targets."
        )
    if not isinstance(block, (Block, SwinTransformerBlock)):
        raise AttachError(
            f"'{point.name}' is in a {type(block).__name__}; queries are described for timm's pre-norm blocks. Use a backbone of "
            "these, or leave the point out of the targets."
        )

    stream = FusedStream(session.owner, session.site(block, BlockSite).state, block, module, point.name)
    record_stream(session, point, stream, attention, attention.qkv)  # type: ignore[arg-type]


def record_stream(
    session: Recorder,
    point: Point,
    stream: FusedStream,
    attention: nn.Module,
    fused: nn.Module,
    kind: type[Site] = Site,
) -> None:
    """Record the ops of a stream through a block whose `attention`, with a site of this kind, projects by `fused`."""
    inside = parts(stream.module)

    def op(at: nn.Module, kind: type[Site], where: str, fn: Any) -> None:
        session.op(at, Op(session.owner, where, fn, point.name, verb="query", modules=inside, last=True), kind)

    op(stream.block, BlockSite, "watch_input", stream.enter)
    op(fused, LinearSite, "watch_output", stream.catch)
    op(attention, kind, "watch_keys", stream.catch_used)
    op(stream.block, BlockSite, "watch_output", stream.leave)
