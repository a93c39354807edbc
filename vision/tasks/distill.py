"""Hard-label distillation: a second head learns what a teacher decides, while the first learns the labels.

    loss = (1 - alpha) CE(head, labels) + alpha CE(dist_head, argmax teacher)

alpha = 0.5. In evaluation the mean of the two heads' logits is taken. GroupMamba's authors train so, with RegNetY-16GF as the
teacher, for 300 epochs, with mixup and smoothed labels in the first term. From Touvron et al., "Training data-efficient image
transformers & distillation through attention", 2021.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ConfigError


def distillation_loss(
    outputs: tuple[Tensor, Tensor],
    labels: Tensor,
    teacher_logits: Tensor,
    alpha: float = 0.5,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss above, a scalar.

    Args:
        outputs: logits of both heads (B, K) each, as a `GroupMamba` with two heads gives them in training.
        labels: class indices (B,), or probabilities (B, K) where labels were mixed.
        teacher_logits: what the teacher gives to the same images, (B, K); no gradient goes into it.
        alpha: weight of the teacher's term. label_smoothing: of the first term.

    Raises:
        ConfigError: there is one head only, or the shapes differ.
    """
    if not isinstance(outputs, tuple) or len(outputs) != 2:
        raise ConfigError(
            "distillation needs the logits of two heads: a GroupMamba with distillation=True, in training mode."
        )
    own, distilled = outputs
    if not own.shape == distilled.shape == teacher_logits.shape:
        raise ConfigError(
            f"student and teacher give logits of different shapes: {tuple(own.shape)}, {tuple(distilled.shape)} and "
            f"{tuple(teacher_logits.shape)}."
        )
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha is {alpha}; expected 0 to 1.")
    truth = F.cross_entropy(own, labels, label_smoothing=label_smoothing)
    return (1 - alpha) * truth + alpha * F.cross_entropy(distilled, teacher_logits.detach().argmax(dim=1))
