"""timm's attentions with rotary positions (EVA, DINOv3, Perception Encoder) or relative ones (BEiT): more keys, and prompts.

    q, k, v = W_q x + b_q, W_k x, W_v x + b_v       (B, h, N, c); norms of q and k, if any
    q, k    = R q, R k                              R turns the places of the grid; class, register and prompt tokens stay
    y       = softmax([q K^T, q k^T + bias] / sqrt(c)) [V; v]

Prefixes and prompts of one block (K, V) are not turned, as a class token is not, and have no relative bias. Prompts that flow
stand behind the prefix tokens; the rotary table says how many places the grid has, so all tokens in front of these are prefix
tokens, however many (timm counts them in `num_prefix_tokens` of the model and of every attention; ours does not need that). Where
queries share keys (`num_kv_heads`), extra keys belong to each query's head.

Blocks of all kinds here are `u = x + S(Attn(LN1 x))`, `y = u + S(MLP(LN2 u))`, or with the norms behind the branches,
`u = x + S(LN1 Attn(x))`; S is a layer scale and stochastic depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention, AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from zoo.engine.attention import (
    AttentionSite,
    FusedAttention,
    Given,
    Pair,
    Prompts,
    by_head,
    heads,
    mask_bias,
    recorder,
)
from zoo.engine.kept import Insert, Overwrite, kept
from zoo.engine.memory import recomputable
from zoo.engine.sites import BlockSite, Op, Site, site_at
from zoo.errors import AttachError
from zoo.families.timm_biases import OpenBeitAttention, OpenEvaAttention
from zoo.points import Point, TokensPoint

if TYPE_CHECKING:
    from zoo.points.recorder import Recorder

POST_NORM = ("EvaBlockPostNorm", "ResPostBlock", "SwinTransformerV2Block")  # norms behind the branches


# -- blocks -----------------------------------------------------------------------------------------------------------


def norm_in_front(block: Any) -> nn.Module:
    """What a block's tokens pass in front of its attention."""
    return nn.Identity() if type(block).__name__ in POST_NORM else block.norm1


def half(block: Any, role: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A block's attention or MLP with its residual sum; the further arguments are those of the attention."""
    if role == "attn":
        return attended(block, x, block.attn(norm_in_front(block)(x), *args, **kwargs))
    return joined(block, "2", x, block.mlp(x if type(block).__name__ in POST_NORM else block.norm2(x)))


def attended(block: Any, x: Tensor, y: Tensor) -> Tensor:
    """Tokens x with what their attention says, y."""
    return joined(block, "1", x, y)


def joined(block: Any, number: str, x: Tensor, y: Tensor) -> Tensor:
    """x + S(y), or x + S(LN y)."""
    if type(block).__name__ in POST_NORM:
        y = getattr(block, f"norm{number}")(y)
    gamma, scale = getattr(block, f"gamma_{number}", None), getattr(block, f"ls{number}", None)
    y = y if gamma is None else gamma * y
    y = y if scale is None else scale(y)
    return x + getattr(block, f"drop_path{number}")(y)  # type: ignore[no-any-return]


# -- attentions -------------------------------------------------------------------------------------------------------


def entering(attention: nn.Module, x: Tensor) -> Tensor:
    """Tokens that reach an attention by another way than its call, with what adapters do to its input."""
    site = site_at(attention)
    for op in () if site is None else site.inputs:
        if op.where == "input":
            x = site._apply(op, x)  # type: ignore[union-attr]
    return x


def project(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, N, d) -> q, k, v (B, h, N, c), normed and not turned; where queries share keys these have fewer heads."""
    if attention.qkv is not None:
        q, k, v = heads(attention.qkv(x), attention.num_heads)
    else:
        width = attention.head_dim
        q, k, v = (by_head(part(x), width) for part in (attention.q_proj, attention.k_proj, attention.v_proj))
    return _normed(attention, "q_norm", q), _normed(attention, "k_norm", k), v


def _normed(attention: Any, name: str, x: Tensor) -> Tensor:
    norm = attention._modules.get(name)  # BEiT has none
    return x if norm is None else norm(x)


def for_each_head(attention: Any, *tensors: Tensor) -> list[Tensor]:
    """Keys and values that queries share, once for each head of these."""
    groups = getattr(attention, "num_kv_groups", 1)
    return [t if groups == 1 else t.repeat_interleave(groups, dim=1) for t in tensors]


def turned(attention: Any, x: Tensor, rope: Tensor) -> Tensor:
    """x (B, h, N, c) with the last places turned by the table (..., places, 2 c)."""
    first = x.shape[2] - rope.shape[-2]
    moved = apply_rot_embed_cat(x[:, :, first:], rope, half=getattr(attention, "rotate_half", False))
    return torch.cat([x[:, :, :first], moved], dim=2)


def finish(attention: Any, y: Tensor, gate: Tensor | None) -> Tensor:
    """y (B, h, N, c) -> (B, N, d)."""
    y = _normed(attention, "norm", y.transpose(1, 2).flatten(2))
    y = y if gate is None else y * gate
    return attention.proj_drop(attention.proj(y))  # type: ignore[no-any-return]


def gate_of(attention: Any, x: Tensor) -> Tensor | None:
    """What the attention's output is multiplied by, (B, N, h c); None: nothing."""
    gate = attention._modules.get("gate")
    return None if gate is None else gate(x).sigmoid()


@dataclass(eq=False)
class Keys:
    """norm -> projections -> keys and values of tokens that exist in one block only (`Prompts.project`)."""

    norm: nn.Module
    attention: nn.Module

    @property
    def through(self) -> tuple[nn.Module, ...]:
        """The modules on the way; the attention itself holds biases."""
        names = ("qkv", "k_proj", "v_proj", "k_norm")
        parts = (self.attention._modules.get(name) for name in names)
        return (self.norm, *(part for part in parts if part is not None), self.attention)

    def __call__(self, tokens: Tensor) -> Pair:
        """(n, T, d) -> two of (n, h, T, c)."""
        _, k, v = project(self.attention, entering(self.attention, self.norm(tokens)))
        k, v = for_each_head(self.attention, k, v)
        # copies without the queries, so that the storage which backward keeps holds no more than keys and values
        return k.contiguous(), v.contiguous()


@dataclass(eq=False)
class ReadableSite(AttentionSite):
    """An attention that shows its keys and values to those who only read them ("read")."""

    def show(self, k: Tensor, v: Tensor) -> None:
        """k, v (B, h, N, c), as the product takes them."""
        state = self.state
        for op in self.forwards:
            if op.verb != "read" or state.aside or state.serving not in (None, op.owner):
                continue
            alone = state.route is None or state.serving is not None
            rows = None if alone else state.rows(op.owner, k.shape[0])
            op.fn(*(t if rows is None else t.index_select(0, rows) for t in (k, v)))


@dataclass(eq=False)
class RotarySite(ReadableSite):
    """timm's `EvaAttention` and `AttentionRope`, extended."""

    def extended(  # type: ignore[override]
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """x (B, N, d) -> (B, N, d). Extra keys are seen by every query, masked or not."""
        attention: Any = self.module
        gate = gate_of(attention, x)
        q, k, v = project(attention, x)
        if rope is not None:
            q, k = (turned(attention, t, rope).type_as(v) for t in (q, k))
        k, v = for_each_head(attention, k, v)
        if is_causal:
            attn_mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        self.show(k, v)
        return finish(attention, self.attend(q, k, v, x.shape[0], mask_bias(attn_mask)), gate)


def relative_bias(
    table: Tensor | None, index: Tensor | None, shared: Tensor | None, dtype: torch.dtype, extra: int, tokens: int
) -> Tensor:
    """What BEiT adds to the scores: (1, h, tokens, extra + tokens), zero for extra keys and for prompts behind the class token.

    table (offsets, h) and index (N, N) are the attention's own; shared ([1,] h, N, N) is that of all blocks.
    """
    own = 0 if table is None or index is None else _offsets(table, index)
    bias = own if shared is None else own + shared
    assert isinstance(bias, Tensor)
    flowing = tokens - bias.shape[-1]
    if flowing:
        for _ in range(2):  # columns, then rows
            bias = torch.cat([bias[..., :1], bias.new_zeros(*bias.shape[:-1], flowing), bias[..., 1:]], dim=-1)
            bias = bias.transpose(-2, -1)
    return F.pad(bias, (extra, 0)).to(dtype)


def _offsets(table: Tensor, index: Tensor) -> Tensor:
    return table[index.flatten()].unflatten(0, index.shape).permute(2, 0, 1).contiguous()[None]


@dataclass(eq=False)
class RelativeSite(ReadableSite):
    """timm's attention of BEiT, extended."""

    def extended(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """x (B, N, d) -> (B, N, d)."""
        attention: Any = self.module
        table, index = attention.relative_position_bias_table, attention.relative_position_index
        q, k, v = project(attention, x)

        def bias(extra: int, images: int, which: Tensor | None) -> Tensor | None:
            if table is None and shared_rel_pos_bias is None:
                return None
            place = (table, index, shared_rel_pos_bias, q.dtype, extra, x.shape[1])
            return recomputable(relative_bias, *place, constant=True)

        self.show(k, v)
        return finish(attention, self.attend(q, k, v, x.shape[0], bias), None)


KINDS: dict[type[nn.Module], type[AttentionSite]] = {
    Attention: FusedAttention,
    AttentionRope: RotarySite,
    EvaAttention: RotarySite,
    OpenEvaAttention: RotarySite,
    BeitAttention: RelativeSite,
    OpenBeitAttention: RelativeSite,
}


def kind_of(point: Point, attention: nn.Module) -> type[AttentionSite]:
    """The site that extends an attention.

    Raises:
        AttachError: an attention of a class that is not described here.
    """
    if type(attention) not in KINDS:
        described = ", ".join(sorted({cls.__name__ for cls in KINDS if not cls.__name__.startswith("Open")}))
        raise AttachError(
            f"the attention at '{point.name}' is a {type(attention).__name__}; more keys and values are described for timm's "
            f"{described}. Use a backbone with one of these, or leave the point out of the targets."
        )
    return KINDS[type(attention)]


def record(
    session: Recorder,
    point: Point,
    verb: str,
    module: nn.Module,
    blocks: Sequence[Any],
    end: nn.Module,
    averaged: bool,
    keep: bool = False,
    pooled: bool = False,
    replace: bool = False,
) -> None:
    """Record the ops of `point.extend(module)`, `gate` and `prompt` in a sequence of `blocks`.

    `end` is the module whose input are the tokens that leave the blocks; `averaged`: more than one token is read there.

    Raises:
        AttachError: an attention that is not described here.
    """
    assert point.block is not None
    block = blocks[point.block]
    attention = block.attn
    op = recorder(session, point, verb, module)
    # Where the class token alone is read, prompts that leave the last block are read by nobody.
    pooled = pooled and averaged
    kind = kind_of(point, attention)
    if verb in ("extend", "gate"):
        op(attention, kind, "forward", Given(module))
    elif replace:
        op(block, BlockSite, "input", Overwrite(module, *kept(session, point, blocks)), per_row=False)
    elif keep or (pooled and block is blocks[-1]):
        assert isinstance(point, TokensPoint)
        insert = Insert(module, point.num_prefix, session.site(block, BlockSite))
        op(block, BlockSite, "input", insert, per_row=False)
        for each in blocks[
            point.block :
        ]:  # timm counts prefix tokens, and knows relative positions for the image's alone
            if kind is not FusedAttention:
                op(each.attn, kind_of(point, each.attn), "forward", None, "flow", per_row=False)
        if not pooled:
            op(end, Site, "input", insert.strip, per_row=False)
    else:
        project = Keys(norm_in_front(block), attention)
        op(attention, kind, "forward", Prompts(session.owner, module, project.through, project))


def read_keys(session: Recorder, point: Point, parts: tuple[nn.Module, ...], fn: Any) -> None:
    """Record that `fn(k, v)` sees the keys and values (B, h, N, c) of an attention, as its product takes them."""
    attention = point.module
    made = Op(session.owner, "forward", fn, point.name, verb="read", modules=parts)
    session.op(attention, made, kind_of(point, attention))
