"""Prompts that are kept and made anew in later blocks (`TokensPoint.prompt(replace=True)`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.engine.attention import Insert
from zoo.engine.sites import site_at
from zoo.errors import AttachError, ConfigError
from zoo.points import Point

if TYPE_CHECKING:
    from zoo.points.recorder import Recorder

__all__ = ["Overwrite", "kept"]


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
        prompts = self.module(len(x)).to(x.dtype).expand(len(x), -1, -1)
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
