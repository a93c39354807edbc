"""Classifiers of transformers' encoders of sound: a projection, the mean over the steps, a classifier.

The mean is linear, so the projection may as well stand behind it, in the head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.backbone import Backbone
from zoo.heads.base import not_held


class ProjectedHead(nn.Module):
    """Two linear maps, (B, d) -> (B, p) -> (B, num_classes); the keys are those of the library's classifier."""

    def __init__(self, in_features: int, width: int, out_features: int, **factory: Any) -> None:
        super().__init__()
        self.projector = nn.Linear(in_features, width, **factory)
        self.classifier = nn.Linear(width, out_features, **factory)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, d) -> (B, num_classes)."""
        return self.classifier(self.projector(pooled))


class Projected(Backbone):
    """Of families whose library's module keeps a `projector` and a `classifier`."""

    def new_head(self, num_classes: int, **factory: Any) -> nn.Module:
        """Projection and classifier, as the library's."""
        config: Any = self.module.config
        return ProjectedHead(self.feature_dim, config.classifier_proj_size, num_classes, **factory)

    def take_head(self) -> nn.Module | None:
        """Take projector and classifier off; without them the library's module answers with the mean over the steps."""
        module: Any = self.module
        projector, classifier = module.projector, module.classifier
        module.projector, module.classifier = nn.Identity(), nn.Identity()
        if not isinstance(classifier, nn.Linear):
            return None
        with torch.device(classifier.weight.device):
            head = self.new_head(classifier.out_features, dtype=classifier.weight.dtype)
        head.projector, head.classifier = projector, classifier
        return head

    def put_head(self, module: nn.Module, head: nn.Module) -> None:
        """Make `head` the classifier of a merged module."""
        if not isinstance(head, ProjectedHead) or head.in_features != self.feature_dim:
            raise not_held()
        merged: Any = module
        merged.config.num_labels = head.out_features
        merged.projector, merged.classifier = head.projector, head.classifier
