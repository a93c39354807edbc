"""Prefixes and prompts on timm's `VisionTransformer`. See `zoo.engine.attention` for the idea.

Prompts that flow (VPT-shallow) are tokens of the sequence: put in behind the prefix tokens [cls, registers | prompts |
patches] in front of the first block, and taken out in front of the final norm, unless they take part in the pooling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from timm.layers.diff_attention import DiffAttention
from torch import Tensor, nn

from vision.families.parts.vit_blocks import attentions
from zoo.engine.attention import FusedAttention, FusedKeys, Given, Pair, Prompts, heads, mask_bias, recorder
from zoo.engine.kept import Insert, Overwrite, kept
from zoo.engine.sites import BlockSite, Site
from zoo.errors import AttachError
from zoo.points import Point, TokensPoint

if TYPE_CHECKING:
    from zoo import Backbone
    from zoo.points.recorder import Recorder


def halved(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm of half heads on (B, h, N, 2 c)."""
    return norm(x.unflatten(-1, (2, -1))).flatten(-2)  # type: ignore[no-any-return]


class HalvedKeys(FusedKeys):
    """Keys whose halves belong to the two softmaxes."""

    def __call__(self, tokens: Tensor) -> Pair:
        """(n, T, d) -> two of (n, h, T, 2 c)."""
        _, k, v = heads(self.qkv(self.norm(tokens)), self.num_heads)
        return halved(self.k_norm, k), v.contiguous()


@dataclass(eq=False)
class DifferentialAttention(FusedAttention):
    """timm's `DiffAttention`, `softmax(q1 k1) v - lambda softmax(q2 k2) v` on halves of each head, with more keys."""

    def extended(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x (B, N, d) -> (B, N, d). Extra keys are seen by every query, masked or not."""
        attention: Any = self.module
        batch, tokens, _ = x.shape
        q, k, v = heads(attention.qkv(x), attention.num_heads)
        q, k = halved(attention.q_norm, q), halved(attention.k_norm, k)
        if is_causal:
            attn_mask = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()
        y = self.attend(q, k, v, batch, mask_bias(attn_mask))
        y = (attention.sub_norm(y) * (1 - attention.lambda_init)).transpose(1, 2).flatten(2)
        return attention.proj_drop(attention.proj(attention.norm(y)))  # type: ignore[no-any-return]

    def _product(self, q: Tensor, k: Tensor, v: Tensor, own: Tensor, *more: Any) -> Tensor:
        (q1, q2), (k1, k2) = q.chunk(2, dim=-1), k.chunk(2, dim=-1)
        share = self.module._compute_lambda().type_as(q)  # type: ignore[operator]
        return super()._product(q1, k1, v, own, *more) - share * super()._product(q2, k2, v, own, *more)


def site_of(attention: nn.Module) -> type[FusedAttention]:
    """The site at an attention of this library's."""
    return DifferentialAttention if isinstance(attention, DiffAttention) else FusedAttention


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
        kind = site_of(point.module)
        if kind is DifferentialAttention and (verb == "gate" or getattr(module, "compensate", False)):
            raise AttachError(
                f"the attention at '{point.name}' is the difference of two: a softmax of its own beside them is not defined. Use "
                "a backbone with timm's Attention, or keys that share the softmax of all (prefix)."
            )
        op(point.module, kind, "forward", Given(module))
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
            kind, keys = site_of(attention), FusedKeys
            if kind is DifferentialAttention:
                keys = HalvedKeys
            project = keys(norm, attention.qkv, attention.k_norm, attention.num_heads)
            op(attention, kind, "forward", Prompts(session.owner, module, through, project))
