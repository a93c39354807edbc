"""Initial values of side blocks, cut out of the backbone's blocks (structural pruning, LST section 2.2).

Of each projection W (o, i) a side block takes some rows and columns. Walking the blocks forward:

    columns of q, k, v and of the MLP's up: the rows kept last in the stream (at the start those of largest importance)
    rows of q, k, v: one set for all three, by the product of their importances; these are the columns of o
    rows of o, of up, of down: by their own importance; up's rows are down's columns

Importance of a row: the sum of |W| over all its columns ("magnitude"), or of the squared gradients ("fisher"). Biases and norms
are sliced alike. Rows keep their order. As in the authors' "fisher-v2", nothing makes the rows kept by o and by down agree,
though both are added to one stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import zoo
from zoo.adapters.parts.side import SideBlock
from zoo.errors import AttachError, ConfigError, DataError
from zoo.points import Point
from zoo.tasks import Task

__all__ = ["cut_blocks", "squared_gradients"]

ROLES = ("q", "k", "v", "o", "up", "down")


@torch.no_grad()
def cut_blocks(
    sides: Sequence[SideBlock | None], inside: Sequence[Sequence[Point]], importance: Mapping[str, Tensor] | None = None
) -> None:
    """Fill side blocks (None: this block has none) from the points of their blocks.

    Args:
        importance: of each weight (o, i), by the point's name; None: its magnitude.

    Raises:
        AttachError: a block lacks one of the projections, or its width does not shrink evenly.
    """
    columns: Tensor | None = None
    for side, own in zip(sides, inside):
        if side is None:
            continue
        found: dict[str, Any] = {p.role: p for p in reversed(own) if p.kind == "linear"}
        if missing := [r for r in ROLES if r not in found]:
            raise AttachError(
                f"a side block is cut out of q, k, v, o, up and down; this one has no {', '.join(missing)}."
            )
        score = {r: _score(found[r], importance) for r in ROLES}
        width, hidden = side.proj.out_features, side.fc1.out_features
        if columns is None or int(columns.max()) >= found["q"].dim_in or len(columns) != width:
            columns = _top(score["q"].sum(0) * score["k"].sum(0) * score["v"].sum(0), width)
        norms = [p for p in own if p.kind == "norm"]
        _slice_norm(side.norm1, norms[0], columns)
        rows = _top(score["q"].sum(1) * score["k"].sum(1) * score["v"].sum(1), width)
        side.qkv.weight.copy_(torch.cat([found[r].weight[rows][:, columns] for r in "qkv"]))
        if side.qkv.bias is not None:
            zero = torch.zeros_like(rows, dtype=side.qkv.bias.dtype)
            side.qkv.bias.copy_(torch.cat([zero if found[r].bias is None else found[r].bias[rows] for r in "qkv"]))
        columns = _slice(side.proj, found["o"], score["o"], rows)
        _slice_norm(side.norm2, norms[-1], columns)
        rows = _top(score["up"].sum(1), hidden)
        _copy(side.fc1, found["up"], rows, columns)
        columns = _slice(side.fc2, found["down"], score["down"], rows)


def _score(point: Any, importance: Mapping[str, Tensor] | None) -> Tensor:
    return point.weight.abs() if importance is None else importance[point.name].to(point.weight.device)


def _top(score: Tensor, count: int) -> Tensor:
    return score.topk(count).indices.sort().values


def _slice(part: Any, point: Any, score: Tensor, columns: Tensor) -> Tensor:
    """Fill a projection of the side block with the best rows of a point; returns these."""
    rows = _top(score.sum(1), part.out_features)
    _copy(part, point, rows, columns)
    return rows


def _copy(part: Any, point: Any, rows: Tensor, columns: Tensor) -> None:
    part.weight.copy_(point.weight[rows][:, columns])
    if part.bias is not None:
        part.bias.zero_() if point.bias is None else part.bias.copy_(point.bias[rows])


def _slice_norm(norm: Any, point: Any, columns: Tensor) -> None:
    norm.weight.copy_(point.module.weight[columns])
    if norm.bias is not None:
        norm.bias.copy_(point.module.bias[columns])


def squared_gradients(
    model: Any, points: Sequence[Any], batches: Iterable[Any], samples: int, task: Task | None = None
) -> dict[str, Tensor]:
    """The sum over samples of the squared gradient of the task's loss with respect to each point's weight (o, i), by name.

    The model without adapters and with its own head is differentiated; nothing of it changes.

    Raises:
        ConfigError: the model has no head that the task would need, or quantised weights.
        DataError: no data.
    """
    if not model.num_classes and (task is None or task.on_head):
        raise ConfigError(
            "init='fisher' needs the loss of a classification head; give num_classes, or use init='magnitude'."
        )
    modules: dict[str, Any] = {p.path: p.module for p in points}
    if rounded := [p for p in points if "weight" not in p.module._parameters]:
        kept = getattr(rounded[0].module, "kept_in", "other numbers")
        raise ConfigError(
            f"init='fisher' needs gradients of the backbone's weights, and that of '{rounded[0].name}' is kept in {kept}, which "
            "has none; use init='magnitude', or the backbone that was not quantised."
        )
    sums = {path: torch.zeros_like(m.weight, dtype=torch.float32) for path, m in modules.items()}
    seen = 0
    with model.disable(), zoo.probing(model, task) as probe:
        weights = {path: m.weight.requires_grad_(True) for path, m in modules.items()}
        for inputs, targets in batches:
            for i in range(min(_count(targets), samples - seen)):
                gradients = probe.gradients(probe.loss(_one(inputs, i), _one(targets, i)), weights)
                for path, gradient in gradients.items():
                    sums[path] += gradient.square()
                seen += 1
            if seen >= samples:
                break
    if not seen:
        raise DataError("init='fisher' got no data: give calibrate at least one batch of (inputs, targets).")
    return {p.name: sums[p.path].flatten(1)[p.start : p.stop] for p in points}


def _one(value: Any, i: int) -> Any:
    """Sample i of a batch, as a batch."""
    if isinstance(value, (tuple, list)) and not isinstance(value[0], str):
        return type(value)(_one(v, i) for v in value)
    return {k: _one(v, i) for k, v in value.items()} if isinstance(value, Mapping) else value[i : i + 1]


def _count(value: Any) -> int:
    """Samples of a batch of targets."""
    while isinstance(value, (tuple, list, Mapping)) and not isinstance(value, str):
        first = next(iter(value.values())) if isinstance(value, Mapping) else value[0]
        if isinstance(first, str):
            break
        value = first
    return len(value)
