"""What `cones` puts at the conditions of diffusion transformers, and how it reads the texts of training data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.errors import AttachError, DataError
from zoo.model.probing import probing

if TYPE_CHECKING:
    from zoo.host import Host
    from zoo.tasks.base import Task

__all__ = ["Contexts", "Row", "Rows", "entering"]

NEAR = 0.01  # of its length: how far a context may be from a known one, which is what a pass in bfloat16 makes of it


class Rows(nn.Module):
    """S (labels, d), and what each label gets of it: labels (B,) -> (B, d), zeros for those that are not searched."""

    place: Tensor

    def __init__(self, labels: tuple[int, ...], count: int, dim: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(len(labels), dim))
        place = torch.full((count,), -1)
        place[list(labels)] = torch.arange(len(labels))
        self.register_buffer("place", place, persistent=False)

    def forward(self, labels: Tensor) -> Tensor:
        """What is added to the rows of these labels."""
        at = self.place[labels]
        return torch.where(at.unsqueeze(-1) < 0, 0.0, self.shift[at.clamp(min=0)])


class Row(nn.Module):
    """In place of one block's class embedding."""

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.shared = (rows,)

    def forward(self, embed: Any, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """labels (B,) -> (B, d)."""
        found: Tensor = embed(labels, *args, **kwargs)
        return found + self.shared[0](labels).to(found.dtype)


class Contexts(nn.Module):
    """Text embeddings (B, L, d); those that are near `known` (k, L, d) get S (k, tokens, d) added."""

    known: Tensor

    def __init__(self, count: int, length: int, dim: int, tokens: tuple[int, ...]) -> None:
        super().__init__()
        self.tokens = list(tokens)
        self.shift = nn.Parameter(torch.zeros(count, len(tokens) or length, dim))
        self.register_buffer("known", torch.zeros(count, length, dim))

    def searched(self) -> Tensor:
        """The embeddings with what was searched, (k, L, d)."""
        if not self.tokens:
            return self.known + self.shift
        places = torch.tensor(self.tokens, device=self.shift.device)
        return self.known + torch.zeros_like(self.known).index_copy(1, places, self.shift.to(self.known.dtype))

    def forward(self, text: Tensor) -> Tensor:
        """(B, L, d) -> (B, L, d)."""
        if text.shape[1:] != self.known.shape[1:]:
            return text  # of another length: none of those that were searched
        wide = torch.promote_types(text.dtype, self.known.dtype)
        known = self.known.to(wide)
        far = (text.detach().to(wide).unsqueeze(1) - known).flatten(2).norm(dim=-1) / known.flatten(1).norm(dim=-1)
        nearest = far.min(dim=1)
        change = (self.searched() - self.known).to(wide)[nearest.indices]
        hit = (nearest.values <= NEAR).view(-1, 1, 1)
        return torch.where(hit, text.to(wide) + change, text.to(wide)).to(text.dtype)


def entering(model: Host, point: Any, batches: Iterable[Any], task: Task | None) -> list[Tensor]:
    """The text embeddings (L, d) of each item that reach a point.

    Raises:
        DataError: no batch. AttachError: what reaches it are not the tokens of texts.
    """
    seen: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = (*args, *kwargs.values())[0]
        if x.ndim != 3 or x.shape[2] != point.dim_in:
            raise AttachError(f"'cones' searches the tokens of a text, and '{point.name}' reads {tuple(x.shape)}.")
        seen.extend(x.detach().unbind(0))

    with probing(model, task) as probe, torch.no_grad():
        handle = point.module.register_forward_pre_hook(look, with_kwargs=True)
        try:
            for inputs, targets in batches:
                probe.loss(inputs, targets)
        finally:
            handle.remove()
    if not seen:
        raise DataError("'cones' starts from the texts of the training data, and there is no batch of these.")
    return seen
