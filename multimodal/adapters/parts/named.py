"""What methods ask for that compare images with the names of classes."""

from __future__ import annotations

from zoo.errors import AttachError
from zoo.points import Points

__all__ = ["require_texts"]


def require_texts(points: Points, method: str) -> None:
    """Raise AttachError unless images and texts have a common space here, and there are classes to compare images with."""
    if not {"pooled", "text", "scale"} <= set(points.gives):
        raise AttachError(
            f"'{method}' compares images with texts of class names, and {points.backbone} has no text tower in the space of its "
            "images. Use a backbone of the family 'clip'."
        )
    if not points.num_classes:
        raise AttachError(
            f"'{method}' compares images with class names: load the model with num_classes= and data that names its classes, or "
            "with classes=[...]."
        )
