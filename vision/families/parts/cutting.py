"""How heads, neurons and blocks are taken out of timm's ViT and Swin (`zoo.model.pruning`), or why they cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from zoo import Point
from zoo.backbone import Cut
from zoo.errors import ConfigError, SelectionError

__all__ = ["cut_blocks", "cut_heads", "cut_neurons", "parts_of"]


def _kept(count: int, gone: Sequence[int], what: str, name: str) -> list[int]:
    if wrong := [i for i in gone if not 0 <= i < count]:
        raise SelectionError(f"'{name}' has no {what} {wrong[0]}: it has {count} (0 to {count - 1}).")
    kept = [i for i in range(count) if i not in set(gone)]
    if not kept:
        raise ConfigError(f"'{name}' would have no {what} left; take the whole block out (blocks=).")
    return kept


def _channels(heads: Sequence[int], dim: int) -> list[int]:
    return [h * dim + i for h in heads for i in range(dim)]


def _rows(linear: Any, index: Sequence[int]) -> None:
    linear.weight = nn.Parameter(linear.weight.detach()[list(index)].clone(), requires_grad=linear.weight.requires_grad)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[list(index)].clone(), requires_grad=linear.bias.requires_grad)
    linear.out_features = len(index)


def _columns(linear: Any, index: Sequence[int]) -> None:
    linear.weight = nn.Parameter(
        linear.weight.detach()[:, list(index)].clone(), requires_grad=linear.weight.requires_grad
    )
    linear.in_features = len(index)


def _attention(name: str, block: Any) -> tuple[Any, int]:
    """The attention of a block, and the width of a head."""
    attention = getattr(block, "attn", block)
    qkv = getattr(attention, "qkv", None)
    if type(attention).__name__ not in ("Attention", "WindowAttention") or type(qkv) is not nn.Linear:
        raise ConfigError(
            f"the attention of '{name}' is a {type(attention).__name__} ({type(qkv).__name__}); its heads cannot be "
            "taken out. Prune before quantising, and use timm's Attention or WindowAttention."
        )
    if (
        not isinstance(getattr(attention, "norm", nn.Identity()), nn.Identity)
        or getattr(attention, "gate", None) is not None
    ):
        raise ConfigError(
            f"the attention of '{name}' norms or gates all heads together: one cannot be taken out exactly."
        )
    return attention, attention.qkv.out_features // 3 // attention.num_heads


def cut_heads(name: str, block: Any, gone: Sequence[int]) -> dict[str, Cut]:
    """Take attention heads out; what is cut at which of the block's points."""
    attention, dim = _attention(name, block)
    count = attention.num_heads
    heads = _kept(count, gone, "head", name)
    channels, width = _channels(heads, dim), count * dim
    fused = [part * width + c for part in range(3) for c in channels]
    _rows(attention.qkv, fused)
    _columns(attention.proj, channels)
    attention.num_heads = len(heads)
    if hasattr(attention, "attn_dim"):
        attention.attn_dim = len(channels)
    if hasattr(attention, "relative_position_bias_table"):
        table: Tensor = attention.relative_position_bias_table
        attention.relative_position_bias_table = nn.Parameter(
            table.detach()[:, heads].clone(), requires_grad=table.requires_grad
        )
    each = Cut(width, tuple(channels))
    found = {f"attn.{role}": each for role in ("q", "k", "v", "o")}
    return {**found, "attn.qkv": Cut(3 * width, tuple(fused)), "attn.product": each, "attn": Cut(count, tuple(heads))}


def cut_neurons(name: str, block: Any, gone: Sequence[int]) -> dict[str, Cut]:
    """Take hidden channels of an MLP out."""
    mlp = _mlp(name, block)
    count = mlp.fc1.out_features
    kept = _kept(count, gone, "neuron", name)
    _rows(mlp.fc1, kept)
    _columns(mlp.fc2, kept)
    return dict.fromkeys(("mlp.up", "mlp.down"), Cut(count, tuple(kept)))


def _mlp(name: str, block: Any) -> Any:
    mlp: Any = getattr(block, "mlp", block)
    plain = type(mlp).__name__ == "Mlp" and type(mlp.fc1) is nn.Linear and type(mlp.fc2) is nn.Linear
    if not plain or not isinstance(getattr(mlp, "norm", nn.Identity()), nn.Identity):
        raise ConfigError(
            f"the MLP of '{name}' is a {type(mlp).__name__} of other parts; its neurons cannot be taken out one by one. Prune "
            "before quantising, and use timm's Mlp without a norm."
        )
    return mlp


def parts_of(kind: str, block: Any, gone: Sequence[int]) -> tuple[nn.Module, list[int]]:
    """The projection that reads the outputs of these heads or neurons, and the channels of its input that are theirs."""
    if kind == "neurons":
        return block.mlp.fc2, list(gone)
    attention, dim = _attention("", block)
    return attention.proj, _channels(gone, dim)


def cut_blocks(module: Any, blocks: Sequence[Point], gone: Sequence[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Take blocks out; (old name -> new name of those that stay, names of those that are gone)."""
    names: dict[str, str] = {}
    groups: dict[str, list[Point]] = {}
    for point in blocks:
        groups.setdefault(point.path.rpartition(".")[0], []).append(point)
    for path, members in groups.items():
        kept = [p for p in members if p.name not in gone]
        if not kept:
            where = f"stage {members[0].stage}" if members[0].stage is not None else "the backbone"
            raise ConfigError(f"{where} would have no block left.")
        for number, point in enumerate(kept):
            names[point.name] = f"{point.name.rpartition('.')[0]}.{number}"
        owner, _, last = path.rpartition(".")
        parent = module.get_submodule(owner)
        setattr(parent, last, nn.Sequential(*(module.get_submodule(p.path) for p in kept)))
        if hasattr(parent, "depth"):
            parent.depth = len(kept)
        info = getattr(module, "feature_info", None)
        if parent is module and info:  # timm's list of what each block gives
            module.feature_info = [{**info[0], "module": f"blocks.{i}"} for i in range(len(kept))]
    return names, tuple(gone)
