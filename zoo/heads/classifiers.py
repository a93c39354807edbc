"""Heads: what turns pooled features (B, d) into logits (B, K). Those made anew are linear: weight (K, d), bias (K,)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ConfigError, nearest
from zoo.heads.base import HEADS, Head, register_head

__all__ = ["HEADS", "CosineHead", "MeanHead", "TwoHeads", "kind_of", "make_head", "settings_of"]


@register_head("cosine")
class CosineHead(nn.Linear):
    """`W x / |x| + b`: with rows of one length, their cosines with the features, times that length (zero-shot classifiers)."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, d) -> (B, K)."""
        return F.linear(F.normalize(x, dim=-1), self.weight, self.bias)


@register_head("two")
class TwoHeads(nn.Module):
    """The mean of two linear heads on the same features: of a distilled network, one of which learned from its teacher."""

    def __init__(self, in_features: int, out_features: int, **place: Any) -> None:
        super().__init__()
        self.head = nn.Linear(in_features, out_features, **place)
        self.dist_head = nn.Linear(in_features, out_features, **place)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor) -> Tensor:
        """x (B, d) -> (B, K)."""
        return (self.head(x) + self.dist_head(x)) / 2


@register_head("mean")
class MeanHead(Head):
    """A linear map of the mean of all tokens, class tokens included: `W mean_n(t_n) + b`."""

    needs = ("tokens",)

    def __init__(self, in_features: int, out_features: int, **place: Any) -> None:
        super().__init__(in_features, out_features)
        self.linear = nn.Linear(in_features, out_features, **place)

    def forward(self, outputs: Mapping[str, Any], targets: Any = None) -> Tensor:
        """tokens (B, N, d) -> (B, K)."""
        return self.linear(outputs["tokens"].mean(dim=1))


HEADS["linear"] = nn.Linear


def kind_of(head: nn.Module) -> str:
    """Under which name of `HEADS` a head is saved.

    Raises:
        ConfigError: a `Head` that is not registered, which nobody could load again.
    """
    if isinstance(head, Head) and type(head) not in HEADS.values():
        raise ConfigError(f"{type(head).__name__} has no name to be saved by: put @zoo.register_head('...') above it.")
    return next((name for name, cls in HEADS.items() if type(head) is cls), "linear")


def make_head(
    kind: str, dim: int, num_classes: int, settings: Mapping[str, Any] = MappingProxyType({}), **place: Any
) -> nn.Module:
    """A head with torch's initial values; `settings` are its own, `place` is device and dtype.

    Raises:
        ConfigError: no such kind, or a setting that it does not have.
    """
    if kind not in HEADS:
        raise ConfigError(f"there is no head of the kind '{kind}'. {nearest(kind, HEADS)}")
    known = settings_of(HEADS[kind])
    if unknown := [name for name in settings if name not in known]:
        raise ConfigError(f"the head '{kind}' has no setting '{unknown[0]}'; it has {', '.join(known) or 'none'}.")
    return HEADS[kind](dim, num_classes, **settings, **place)


def settings_of(cls: type[nn.Module]) -> list[str]:
    """Names of the settings of a kind of head, those of the classes that it is made of included."""
    found: dict[str, None] = {}
    for base in cls.__mro__ if issubclass(cls, Head) else ():
        own = vars(base).get("__init__")
        if own is not None and issubclass(base, Head):
            parameters = inspect.signature(own).parameters.values()
            found |= dict.fromkeys(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
    return list(found)
