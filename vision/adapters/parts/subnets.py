"""Sub-networks of a supernet: how wide each of its parts is in each block, and how such choices are drawn and changed.

A part is used in the first D blocks, with a width of its own in each, and not in the others. D is one of `depths`, the widths are
of `widths`, which leaves (sum over D of len(widths)^D)^parts sub-networks.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Sizes", "Space", "depths_of"]

Sizes = dict[str, tuple[int, ...]]  # part -> width in each block


def depths_of(blocks: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Numbers of blocks for these shares of all, rounded up."""
    return tuple(sorted({max(1, math.ceil(share * blocks - 1e-9)) for share in shares}))


@dataclass(frozen=True)
class Space:
    """All sub-networks of `blocks` blocks with these parts."""

    parts: tuple[str, ...]
    blocks: int
    widths: tuple[int, ...]
    depths: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many there are."""
        one: int = sum(len(self.widths) ** depth for depth in self.depths)
        return one ** len(self.parts)

    @property
    def smallest(self) -> Sizes:
        """Least width in the fewest blocks."""
        return {part: self._filled((min(self.widths),) * min(self.depths)) for part in self.parts}

    def draw(self, source: random.Random) -> Sizes:
        """Any of them: first how many blocks, then the width in each."""
        found: Sizes = {}
        for part in self.parts:
            depth = source.choice(self.depths)
            found[part] = self._filled(self._widths(depth, source))
        return found

    def mutate(self, sizes: Mapping[str, Sequence[int]], source: random.Random, chance: float, deeper: float) -> Sizes:
        """Each part is taken with `chance`, and then with `deeper` gets another number of blocks; widths that are there stay."""
        found: Sizes = {}
        for part in self.parts:
            widths = tuple(w for w in sizes[part] if w)
            if source.random() < chance and source.random() < deeper:
                depth = source.choice(self.depths)
                widths = widths[:depth] + self._widths(max(0, depth - len(widths)), source)
            found[part] = self._filled(widths)
        return found

    def cross(
        self, one: Mapping[str, Sequence[int]], other: Mapping[str, Sequence[int]], source: random.Random
    ) -> Sizes:
        """Each part as in one of the two."""
        return {part: tuple(source.choice((one, other))[part]) for part in self.parts}

    def _widths(self, count: int, source: random.Random) -> tuple[int, ...]:
        return tuple(source.choice(self.widths) for _ in range(count))

    def _filled(self, widths: tuple[int, ...]) -> tuple[int, ...]:
        return widths + (0,) * (self.blocks - len(widths))
