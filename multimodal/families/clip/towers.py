"""The two towers of an open_clip model: where their blocks are, and which module plays which role.

| tower | open_clip's class | blocks |
| --- | --- | --- |
| image | `VisionTransformer` | `visual.transformer.resblocks` |
| image | `TimmModel` around timm's `VisionTransformer` or `Eva` (tables: `zoo.families.timm_tables`) | `visual.trunk.blocks` |
| text | parts of `CLIP` itself, or a `TextTransformer` in `CustomTextCLIP` | `[text.]transformer.resblocks` |

Blocks are pre-norm, `u = x + S(Attn(LN1 x))`, `y = u + S(MLP(LN2 u))` with S a layer scale, if there is one; those of EVA-02-E
have their norms behind the branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import DataError
from zoo.families.timm_parts import stem_norms
from zoo.families.timm_tables import POST_NORM, PRE_NORM
from zoo.points import NormPoint, Point
from zoo.points.rows import Row, find, make_linear

OPEN_CLIP = (
    Row("tokens", "tokens", "tokens", ""),
    Row("norm", "norm", "norm1", "ln_1"),
    Row("linear", "q", "attn.q", "attn.in_proj", part=(0, 3)),
    Row("linear", "k", "attn.k", "attn.in_proj", part=(1, 3)),
    Row("linear", "v", "attn.v", "attn.in_proj", part=(2, 3)),
    Row("norm", "norm", "attn.q_norm", "attn.ln_q"),
    Row("norm", "norm", "attn.k_norm", "attn.ln_k"),
    Row("attention", "attn", "attn.product", "attn"),
    Row("norm", "norm", "attn.norm", "attn.ln_inner"),
    Row("linear", "o", "attn.o", "attn.out_proj"),
    Row("norm", "norm", "norm_attn", "ln_attn"),
    Row("sublayer", "attn", "attn", "attn", entry="ln_1", exit="ls_1:output"),
    Row("norm", "norm", "norm2", "ln_2"),
    Row("linear", "up", "mlp.up", "mlp.c_fc"),
    Row("norm", "norm", "mlp.norm", "mlp.ln"),
    Row("linear", "down", "mlp.down", "mlp.c_proj"),
    Row("sublayer", "mlp", "mlp", "mlp", entry="ln_2", exit="ls_2:output"),
    Row("block", "block", "", ""),
)


@dataclass(eq=False)
class Tower:
    """One tower.

    `end` is the module on whose `end_side` the tokens leave the blocks; `averaged`: all tokens take part in the pooling.
    `patch` is the patch embedding's projection and `norms` are norms outside of the blocks, as names of points with paths.
    """

    name: str
    path: str  # of the list of blocks
    blocks: Any = field(repr=False)
    table: Sequence[Row] = field(repr=False)
    dim: int
    num_prefix: int
    causal: bool
    averaged: bool
    end: nn.Module = field(repr=False)
    end_side: str
    parameter: str = ""  # path of the class token
    patch: str = ""
    embed: str = ""  # path of the embedding of words
    norms: tuple[tuple[str, str], ...] = ()  # names of points and paths
    behind: tuple[tuple[str, str], ...] = ()  # those behind the blocks
    proj: str = ""  # path of the projection to the common space, where that is a module
    timm: str = ""  # path of timm's network, if the tower is one


def half(block: Any, role: str, x: Tensor, **kwargs: Any) -> Tensor:
    """`x + S(Attn(LN1 x))`, or `x + S(MLP(LN2 x))`, of a block of either library; `kwargs`: mask, rotary table."""
    if hasattr(block, "ln_1"):
        if role == "mlp":
            return x + block.ls_2(block.mlp(block.ln_2(x)))
        hidden = block.ln_1(x)
        if hasattr(block, "ln_attn"):
            return x + block.ls_1(block.ln_attn(block.attn(hidden, **kwargs)))
        return x + block.ls_1(block.attention(q_x=hidden, **kwargs))
    from zoo.families.timm_attention import half as of_timm

    return of_timm(block, role, x, **kwargs)


def towers(module: Any) -> dict[str, Tower | str]:
    """The towers of an open_clip model by name; instead of one that is not described here the reason, in words."""
    return {"image": _image(module.visual), "text": _text(module)}


def named_outputs(module: Any, images: Tensor | None, ids: Tensor | None, want: Sequence[str]) -> dict[str, Any]:
    """`CLIPBackbone.outputs`."""
    found: dict[str, Any] = {}
    pictured = [name for name in ("pooled", "tokens", "maps") if name in want]
    if pictured and images is None:
        raise DataError(f"'{pictured[0]}' is an output of images, and none are given.")
    if pictured == ["pooled"]:
        found["pooled"] = module.encode_image(images)
    elif pictured and images is not None:
        everything = look(module.visual, images)
        found |= {name: everything[name] for name in pictured}
    if "text" in want:
        if ids is None:
            raise DataError("'text' are features of texts, and none are given.")
        found["text"] = encode_text(module, ids)
    if "scale" in want:
        scale, bias = module.logit_scale, module.logit_bias
        wide = torch.promote_types(scale.dtype, torch.float32)
        bias = scale.new_zeros(()) if bias is None else bias
        found["scale"] = torch.stack([scale.exp().to(wide).reshape(()), bias.to(wide).reshape(())])
    return found


def encode_text(module: Any, ids: Tensor) -> Tensor:
    """Token ids (n, L) -> (n, d): the library's `encode_text`, and the same for texts without their last columns (`length`)."""
    text = getattr(module, "text", module)
    if ids.shape[1] == module.context_length or reads_all(module):
        return module.encode_text(ids)  # type: ignore[no-any-return]
    from open_clip.transformer import text_global_pool

    length, dtype = ids.shape[1], text.transformer.get_cast_dtype()
    x = text.token_embedding(ids).to(dtype) + text.positional_embedding[:length].to(dtype)
    x = text.ln_final(text.transformer(x, attn_mask=text.attn_mask[:length, :length]))
    pooling, end = _pooling(module)
    x = text_global_pool(x, ids, pooling, eos_token_id=end)
    projection = text.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection  # type: ignore[no-any-return]


def length(module: Any, ids: Tensor) -> int:
    """Columns of token ids (n, L) that the embeddings depend on: in a causal tower that reads the ends, up to the last end."""
    if reads_all(module):
        return ids.shape[1]
    pooling, end = _pooling(module)
    ends = ids.argmax(1) if pooling == "argmax" else torch.eq(ids, -1 if end is None else end).int().argmax(1)
    return int(ends.max()) + 1


def reads_all(module: Any) -> bool:
    """Whether the embedding of a text depends on what fills the context behind its end."""
    text = getattr(module, "text", module)
    masked = getattr(text, "attn_mask", None) is None or getattr(text, "use_pad_mask", False)
    return masked or _pooling(module)[0] not in ("argmax", "eos")


def _pooling(module: Any) -> tuple[str, int | None]:
    """How the text tower pools, and the id of the end, where it has one."""
    text = getattr(module, "text", None)
    if text is None:
        return module.text_pool_type, getattr(module, "text_eos_id", None)
    return getattr(text, "pool_type", ""), getattr(text, "eos_id", None)


def look(visual: Any, images: Tensor) -> dict[str, Any]:
    """ "pooled" (B, d), "tokens" (B, N, width) and "maps" [(B, width, H, W)] of an image tower.

    Tokens are those behind the final norm, or of the last block, where that norm stands behind the pooling.
    """
    trunk = getattr(visual, "trunk", None)
    if trunk is not None:
        tokens = trunk.forward_features(images)
        pooled = visual.head(trunk.forward_head(tokens))
        grid = trunk.patch_embed.dynamic_feat_size(images.shape[-2:])
    else:
        tokens = visual.transformer(visual._embeds(images))
        if visual.attn_pool is None and not visual.final_ln_after_pool:
            tokens = visual.ln_post(tokens)
            pooled = visual._global_pool(tokens)[0]
        else:
            pooled = visual._pool(tokens)[0]
        pooled = pooled if visual.proj is None else pooled @ visual.proj
        grid = visual.grid_size
    patches = tokens[:, tokens.shape[1] - grid[0] * grid[1] :]
    maps = [patches.transpose(1, 2).unflatten(2, tuple(grid))]
    return {"pooled": pooled, "tokens": tokens, "maps": maps}


def _blocks_reason(blocks: Any, *classes: type) -> str:
    odd = next((type(b).__name__ for b in blocks if not isinstance(b, classes)), None)
    return (
        "" if odd is None else f"is built of {odd}, and {' and '.join(c.__name__ for c in classes)} are described here"
    )


def _image(visual: Any) -> Tower | str:
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import CustomResidualAttentionBlock, ResidualAttentionBlock, VisionTransformer

    if isinstance(visual, TimmModel):
        return _timm(visual)
    if not isinstance(visual, VisionTransformer):
        return f"is a {type(visual).__name__}, and no vision transformer"
    stack = visual.transformer
    if reason := _blocks_reason(stack.resblocks, ResidualAttentionBlock, CustomResidualAttentionBlock):
        return reason
    return Tower(
        name="image",
        path="visual.transformer.resblocks",
        blocks=stack.resblocks,
        table=OPEN_CLIP,
        dim=visual.conv1.out_channels,
        num_prefix=1,
        causal=False,
        averaged=visual.pool_type != "tok" or visual.attn_pool is not None,
        end=stack,
        end_side="output",
        parameter="visual.class_embedding",
        patch="visual.conv1",
        norms=(("norm_pre", "visual.ln_pre"),),
        behind=(("norm", "visual.ln_post"),),
    )


def _timm(visual: Any) -> Tower | str:
    from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm
    from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer

    trunk = visual.trunk
    if not isinstance(trunk, (VisionTransformer, Eva)):
        return f"is timm's {type(trunk).__name__}, and no vision transformer that is described here"
    behind = (EvaBlockPostNorm, ResPostBlock)
    if reason := _blocks_reason(trunk.blocks, Block, EvaBlock, *behind):
        return reason
    return Tower(
        name="image",
        path="visual.trunk.blocks",
        blocks=trunk.blocks,
        table=POST_NORM if isinstance(trunk.blocks[0], behind) else PRE_NORM,
        dim=trunk.embed_dim,
        num_prefix=trunk.num_prefix_tokens,
        causal=False,
        averaged=trunk.global_pool != "token" or getattr(trunk, "attn_pool", None) is not None,
        end=trunk.norm,
        end_side="input",
        parameter="visual.trunk.cls_token" if getattr(trunk, "cls_token", None) is not None else "",
        patch="visual.trunk.patch_embed.proj",
        norms=(("patch_embed.norm", "visual.trunk.patch_embed.norm"), ("norm_pre", "visual.trunk.norm_pre")),
        behind=(("norm", "visual.trunk.norm"), ("fc_norm", "visual.trunk.fc_norm")),
        proj="visual.head.proj" if hasattr(visual.head, "proj") else "visual.trunk.head",
        timm="visual.trunk",
    )


def _text(module: Any) -> Tower | str:
    from open_clip.transformer import CustomResidualAttentionBlock, ResidualAttentionBlock, TextTransformer

    inner = getattr(module, "text", None)
    if inner is not None and not isinstance(inner, TextTransformer):
        return f"is a {type(inner).__name__}, and the text towers described here are open_clip's own"
    text, prefix = (module, "") if inner is None else (inner, "text.")
    stack = text.transformer
    if reason := _blocks_reason(stack.resblocks, ResidualAttentionBlock, CustomResidualAttentionBlock):
        return reason
    if getattr(text, "cls_emb", None) is not None:
        return "has a token of its own behind the words"
    return Tower(
        name="text",
        path=f"{prefix}transformer.resblocks",
        blocks=stack.resblocks,
        table=OPEN_CLIP,
        dim=stack.width,
        num_prefix=1,
        causal=text.attn_mask is not None,
        averaged=False,
        end=stack,
        end_side="output",
        embed=f"{prefix}token_embedding",
        behind=(("norm", f"{prefix}ln_final"),),
        proj=f"{prefix}text_projection",
    )


def linear_points(backbone: nn.Module, tower: Tower, name: str, role: str, path: str) -> list[Point]:
    """The point of a projection outside of the blocks, if it is there."""
    module = find(backbone, path) if path else None
    if module is None:
        return []
    common = {"name": f"{tower.name}.{name}", "role": role, "path": path, "module": module, "tower": tower.name}
    point = make_linear(module, None, "", 0, common)
    return [] if point is None else [point]


def norm_points(backbone: nn.Module, tower: Tower, places: Sequence[tuple[str, str]]) -> list[Point]:
    """The points of norms outside of the blocks, (name, path), of those that are there, and of a convolutional stem."""
    found: list[Point] = []
    if tower.timm and places is tower.norms:
        stem = "patch_embed.backbone"
        found += stem_norms(backbone, f"{tower.timm}.{stem}", f"{tower.name}.{stem}", tower=tower.name)
    for name, path in places:
        norm = find(backbone, path)
        weight = getattr(norm, "weight", None)
        if norm is not None and isinstance(weight, Tensor):
            common: Any = {"name": f"{tower.name}.{name}", "role": "norm", "path": path, "module": norm}
            found.append(NormPoint(**common, tower=tower.name, dim_in=len(weight), dim_out=len(weight)))
    return found
