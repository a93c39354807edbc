"""Rows of a family's table: which module path of a block plays which role, and the points that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from zoo.points.foreign import is_packed
from zoo.points.kinds import (
    AttentionPoint,
    BlockPoint,
    ConditionPoint,
    LinearPoint,
    NormPoint,
    SublayerPoint,
    TokensPoint,
)
from zoo.points.point import Point


@dataclass(frozen=True)
class Row:
    """One line of a family's table, for one block.

    `name` is the point's name inside the block ("" for the block itself) and `path` the library's module path inside it.
    `part=(i, n)` makes a linear point the i-th of n equal slices of a fused projection. `entry` and `exit` are a sublayer's
    modules: the output of `entry` is the branch's input, the input of `exit` is its output before the residual sum. Where a
    library has no such modules, "path:input" and "path:output" name the other side of one (`entry="attn:input"`). `stream` is
    the module whose input is the residual stream in front of the branch, where that is not the entry. `bias` is the attribute of
    the projection's parent that holds the bias of this slice alone, where a library keeps it there. `inner` is the module whose
    input is a branch's alone, where its entry is the residual stream of the whole block (":input"). `unmergeable` says why no
    change of a branch's input can be folded into what reads it: others read by the same projections, say.
    """

    kind: str
    role: str
    name: str
    path: str
    part: tuple[int, int] | None = None
    entry: str = ""
    exit: str = ""
    stream: str = ""
    bias: str = ""
    inner: str = ""
    unmergeable: str = ""


def find(module: nn.Module, path: str) -> nn.Module | None:
    """The submodule at a dotted path, or None; an `nn.Identity` counts as absent."""
    node: Any = module
    for part in path.split(".") if path else []:
        node = node._modules.get(part) if isinstance(node, nn.Module) else None
        if node is None:
            return None
    return None if isinstance(node, nn.Identity) else node


def linear_dims(module: nn.Module) -> tuple[int, int] | None:
    """(dim_in, dim_out) of a Linear, or of a convolution as the matrix that it is; None for anything else."""
    if isinstance(module, nn.Linear) or is_packed(module):
        return module.in_features, module.out_features  # type: ignore[return-value]
    if is_conv(module):
        return module.weight[0].numel(), module.out_channels  # type: ignore[index,return-value,union-attr,operator]
    if is_transposed(module):
        return module.weight.shape[0], module.weight.shape[1]  # type: ignore[return-value,union-attr,index]
    return None


def is_conv(module: nn.Module) -> bool:
    """Whether a module is a convolution with an ordinary weight (dim_out, channels, ...)."""
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def is_transposed(module: nn.Module) -> bool:
    """Whether a projection keeps its weight as (dim_in, dim_out): transformers' `Conv1D`, as in GPT-2."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def make_linear(
    module: nn.Module, part: tuple[int, int] | None, fused: str, num_heads: int, common: dict[str, Any]
) -> LinearPoint | None:
    """A linear point for a whole projection or a slice of a fused one; None if the module is no projection."""
    dims = linear_dims(module)
    if dims is None:
        return None
    dim_in, dim_out = dims
    start, stop = 0, dim_out
    if part is not None:
        index, count = part
        if dim_out % count:
            return None
        start, stop = index * dim_out // count, (index + 1) * dim_out // count
    return LinearPoint(
        **{**common, "dim_in": dim_in, "dim_out": stop - start},
        start=start,
        stop=stop,
        fused=fused if part is not None else "",
        num_heads=num_heads,
        transposed=is_transposed(module),
    )


def with_bias(point: LinearPoint | None, owner: nn.Module, name: str) -> LinearPoint | None:
    """The point, whose bias is a parameter of another module if that has one of this name."""
    if point is not None and name and owner._parameters.get(name) is not None:
        point.beside = (owner, name)
    return point


def side_of(path: str, default: str) -> tuple[str, str]:
    """ "attn:input" -> ("attn", "input")."""
    module, _, side = path.partition(":")
    return module, side or default


def norm_dim(module: nn.Module) -> int:
    weight = getattr(module, "weight", None)
    return 0 if weight is None else weight.shape[0]


def make_point(
    row: Row,
    block: nn.Module,
    module: nn.Module,
    common: dict[str, Any],
    prefix: str,
    num_heads: int,
    special: dict[str, dict[str, Any]],
) -> Point | None:
    """The point that a row of a family's table stands for; None if what stands there is no projection.

    Args:
        row: of the table. block, module: the block, and what stands at the row's path in it.
        common: fields that every point has.
        prefix: the block's point name. num_heads: of its attention.
        special: further fields of attention and tokens points.
    """
    if row.kind == "linear":
        linear = make_linear(module, row.part, f"{prefix}.{row.path}", num_heads, common)
        return with_bias(linear, block.get_submodule(row.path.rpartition(".")[0]), row.bias)
    if row.kind == "sublayer":
        (entry, first), (leave, last) = side_of(row.entry, "output"), side_of(row.exit, "input")
        return SublayerPoint(
            **common,
            entry=block.get_submodule(entry),
            exit=block.get_submodule(leave),
            entry_side=first,
            exit_side=last,
            stream=block.get_submodule(row.stream) if row.stream else None,
            inner=block.get_submodule(row.inner) if row.inner else None,
            unmergeable=row.unmergeable,
        )
    if row.kind == "norm":
        width = norm_dim(module)
        return NormPoint(**{**common, "dim_in": width, "dim_out": width})
    if row.kind == "attention":
        return AttentionPoint(**common, num_heads=num_heads, **special["attention"])
    if row.kind == "tokens":
        return TokensPoint(**common, **special["tokens"])
    simple: dict[str, Callable[..., Point]] = {"block": BlockPoint, "condition": ConditionPoint}
    return simple[row.kind](**common)


def block_points(
    table: Iterable[Row], root: nn.Module, prefix: str, path: str, dim: int, num_heads: int, **place: Any
) -> list[Point]:
    """Points of one block by a table of rows; rows whose path the block has not are left out.

    `prefix` is the block's point name, `path` its module path, `place` the block index, stage and tower, and options for the
    attention and tokens points as a dict `attention=` and `tokens=`.
    """
    special = {"attention": place.pop("attention", {}), "tokens": place.pop("tokens", {})}
    found: list[Point] = []
    for row in table:
        part = find(root, row.path)
        if part is None or (
            row.kind == "attention" and not getattr(part, "mixes", True)
        ):  # a child of it has no product
            continue
        common: dict[str, Any] = {
            "name": f"{prefix}.{row.name}" if row.name else prefix,
            "role": row.role,
            "path": f"{path}.{row.path}" if row.path else path,
            "module": part,
            "dim_in": dim,
            "dim_out": dim,
            **place,
        }
        point = make_point(row, root, part, common, prefix, num_heads, special)
        if point is not None:
            found.append(point)
    return found
