"""What a network that writes text sees: features and boxes of the images of questions, made of pictures or given."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from multimodal.data.questions import Question, matrix
from multimodal.data.visual_features import GridFeatures, opened
from zoo.errors import DataError, MismatchError

AT_A_TIME = 256  # pictures that features are made of together


class Seen:
    """Visual input by image: from the data, or made of pictures, some at a time."""

    def __init__(self, family: Any, make: Callable[[], GridFeatures | None]) -> None:
        self.family, self._make = family, make
        self.images: dict[Any, tuple[Tensor, Tensor]] = {}
        self.pending: dict[Any, Any] = {}
        self.several: dict[Any, int] = {}  # key of a question's images -> how many there are

    def take(self, question: Question, where: str) -> None:
        """See to it that there are features of the question's images.

        Raises:
            DataError: there is neither image nor features, or they are damaged; another number of images than before.
        """
        key, images = question.key, question.image
        images = images if isinstance(images, list) else [images]
        if len(images) > (most := self.family.config.n_images):
            raise DataError(f"{where}: {len(images)} images, and '{self.family.name}' tells {most} apart.")
        if len(images) != (before := next(iter(self.several.values()), len(images))):
            raise DataError(f"{where}: {len(images)} images, and {before} of the questions before; give all as many.")
        for number, image in enumerate(images):
            self._take((key, number), image, where)
        self.several[key] = len(images)

    @functools.cached_property
    def front(self) -> GridFeatures | None:
        """What makes features of pictures, loaded with the first of them."""
        return self._make()

    @property
    def found(self) -> dict[Any, tuple[Tensor, ...]]:
        """Visual input of each question's key; of several images with the number of its image and object for each token."""
        return {key: self._of(key, count) for key, count in self.several.items()}

    def _of(self, key: Any, count: int) -> tuple[Tensor, ...]:
        parts = [self.images[key, number] for number in range(count)]
        if count == 1:
            return parts[0]
        tokens = len(parts[0][0])
        features, boxes = (torch.cat(column) for column in zip(*parts, strict=True))
        return features, boxes, torch.arange(count).repeat_interleave(tokens), torch.arange(tokens).repeat(count)

    def _take(self, key: Any, image: Any, where: str) -> None:
        if key in self.images or key in self.pending:
            return
        if image is None:
            raise DataError(f"{where}: a question without image or features, which '{self.family.name}' needs.")
        if isinstance(image, tuple):
            features = matrix(image[0], f"{where}: features")
            boxes = torch.zeros(len(features), 4) if image[1] is None else matrix(image[1], f"{where}: boxes", 4)
            if len(boxes) != len(features):
                raise DataError(f"{where}: {len(features)} features and {len(boxes)} boxes.")
            self._keep(key, features, boxes, where)
            return
        if self.front is None:
            raise DataError(
                f"{where}: a question without features, which '{self.family.name}' reads. Give the data features and boxes, or "
                "say what makes them of images: task=Generate(vision='clip-vit-b16')."
            )
        self.pending[key] = opened(image, where)
        if len(self.pending) >= AT_A_TIME:
            self.make()

    def make(self) -> None:
        """Make the features of all pictures that wait."""
        if self.pending:
            assert self.front is not None
            features, boxes = self.front(list(self.pending.values()))
            for key, f, b in zip(self.pending, features, boxes, strict=True):
                self._keep(key, f, b, "the images")
            self.pending.clear()

    def _keep(self, key: Any, features: Tensor, boxes: Tensor, where: str) -> None:
        wanted = self.family.feat_dim
        if features.shape[1] != wanted:
            raise MismatchError(
                f"{where}: features of width {features.shape[1]}, and '{self.family.name}' reads {wanted}. Load it with "
                f"feat_dim={features.shape[1]}, or take the features of another network."
            )
        count = len(next(iter(self.images.values()))[0]) if self.images else len(features)
        if len(features) != count:
            raise DataError(
                f"{where}: {len(features)} visual tokens, and {count} of the images before; give all as many."
            )
        self.images[key] = (features, boxes)
