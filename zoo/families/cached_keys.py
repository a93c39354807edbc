"""Keys and values of transformers' encoder-decoders: what its caches hold, and what is added to the scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.engine.attention import Bias, Pair, mask_bias

__all__ = ["keys_values", "pair_bias"]


def keys_values(states: Tensor, cache: Any, index: int, cross: bool, project: Callable[[Tensor], Pair]) -> Pair:
    """Keys and values (B, h, K, c) of `states`, behind those that a cache of the library holds for layer `index`.

    Those of a cross-attention do not change while words are generated: they are projected once.
    """
    if cache is None:
        return project(states)
    own = cache
    if hasattr(cache, "is_updated"):  # the cache of an encoder-decoder is two
        own = cache.cross_attention_cache if cross else cache.self_attention_cache
        if cross and cache.is_updated.get(index):
            return own.layers[index].keys, own.layers[index].values
    pair: Pair = own.update(*project(states), index)
    if cross and own is not cache:
        cache.is_updated[index] = True
    return pair


def pair_bias(mask: Tensor | None, position: Tensor | None, causal: bool, q: Tensor, keys: int) -> Bias:
    """What is added to the scores of own and extra keys (`AttentionSite.attend`).

    mask: (1 or B, 1, M or 1, K), additive, or true where a key is seen; None hides nothing, but what comes later if `causal`.
    position: relative position bias (1, h, M, K).
    """
    if mask is None and causal and q.shape[2] > 1:
        mask = torch.ones(q.shape[2], keys, dtype=torch.bool, device=q.device).tril(keys - q.shape[2])[None, None]
    if mask is not None:
        mask = mask[..., :keys]
    if position is not None:
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
        mask = position if mask is None else position + mask
    return mask_bias(mask)
