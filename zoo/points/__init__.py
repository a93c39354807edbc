"""Where something can be added: points and their verbs, the language in which they are chosen, and what merging may do there."""

from zoo.points.kinds import (
    KINDS,
    AttentionPoint,
    BlockPoint,
    ConditionPoint,
    LinearPoint,
    NormPoint,
    SublayerPoint,
    TokensPoint,
)
from zoo.points.layout import Layout
from zoo.points.merger import Merger
from zoo.points.point import Point
from zoo.points.points import Points
from zoo.points.rows import Row

__all__ = [
    "KINDS",
    "AttentionPoint",
    "BlockPoint",
    "ConditionPoint",
    "Layout",
    "LinearPoint",
    "Merger",
    "NormPoint",
    "Point",
    "Points",
    "Row",
    "SublayerPoint",
    "TokensPoint",
]
