"""What stands on a backbone's features."""

from zoo.heads.classifiers import HEADS, CosineHead, TwoHeads, kind_of, make_head

__all__ = ["HEADS", "CosineHead", "TwoHeads", "kind_of", "make_head"]
