"""What an attention's extra keys may have besides: a mask (`AttentionPoint.extend`), or a softmax of their own (`gate`).

masked:  softmax([q k_extra^T + M | q k^T + bias]) [v_extra; v]
gated:   softmax(q k^T + bias) v + g softmax(q k_extra^T) v_extra                (LLaMA-Adapter)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["second_softmax", "with_masks"]

Bias = Callable[..., "Tensor | None"]


def with_masks(bias: Bias, pairs: Sequence[tuple[Tensor, ...]], rows: int, own: int) -> Bias:
    """`bias` with the masks of the extra keys, if any of the pairs has one.

    A mask is (1 or images, 1 or h, 1 or M, T); `rows` are images * windows, `own` the keys of the attention itself.
    """
    if not any(len(pair) > 2 for pair in pairs):
        return bias

    def masked(extra: int, images: int, index: Tensor | None) -> Tensor:
        like = pairs[0][0]
        found = []
        for pair in pairs:
            if len(pair) < 3:
                found.append(like.new_zeros(1, 1, 1, pair[0].shape[2]))
                continue
            part = additive(pair[2], like)
            found.append(part if part.shape[0] == 1 else part.repeat_interleave(rows // part.shape[0], dim=0))
        shape = torch.broadcast_shapes(*(part.shape[:3] for part in found))
        added = F.pad(torch.cat([part.expand(*shape, -1) for part in found], dim=-1), (0, own))
        given = bias(extra, images, index)
        return added if given is None else added + additive(given, added)

    return masked


def additive(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as numbers that are added to scores."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(~mask, float("-inf"))


def second_softmax(site: Any, q: Tensor, y: Tensor, images: int) -> Tensor:
    """y (R, h, M, c) with what the gated keys of all active adapters add; q (R, h, M, c), R = images * windows."""
    windows = q.shape[0] // max(images, 1)  # an empty batch has none
    for op in site.forwards:
        if op.verb != "gate":
            continue
        site._seen(op)
        if site.state.route is None:
            y = y + _read(site, site.ready(op.fn(site, images)), q)
            continue
        index = site.state.route[op.owner]
        if index.shape[0]:
            rows = (index[:, None] * windows + torch.arange(windows, device=q.device)).flatten()
            given = site.ready(op.fn(site, index.shape[0]))
            y = y.index_add(0, rows, _read(site, given, q.index_select(0, rows)).to(y.dtype))
    return y


def _read(site: Any, given: tuple[Tensor, ...], q: Tensor) -> Tensor:
    """g softmax(q K^T) V."""
    wide = [t.to(q.dtype) for t in given]
    keys, values, gate = (
        t if t.dim() < 4 or t.shape[0] == 1 else t.repeat_interleave(q.shape[0] // t.shape[0], dim=0) for t in wide
    )
    keys, values = (t.expand(q.shape[0], -1, -1, -1) for t in (keys, values))
    return gate * F.scaled_dot_product_attention(q, keys, values, scale=site.scale)
