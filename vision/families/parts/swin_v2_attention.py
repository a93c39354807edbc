"""Prefixes, prompts and queries on timm's `SwinTransformerV2`: as on Swin (`swin_attention`), where

    A = softmax(exp(s) cos(q, k) + 16 sigmoid(B) + mask) v        s: one number a head, at most log 100; B of an MLP over offsets

Extra keys are compared by their cosine like all others, and their relative position bias is zero. Norms stand behind the
branches, so prompts enter the attention as they are, and patch merging norms what it has reduced.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers import use_fused_attn
from torch import Tensor, nn

from vision.families.parts.swin_attention import Kinds, Merge, WindowBlock, WindowSite
from zoo.engine.attention import Alone, Pair, Prompts, heads
from zoo.engine.queries import read
from zoo.engine.sites import BlockSite, LinearSite, Op, parts
from zoo.families.fused_queries import FusedStream
from zoo.families.timm_attention import Keys, entering
from zoo.points import Point

if TYPE_CHECKING:
    from zoo import Backbone
    from zoo.points.recorder import Recorder


def scaled(attention: Any, q: Tensor) -> Tensor:
    """Queries (R, h, M, c) whose products with unit keys are the scores."""
    return F.normalize(q, dim=-1) * attention.logit_scale.clamp(max=math.log(100.0)).exp().to(q.dtype)


@dataclass(eq=False)
class CosineSite(WindowSite):
    """timm's `WindowAttention` of version 2."""

    @property
    def fused(self) -> bool:
        """torch's fused product, although timm forms the scores in the open."""
        return use_fused_attn()

    @property
    def scale(self) -> float:
        """The queries bring it."""
        return 1.0

    def ready(self, pair: Pair) -> Pair:
        """Extra keys of length 1."""
        if isinstance(pair, Alone):
            return Alone(F.normalize(pair.keys, dim=-1), pair.values)
        return F.normalize(pair[0], dim=-1), *pair[1:]

    def compared(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q (R, h, M, c) and k (R, h, N, c) of length exp(s) and 1."""
        return scaled(self.module, q), F.normalize(k, dim=-1)

    def table(self) -> Tensor:
        """(offsets, h), between 0 and 16."""
        attention: Any = self.module
        return 16 * attention.cpb_mlp(attention.relative_coords_table).view(-1, attention.num_heads).sigmoid()


@dataclass(eq=False)
class CosineBlock(WindowBlock):
    """timm's `SwinTransformerV2Block`."""

    def prompted(self, x: Tensor, prompts: Tensor, read: bool) -> tuple[Tensor, Tensor]:
        """The block on x (B, H, W, d) and prompts (B, T, d); without `read` the prompts give keys and values only."""
        block: Any = self.module
        site, state = self.attention, self.state
        count = prompts.shape[1]
        site.images, site.asking = x.shape[0], read
        if not read:
            state.aside = True
            try:
                site.prompts = entering(block.attn, prompts)
            finally:
                state.aside = False
            return self.original(x), prompts
        site.prompts = entering(block.attn, prompts)
        windows = block._attn(x)
        answers, site.answers = site.answers, None
        tokens = torch.cat([prompts, x.flatten(1, 2)], dim=1)
        told = torch.cat([answers, windows.flatten(1, 2)], dim=1)
        tokens = tokens + block.drop_path1(block.norm1(told))
        tokens = tokens + block.drop_path2(block.norm2(block.mlp(tokens)))
        return tokens[:, count:].reshape(x.shape), tokens[:, :count]


@dataclass(eq=False)
class NormedMerge(Merge):
    """Takes prompts through a patch merging that norms behind its reduction."""

    def __call__(self, x: Tensor) -> None:
        """(B, T, d) -> (B, T, 2 d)."""
        self.flow.held = self.merging.norm(self.merging.reduction(self.flow.take().repeat(1, 1, 4)))


@dataclass(frozen=True)
class CosineKinds(Kinds):
    """Of version 2."""

    def prompts(self, owner: str, module: nn.Module, block: Any) -> Prompts:
        """Keys and values of prompts of one block, which no norm stands in front of."""
        keys = Keys(nn.Identity(), block.attn)
        return Prompts(owner, module, keys.through, keys)


# what stands beside the attention reads the block's map, in which prompts are not
KINDS = CosineKinds(CosineSite, CosineBlock, NormedMerge, ("parallel",))


@dataclass(eq=False)
class CosineStream(FusedStream):
    """The way of one adapter's queries through one block."""

    def run(self, k: Tensor, v: Tensor, normed: bool, batch: int) -> Tensor:
        """Keys and values (B * W, h, N, c) -> the queries' outputs (B, T, d)."""
        block, attention = self.block, self.block.attn
        tokens = self.state.context.wide(self.module(batch), batch)
        asked = heads(attention.qkv(entering(attention, tokens)), attention.num_heads)[0]
        q = scaled(attention, asked) * asked.shape[-1] ** 0.5  # which `read` divides by
        out = read(q, F.normalize(k, dim=-1), v, batch).transpose(1, 2).flatten(2)
        tokens = tokens + block.drop_path1(block.norm1(attention.proj_drop(attention.proj(out))))
        return tokens + block.drop_path2(block.norm2(block.mlp(tokens)))


def record_queries(family: Backbone, session: Recorder, point: Point, module: nn.Module) -> None:
    """Record the ops of `point.query(module)`."""
    block: Any = family.module.get_submodule(point.path.rpartition(".")[0])
    inside = parts(module)

    def op(at: nn.Module, kind: Any, where: str, fn: Any) -> None:
        session.op(at, Op(session.owner, where, fn, point.name, verb="query", modules=inside, last=True), kind)

    stream = CosineStream(session.owner, session.site(block, BlockSite).state, block, module, point.name)
    op(block, BlockSite, "watch_input", stream.enter)
    op(block.attn.qkv, LinearSite, "watch_output", stream.catch)
    op(block.attn, CosineSite, "watch_keys", stream.catch_used)
    op(block, BlockSite, "watch_output", stream.leave)
