"""The kinds of blocks of timm's `VisionTransformer` beside its pre-norm `Block`: their tables, halves and attentions.

| block | function |
| --- | --- |
| `ResPostBlock` | `u = x + DP(LN1 Attn(x))`, `y = u + DP(LN2 MLP(u))`: norms behind the branches |
| `ParallelThingsBlock` | `u = x + sum_i Attn_i(LN_i x)`, `y = u + sum_i MLP_i(LN'_i u)` |
| `ParallelScalingBlock` | `y = x + DP(LS(Attn(h) + MLP(h)))`, `h = LN x`; up, q, k and v are one projection |
| `DiffParallelScalingBlock` | the same with differential attention |

The last two have one sublayer, `mlp`, which is attention and MLP together, and no attention that is a module of its own:
prompts that flow can be put in, prefixes and prompts of one block cannot.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.layers.diff_attention import DiffAttention
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from torch import Tensor, nn

from zoo.errors import AttachError
from zoo.families.children import mixes
from zoo.points import LinearPoint, Point
from zoo.points.rows import Row, make_linear

__all__ = ["KINDS", "PRE_NORM", "attentions", "half", "points_of"]

KINDS = (Block, ResPostBlock, ParallelThingsBlock, ParallelScalingBlock, DiffParallelScalingBlock)


def _mlp(name: str, path: str) -> tuple[Row, ...]:
    """Projections and norms of timm's `Mlp`, `GluMlp` (both halves in `up`), `SwiGLU` and ViTamin's `GeGluMlp`."""
    return (
        Row("norm", "norm", f"{name}.norm", f"{path}.norm"),
        Row("linear", "up", f"{name}.up", f"{path}.fc1"),
        Row("linear", "gate", f"{name}.gate", f"{path}.fc1_g"),
        Row("linear", "up", f"{name}.up", f"{path}.fc1_x"),
        Row("linear", "gate", f"{name}.gate", f"{path}.w0"),
        Row("linear", "up", f"{name}.up", f"{path}.w1"),
        Row("linear", "down", f"{name}.down", f"{path}.fc2"),
        Row("linear", "down", f"{name}.down", f"{path}.w2"),
    )


def _attention(name: str, path: str) -> tuple[Row, ...]:
    """Projections, norms and product of timm's `Attention` and `DiffAttention`."""
    return (
        Row("linear", "q", f"{name}.q", f"{path}.qkv", part=(0, 3)),
        Row("linear", "k", f"{name}.k", f"{path}.qkv", part=(1, 3)),
        Row("linear", "v", f"{name}.v", f"{path}.qkv", part=(2, 3)),
        Row("norm", "norm", f"{name}.q_norm", f"{path}.q_norm"),
        Row("norm", "norm", f"{name}.k_norm", f"{path}.k_norm"),
        Row("attention", "attn", f"{name}.product", path),
        Row("norm", "norm", f"{name}.sub_norm", f"{path}.sub_norm"),
        Row("norm", "norm", f"{name}.norm", f"{path}.norm"),
        Row("linear", "gate", f"{name}.gate", f"{path}.gate"),
        Row("linear", "o", f"{name}.o", f"{path}.proj"),
    )


ATTENTION = _attention("attn", "attn")
MLP = _mlp("mlp", "mlp")
TOKENS = Row("tokens", "tokens", "tokens", "")
BLOCK = Row("block", "block", "", "")

PRE_NORM = (
    TOKENS,
    Row("norm", "norm", "norm1", "norm1"),
    *ATTENTION,
    Row("sublayer", "attn", "attn", "attn", entry="norm1", exit="drop_path1"),
    Row("norm", "norm", "norm2", "norm2"),
    *MLP,
    Row("sublayer", "mlp", "mlp", "mlp", entry="norm2", exit="drop_path2"),
    BLOCK,
)
WITHOUT_ATTENTION = PRE_NORM[1:]  # no tokens see prompts there
POST_NORM = (
    TOKENS,
    *ATTENTION,
    Row("sublayer", "attn", "attn", "attn", entry="attn:input", exit="norm1:input"),
    Row("norm", "norm", "norm1", "norm1"),
    *MLP,
    Row("sublayer", "mlp", "mlp", "mlp", entry="mlp:input", exit="norm2:input"),
    Row("norm", "norm", "norm2", "norm2"),
    BLOCK,
)
SIDE_BY_SIDE = (
    TOKENS,
    Row("norm", "norm", "norm", "in_norm"),
    Row("norm", "norm", "attn.q_norm", "q_norm"),
    Row("norm", "norm", "attn.k_norm", "k_norm"),
    Row("norm", "norm", "attn.sub_norm", "sub_norm"),
    Row("linear", "o", "attn.o", "attn_out_proj"),
    Row("linear", "down", "mlp.down", "mlp_out_proj"),
    Row("linear", "out", "mlp.out", "out_proj"),  # of both together
    Row("sublayer", "mlp", "mlp", "", entry="in_norm", exit="drop_path"),
    BLOCK,
)


def _things(count: int) -> tuple[Row, ...]:
    rows: list[Row] = [TOKENS]
    for i in range(count):
        name, path = f"attn{i}", f"attns.{i}"
        rows += [Row("norm", "norm", f"{name}.norm_in", f"{path}.norm"), *_attention(name, f"{path}.attn")]
        rows.append(Row("sublayer", "attn", name, f"{path}.attn", entry=f"{path}.norm", exit=f"{path}.drop_path"))
    for i in range(count):
        name, path = f"mlp{i}", f"ffns.{i}"
        rows += [Row("norm", "norm", f"{name}.norm_in", f"{path}.norm"), *_mlp(name, f"{path}.mlp")]
        rows.append(Row("sublayer", "mlp", name, f"{path}.mlp", entry=f"{path}.norm", exit=f"{path}.drop_path"))
    return (*rows, BLOCK)


def table_of(block: Any) -> Sequence[Row]:
    """The table of a block of any of these kinds."""
    if isinstance(block, ParallelThingsBlock):
        return _things(block.num_parallel)
    if isinstance(block, (ParallelScalingBlock, DiffParallelScalingBlock)):
        return SIDE_BY_SIDE
    if isinstance(block, Block) and not mixes(block.attn):
        return WITHOUT_ATTENTION
    return POST_NORM if isinstance(block, ResPostBlock) else PRE_NORM


def attentions(block: Any) -> list[tuple[nn.Module, Any]]:
    """The attentions of a block, each with the norm that its tokens pass in front of it; none if they are no modules."""
    if isinstance(block, ParallelThingsBlock):
        parts: Any = block.attns
        return [(each.norm, each.attn) for each in parts]
    if isinstance(block, ResPostBlock):
        return [(nn.Identity(), block.attn)]
    return [(block.norm1, block.attn)] if isinstance(block, Block) and mixes(block.attn) else []


def flows(block: Any, options: dict[str, Any]) -> bool:
    """Whether prompts with these options can be put into a block of one of these kinds: kept ones always, those of one block
    alone where its attentions are timm's `Attention`."""
    inside = attentions(block)
    plain = bool(inside) and all(type(attention) in (Attention, DiffAttention) for _, attention in inside)
    return isinstance(block, KINDS) and (plain or bool(options.get("keep")))


def heads_of(block: Any) -> tuple[int, int]:
    """Number of heads, and the width of one in keys and values together (differential attention has two halves of it)."""
    inner = next((attention for _, attention in attentions(block)), block)
    if not hasattr(inner, "num_heads"):  # what stands in place of its attention has none
        return 1, 1
    return inner.num_heads, inner.head_dim * (2 if hasattr(inner, "sub_norm") else 1)


def in_parts(block: Any, prefix: str, path: str, place: dict[str, Any]) -> list[LinearPoint]:
    """The slices of the one projection of a block whose attention and MLP stand side by side: up, q, k and v."""
    if not isinstance(block, (ParallelScalingBlock, DiffParallelScalingBlock)):
        return []
    found: list[LinearPoint] = []
    heads, start, fused = block.num_heads, 0, f"{prefix}.in_proj"
    for size, (role, name) in zip(block.in_split, (("up", "mlp.up"), *((r, f"attn.{r}") for r in "qkv"))):
        common = {"name": f"{prefix}.{name}", "role": role, "path": f"{path}.in_proj", "module": block.in_proj, **place}
        whole = make_linear(block.in_proj, None, "", heads, common)
        assert whole is not None
        found.append(
            dataclasses.replace(whole, dim_out=int(size), start=int(start), stop=int(start + size), fused=fused)
        )
        start += size
    return found


def points_of(family: Any, block: Any, prefix: str, path: str, /, **place: Any) -> list[Point]:
    """All points of a block, in forward order; `place` as for `Backbone.points_of_block`."""
    heads, width = heads_of(block)
    found = family.points_of_block(
        block,
        prefix,
        path,
        int(family.module.embed_dim),
        heads,
        table=table_of(block),
        attention={"head_dim": width},
        **place,
    )
    parts = in_parts(block, prefix, path, {k: v for k, v in place.items() if k != "tokens"})
    at = next((i for i, p in enumerate(found) if p.kind == "linear"), 0)
    return [*found[:at], *parts, *found[at:]]


def half(block: Any, role: str, x: Tensor, **kwargs: Any) -> Tensor:
    """One half of a block with its residual sum; `kwargs`: the mask of the attention.

    Raises:
        AttachError: attention and MLP stand side by side.
    """
    if isinstance(block, (ParallelScalingBlock, DiffParallelScalingBlock)):
        raise AttachError(
            f"attention and MLP of a {type(block).__name__} stand side by side: it does not come in halves."
        )
    if isinstance(block, ParallelThingsBlock):
        if role == "attn":
            each = [a.drop_path(a.ls(a.attn(a.norm(x), **kwargs))) for a in block.attns]  # type: ignore[operator,union-attr]
        else:
            each = [f(x) for f in block.ffns]
        return x + torch.stack(each).sum(dim=0)
    if isinstance(block, ResPostBlock):
        if role == "attn":
            return x + block.drop_path1(block.norm1(block.attn(x, **kwargs)))
        return x + block.drop_path2(block.norm2(block.mlp(x)))
    if role == "attn":
        return x + block.drop_path1(block.ls1(block.attn(block.norm1(x), **kwargs)))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
