"""Queries in the image tower (`AttentionPoint.query`, `zoo.engine.queries`).

In open_clip's own blocks, whose attention is a `PackedAttention`:

    q = ln_q(W_q LN1(Q) + b_q)        A = softmax(q k^T / sqrt(c)) v                                    (B, h, T, c)
    U = Q + S1(ln_attn(W_o ln_inner(s A) + b_o))        Z = U + S2(mlp(LN2 U))                          (B, T, d)

with the norms, the factors s of the heads and the layer scales S that a block has. Blocks of timm's are those of a ViT
(`zoo.families.fused_queries`) or of EVA (`zoo.families.flat_queries`).

What queries bring stands beside the embedding of one image, which a classifier reads. The text tower has none; its tokens are
not asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from timm.layers.attention import Attention
from torch import Tensor, nn

from multimodal.families.clip.attention import PackedSite
from multimodal.families.clip.towers import half
from zoo.engine.attention import heads
from zoo.engine.queries import read
from zoo.engine.sites import BlockSite
from zoo.errors import AttachError
from zoo.families import flat_queries, fused_queries
from zoo.points import Point

if TYPE_CHECKING:
    from multimodal.families.clip.towers import Tower
    from zoo.points.recorder import Recorder


@dataclass(eq=False)
class PackedStream(fused_queries.FusedStream):
    """The way of one adapter's queries through one of open_clip's own blocks."""

    def run(self, k: Tensor, v: Tensor, normed: bool, batch: int) -> Tensor:
        """Keys (which may lack their norm) and values (B, h, N, c) -> the queries' outputs (B, T, d)."""
        block, attention = self.block, self.block.attn
        tokens = self.state.context.wide(self.state.tokens(self.module, batch), batch)
        # a copy of the first third, so that a graph does not hold on to the storage of all three
        q = heads(attention.in_proj(block.ln_1(tokens)), attention.num_heads)[0].contiguous()
        answers = attention.finish(read(attention.ln_q(q), k if normed else attention.ln_k(k), v, batch))
        answers = answers[0] if attention.pair else answers
        if hasattr(block, "ln_attn"):
            answers = block.ln_attn(answers)
        return half(block, "mlp", tokens + block.ls_1(answers))


def record(tower: Tower, session: Recorder, point: Point, module: nn.Module) -> None:
    """Record the ops of `point.query(module)`.

    Raises:
        AttachError: the text tower, or a block of timm's that is not described.
    """
    if tower.name != "image":
        raise AttachError(
            f"'{session.owner}' puts queries at '{point.name}', and what they bring stands beside the embeddings of images, for "
            "a classifier. Load the model with num_classes=... (which adapts the image tower alone), with tower='image', or "
            "leave the text tower out: targets='image.**'."
        )
    block: Any = tower.blocks[point.block]  # type: ignore[index]
    if not tower.timm:
        stream = PackedStream(session.owner, session.site(block, BlockSite).state, block, module, point.name)
        fused_queries.record_stream(session, point, stream, block.attn, block.attn.in_proj, PackedSite)
    elif type(block.attn) is Attention:
        fused_queries.record(session, point, module, block)
    else:
        flat_queries.record(session, point, module, block)
