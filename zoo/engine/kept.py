"""Prompts that are kept as tokens: put into the sequence, taken out, made anew in later blocks (`TokensPoint.prompt`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.engine.sites import Site, site_at
from zoo.errors import AttachError, ConfigError
from zoo.points import Point

if TYPE_CHECKING:
    from zoo.points.recorder import Recorder

__all__ = ["Insert", "Overwrite", "kept"]


@dataclass(eq=False)
class Insert:
    """Puts prompts into the sequence behind its prefix tokens, and behind the prompts of other adapters put there before."""

    module: nn.Module
    num_prefix: int
    site: Site
    count: int = 0  # tokens put in by the present forward pass
    at: int = 0  # and where

    def __call__(self, x: Tensor) -> Tensor:
        """(B, N, d) -> (B, N + T, d)."""
        prompts = self.module(x.shape[0]).to(x.dtype).expand(x.shape[0], -1, -1)
        at = self.num_prefix
        for op in self.site.inputs:
            if op.fn is self:
                break
            at += op.fn.count if isinstance(op.fn, Insert) else 0
        self.count, self.at = prompts.shape[1], at
        return torch.cat([x[:, :at], prompts, x[:, at:]], dim=1)

    def strip(self, x: Tensor) -> Tensor:
        """(B, N + T, d) -> (B, N, d). All prompts of all adapters are neighbours, so these may be anybody's."""
        patches = x[:, self.num_prefix + self.count :]
        return torch.cat([x[:, : self.num_prefix], patches], dim=1) if self.num_prefix else patches


def kept(session: Recorder, point: Point, blocks: Sequence[nn.Module]) -> tuple[Insert, tuple[nn.Module, ...]]:
    """The adapter's prompts of the first block, and the blocks behind it up to a point's.

    Raises:
        AttachError: the adapter has none there.
    """
    ops: Any = getattr(session, "ops", ())
    found = [op.fn for site, op in ops if site.module is blocks[0] and isinstance(op.fn, Insert)]
    if not found:
        raise AttachError(f"at '{point.name}' there is nothing to replace: put kept prompts in the first block before.")
    assert point.block is not None
    return found[0], tuple(blocks[1 : point.block + 1])


@dataclass(eq=False)
class Overwrite:
    """New prompts in place of what became of those of the first block."""

    module: nn.Module
    first: Insert
    blocks: tuple[nn.Module, ...]  # in which others may have come in: they stand in front

    def __call__(self, x: Tensor) -> Tensor:
        """(B, N + T, d) -> the same, T of the tokens new."""
        prompts = self.module(x.shape[0]).to(x.dtype).expand(x.shape[0], -1, -1)
        count = prompts.shape[1]
        if count != self.first.count:
            raise ConfigError(f"{count} prompts cannot take the place of {self.first.count}; make as many.")
        at = self.first.at
        for block in self.blocks:
            site = site_at(block)
            for op in () if site is None else site.inputs:
                if op.fn is self:
                    break
                at += op.fn.count if isinstance(op.fn, Insert) else 0
        return torch.cat([x[:, :at], prompts, x[:, at + count :]], dim=1)
