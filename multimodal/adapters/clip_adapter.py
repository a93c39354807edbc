"""CLIP-Adapter: a small residual MLP on the image's embedding, in front of its comparison with the class texts.

Idea: both towers stay as they are and nothing is put into them; a bottleneck of two layers moves the embedding of an image, and
most of the old one is kept beside it.
Points: none; it stands on the pooled features (`Adapter.features`). Head: `text` (`zoo.heads.text`).

    f' = s relu(W_2 relu(W_1 f)) + (1 - s) f                 f (B, d) = I(x), not normalised; W_1 (d / r, d), W_2 (d, d / r)
    logits = exp(a) <f' / |f'|, t_k / |t_k|> + b             t_k: text of class k; a, b: the model's scale and bias, frozen

W_1, W_2 ~ U(-1/sqrt(fan in), 1/sqrt(fan in)), torch's default for linear layers; no biases. So the start is close to the
zero-shot classifier and not equal to it. As s goes to 0 it becomes the zero-shot classifier.
Defaults: r = 4, s = 0.2, one template "a photo of a {}.", as the authors' code. The paper chooses s (`ratio`) for each data set,
between 0.2 and 0.8: do so on validation data.
Counts: 2 d d / r. ViT-B (d = 512): 131,072; RN50 (d = 1024): 524,288.
Nothing is back-propagated through either tower.
Measured (benchmarks/clip_few_shot.py: clip-micro, 16 images of each class, 60 steps, mean of three seeds): CIFAR-10 25.7 %,
zero-shot 25.6 %, a linear probe 46.1 %; 17 flowers 10.9, 10.3 and 65.9 %. At this size its gain does not show.
Source: Gao et al., "CLIP-Adapter: Better Vision-Language Models with Feature Adapters", IJCV 2024;
gaopengcuhk/CLIP-Adapter (clip_adapter.py).

Deviations: the authors' code has the width 1024 of RN50 written into it; here it is the model's. d / r is rounded down, as
theirs. Their paper also tries an adapter on the texts' embeddings (alone, or beside this one), finds the one on images best, and
their code has that one only; so has this. Their texts are templates for each data set, ours the head's one (`head.template`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from multimodal.adapters.parts.named import require_texts
from zoo.adapters.base import Adapter
from zoo.points import Points
from zoo.registry import register_adapter


class FeatureMLP(nn.Module):
    """`relu(W_2 relu(W_1 f))`, (B, d) -> (B, d)."""

    def __init__(self, dim: int, reduction: int) -> None:
        super().__init__()
        self.down = nn.Linear(dim, dim // reduction, bias=False)
        self.up = nn.Linear(dim // reduction, dim, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """(B, d) -> (B, d)."""
        return torch.relu(self.up(torch.relu(self.down(features))))


@register_adapter("clip-adapter")
@dataclass
class CLIPAdapter(Adapter):
    """A residual MLP on image embeddings.

    Args:
        reduction: r, d over the width of the MLP.
        ratio: s, how much of the result is new.
    """

    reduction: int = 4
    ratio: float = 0.2

    default_lr = 1e-3
    head_kind = "text"
    paper = "Gao et al. 2024"
    looks_back = True
    taxonomy = "additive"
    identity = False
    merges = False
    trial_families = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.reduction >= 1, f"reduction is {self.reduction}; expected 1 or more.")
        self.check(0 < self.ratio <= 1, f"ratio is {self.ratio}; expected more than 0 and at most 1.")

    def attach(self, points: Points) -> None:
        """Put the MLP in front of the head."""
        require_texts(points, "clip-adapter")
        dim = points.feature_dim
        self.check(self.reduction <= dim, f"reduction is {self.reduction}; {points.backbone} has {dim} features.")
        points.beside("mlp", FeatureMLP(dim, self.reduction))

    def features(self, pooled: Tensor) -> Tensor:
        """(B, d) -> (B, d)."""
        return self.ratio * self.module_at("mlp")(pooled) + (1 - self.ratio) * pooled
