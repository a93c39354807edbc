"""What stands on a backbone's features."""

from zoo.heads.base import HEADS, Head, register_head
from zoo.heads.classifiers import CosineHead, TwoHeads, kind_of, make_head
from zoo.heads.image_text import ImageTextHead
from zoo.heads.text import TextHead

__all__ = [
    "HEADS",
    "CosineHead",
    "Head",
    "ImageTextHead",
    "TextHead",
    "TwoHeads",
    "kind_of",
    "make_head",
    "register_head",
]
