"""Prefixes and prompts on timm's `VisionTransformer`. See `zoo.engine.attention` for the idea.

Prompts that flow (VPT-shallow) are tokens of the sequence: put in behind the prefix tokens [cls, registers | prompts |
patches] in front of the first block, and taken out in front of the final norm, unless they take part in the pooling.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from vision.families.parts.vit_blocks import attentions
from zoo.engine.attention import FusedAttention, FusedKeys, Given, Prompts, recorder
from zoo.engine.kept import Insert, Overwrite, kept
from zoo.engine.sites import BlockSite, Site
from zoo.points import Point, TokensPoint

if TYPE_CHECKING:
    from zoo import Backbone
    from zoo.points.recorder import Recorder


def record(
    family: Backbone,
    session: Recorder,
    point: Point,
    block: nn.Module,
    verb: str,
    module: nn.Module,
    keep: bool = False,
    pooled: bool = False,
    replace: bool = False,
) -> None:
    """Record the ops of `extend` and `prompt`; see `vision.families.parts.attention.record`."""
    backbone: Any = family.module
    within = attentions(block)
    op = recorder(session, point, verb, module)
    # Where the class token alone is read, prompts leaving the last block are read by nobody.
    pooled = pooled and (backbone.global_pool != "token" or backbone.attn_pool is not None)
    if verb in ("extend", "gate"):
        op(point.module, FusedAttention, "forward", Given(module))
    elif replace:
        op(block, BlockSite, "input", Overwrite(module, *kept(session, point, backbone.blocks)), per_row=False)
    elif keep or (pooled and block is backbone.blocks[-1]):
        assert isinstance(point, TokensPoint)
        insert = Insert(module, point.num_prefix, session.site(block, BlockSite))
        op(block, BlockSite, "input", insert, per_row=False)
        if not pooled:
            op(backbone.norm, Site, "input", insert.strip, per_row=False)
    else:
        # the same prompts are keys and values of every attention that the block's tokens pass
        for norm, attention in within:
            through: tuple[Any, ...] = (norm, attention.qkv, attention.k_norm)
            project = FusedKeys(norm, attention.qkv, attention.k_norm, attention.num_heads)
            op(attention, FusedAttention, "forward", Prompts(session.owner, module, through, project))
