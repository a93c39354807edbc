"""What stands in front of and behind the blocks of timm's vision transformers: stems, pooling; and where shifts go."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from zoo.backbone import Backbone
from zoo.families.timm_tables import POOL
from zoo.points import NormPoint, Point
from zoo.points.rows import find

__all__ = ["fold_shift", "pool_points", "stem_norms"]


def pool_points(family: Backbone, path: str, name: str = "attn_pool", **place: Any) -> list[Point]:
    """Points of timm's attention pooling at a path, if it is there; they are named `<name>.q` and so on."""
    pool: Any = find(family.module, path)
    if pool is None or not hasattr(pool, "kv"):
        return []
    return family.points_of_block(pool, name, path, pool.kv.in_features, pool.num_heads, table=POOL, **place)


def stem_norms(root: nn.Module, path: str, name: str, **place: Any) -> list[Point]:
    """The norms of a convolutional stem, named as they are behind `name`. Its convolutions are no points."""
    found: list[Point] = []
    stem = find(root, path)
    for inner, norm in [] if stem is None else stem.named_modules():
        weight = norm._parameters.get("weight")
        if weight is None or weight.dim() != 1 or "Norm" not in type(norm).__name__:
            continue
        whole, at = ".".join(filter(None, (name, inner))), ".".join(filter(None, (path, inner)))
        common: dict[str, Any] = {"name": whole, "role": "norm", "path": at, "module": norm, **place}
        acts = not isinstance(getattr(norm, "act", nn.Identity()), nn.Identity)
        found.append(
            NormPoint(
                **common,
                dim_in=len(weight),
                dim_out=len(weight),
                channels_first=isinstance(norm, (nn.BatchNorm2d, nn.GroupNorm)) or "2d" in type(norm).__name__,
                unmergeable="its activation stands in the same module, behind it" if acts else "",
            )
        )
    return found


def fold_shift(network: nn.Module, point: Point, path: str, shift: Tensor) -> bool:
    """`Backbone.fold_shift` in a vision transformer of timm's, `path` being the point's inside of it.

    The shift of patches goes into their positions; one of all keys, which are not turned or normed behind it, changes no softmax.
    """
    positions: Any = getattr(network, "pos_embed", None)
    if point.role == "patch" and positions is not None:
        grid: Any = network.patch_embed
        positions.data[:, positions.shape[1] - grid.num_patches :] += shift.to(positions)
        return True
    attention = path.rpartition(".")[0]
    if point.role != "k" or getattr(network, "rope", None) is not None:
        return False
    return find(network, f"{attention}.k_norm") is None
