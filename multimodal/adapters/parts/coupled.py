"""Prompts of a text tower, and what a linear map makes of them for the image tower."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import AttachError
from zoo.points import Points

__all__ = ["Coupled", "Vectors", "first_norm", "named_classes", "random_vectors", "two_towers"]


class Vectors(nn.Module):
    """T vectors (T, d) of one block."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.prompt = nn.Parameter(vectors)

    def forward(self, batch: int) -> Tensor:
        """(1, T, d)."""
        return self.prompt.unsqueeze(0)


class Coupled(nn.Module):
    """Prompts of an image tower's block: a linear map of the vectors of the text tower's.

    Args:
        source: the module that holds the vectors (T, d_t), under the name `held`; it belongs to a point of the text tower.
        project: d_t -> d_v.
        shared: whether `project` belongs to several blocks, and is registered elsewhere.
        norm: a norm of the backbone that prompts pass as tokens in front of the first block do.
    """

    def __init__(
        self, source: nn.Module, held: str, project: nn.Linear, shared: bool = False, norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        # in tuples, so that each is registered only where it belongs
        self.shared: tuple[nn.Module, ...] = (source, project) if shared else (source,)
        self.held, self.norm = held, (norm,)
        if not shared:
            self.project = project

    def forward(self, batch: int) -> Tensor:
        """(1, T, d_v); behind a norm (batch, T, d_v), since what other adapters do there may be each image's own."""
        project = self.shared[1] if len(self.shared) > 1 else self.project
        tokens: Tensor = project(getattr(self.shared[0], self.held)).unsqueeze(0)
        (norm,) = self.norm
        if norm is None:
            return tokens
        return norm(tokens.expand(batch, -1, -1).to(norm.weight.dtype))  # type: ignore[no-any-return,union-attr,arg-type]


def two_towers(points: Points, method: str) -> tuple[list[Any], list[Any]]:
    """The `tokens` points of the text tower and of the image tower, in forward order.

    Raises:
        AttachError: one of them is missing; the message says why.
    """
    tokens = points.require("tokens", method)
    first = next((p for p in tokens if p.embedding is not None), None)
    texts = [p for p in tokens if first is not None and p.tower == first.tower]
    images = [p for p in tokens if first is not None and p.tower != first.tower]
    if texts and images:
        return texts, images
    what = "images" if texts else "texts"
    hidden = " (one tower is hidden: load it with tower='both')" if _beside(points) else ""
    raise AttachError(
        f"'{method}' puts prompts into a text tower and an image tower, and {points.backbone} shows none of {what}{hidden}."
    )


def _beside(points: Points) -> bool:
    """Whether the network has towers side by side, of which one may be hidden; an encoder and its decoder are none."""
    return any(p.tower in ("image", "text") for p in points)


def named_classes(points: Points, plan: dict[str, Any] | None, method: str) -> None:
    """Raise AttachError if there are no classes whose names could be read."""
    if not (points.num_classes or plan):
        raise AttachError(
            f"'{method}' compares images with class names: load the model with num_classes= and data that names its classes, or "
            "with classes=[...]."
        )


def first_norm(points: Points, tower: str) -> nn.Module | None:
    """The norm that the tokens of a tower pass in front of its first block; None if it has none."""
    return next((p.module for p in points if p.name == f"{tower}.norm_pre"), None)


def random_vectors(count: int, dim: int) -> Tensor:
    """N(0, 0.02^2), (count, dim)."""
    return torch.empty(count, dim).normal_(std=0.02)
