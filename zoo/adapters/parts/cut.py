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
import torch.nn.functional as F
from torch import Tensor

from zoo.adapters.parts.side import SideBlock
from zoo.errors import AttachError, ConfigError
from zoo.points import Point

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


def squared_gradients(model: Any, points: Sequence[Any], batches: Iterable[Any], samples: int) -> dict[str, Tensor]:
    """The sum over samples of the squared gradient of the cross-entropy with respect to each point's weight, by name.

    The model without adapters and with its own head is differentiated; nothing of it changes.

    Raises:
        ConfigError: no classification head, targets that are not classes, or no data.
    """
    if not model.num_classes:
        raise ConfigError(
            "init='fisher' needs the loss of a classification head; give num_classes, or use init='magnitude'."
        )
    modules = {id(p.module): p.module for p in points}
    sums = {key: torch.zeros_like(m.weight) for key, m in modules.items()}
    weights, seen, training = [m.weight for m in modules.values()], 0, model.training
    learned = [w.requires_grad for w in weights]
    try:
        model.eval()
        with model.disable(), torch.enable_grad():
            for w in weights:
                w.requires_grad_(True)
            for inputs, targets in batches:
                if not isinstance(targets, Tensor) or targets.ndim != 1 or targets.is_floating_point():
                    raise ConfigError(
                        "init='fisher' needs one class for each sample; use init='magnitude' for other targets."
                    )
                parts = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
                for i in range(min(len(targets), samples - seen)):
                    one = [p[i : i + 1].to(model.device) for p in parts]
                    loss = F.cross_entropy(model(*one), targets[i : i + 1].to(model.device))
                    for key, g in zip(modules, torch.autograd.grad(loss, weights)):
                        sums[key] += g.square()
                    seen += 1
                if seen >= samples:
                    break
    finally:
        for w, learns in zip(weights, learned):
            w.requires_grad_(learns)
        model.train(training)
    if not seen:
        raise ConfigError("init='fisher' got no data.")
    return {p.name: sums[id(p.module)].flatten(1)[p.start : p.stop] for p in points}
