"""Prefixes and prompts on timm's `VisionTransformer`. See `zoo.attention` for the idea.

Prompts that flow (VPT-shallow) are tokens of the sequence: put in behind the prefix tokens [cls, registers | prompts |
patches] in front of the first block, and taken out in front of the final norm, unless they take part in the pooling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention import AttentionSite, FusedKeys, Given, Insert, Prompts, heads, parts
from zoo.points import Point, TokensPoint
from zoo.sites import BlockSite, Op, Site

if TYPE_CHECKING:
    from vision.timm_family import TimmBackbone
    from zoo.session import Session


@dataclass(eq=False)
class ViTAttention(AttentionSite):
    """timm's `Attention`, with extra keys and values."""

    def extended(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x (B, N, d) -> (B, N, d). Extra keys are seen by every query, masked or not."""
        attention: Any = self.module
        batch, tokens, _ = x.shape
        gate = getattr(attention, "gate", None)
        gate = None if gate is None else gate(x).sigmoid()
        q, k, v = heads(attention.qkv(x), attention.num_heads)
        q, k = attention.q_norm(q), attention.k_norm(k)

        def bias(extra: int, images: int, index: Tensor | None) -> Tensor | None:
            mask = attn_mask
            if is_causal:
                mask = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()
            if mask is None:
                return None
            if index is not None and mask.dim() == 4 and len(mask) > 1:
                mask = mask.index_select(0, index)
            return F.pad(mask, (extra, 0), value=mask.dtype == torch.bool)

        y = self.attend(q, k, v, batch, bias).transpose(1, 2).flatten(2)
        y = attention.norm(y)
        y = y if gate is None else y * gate
        return attention.proj_drop(attention.proj(y))


def record(
    family: TimmBackbone,
    session: Session,
    point: Point,
    block: nn.Module,
    verb: str,
    module: nn.Module,
    keep: bool = False,
    pooled: bool = False,
) -> None:
    """Record the ops of `extend` and `prompt`; see `vision.attention.record`."""
    attention: Any = block.attn
    backbone: Any = family.module

    def op(site_module: nn.Module, kind: type[Site], where: str, fn: Any, per_row: bool) -> None:
        made = Op(session.owner, where, fn, point.name, verb=verb, modules=parts(module), per_row=per_row)
        session.op(site_module, made, kind)

    # Where the class token alone is read, prompts leaving the last block are read by nobody.
    pooled = pooled and (backbone.global_pool != "token" or backbone.attn_pool is not None)
    if verb == "extend":
        op(attention, ViTAttention, "forward", Given(module), per_row=True)
    elif keep or (pooled and block is backbone.blocks[-1]):
        assert isinstance(point, TokensPoint)
        insert = Insert(module, point.num_prefix, session.site(block, BlockSite))
        op(block, BlockSite, "input", insert, per_row=False)
        if not pooled:
            op(backbone.norm, Site, "input", insert.strip, per_row=False)
    else:
        through: tuple[Any, ...] = (block.norm1, attention.qkv, attention.k_norm)
        project = FusedKeys(block.norm1, attention.qkv, attention.k_norm, attention.num_heads)  # type: ignore[arg-type]
        op(attention, ViTAttention, "forward", Prompts(session.owner, module, through, project), per_row=True)
