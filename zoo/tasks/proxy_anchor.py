"""The task "proxy-anchor": metric learning by one learned proxy for each class.

s_ic = <z_i, p_c>                                     cosine of the embedding of item i and the proxy of class c
loss = 1/N+ sum_c log(1 + sum_{i: y_i = c} exp(-a (s_ic - m)))        over the classes of the batch, N+ of them
     + 1/C  sum_c log(1 + sum_{i: y_i != c} exp(a (s_ic + m)))        over all C classes

a = 32, m = 0.1. Proxies are C vectors as wide as the embedding, N(0, 1) at first, and live for the training alone: what is kept
is the embedding, which is measured on classes that it never saw (recall@k, `nmi`; `zoo.tasks.embeddings`). Batches should hold
several items of each of several classes: `zoo.fit(..., sampler=zoo.train.PerClass(classes=16, each=2))`.

`present=False` divides the first sum by C, too, as the authors of VPT-SP do; absent classes, whose term is 0, then make it
smaller.

Source: Kim, Kim, Cho, Kwak, "Proxy Anchor Loss for Deep Metric Learning", CVPR 2020 (tjddus9597/Proxy-Anchor-CVPR2020).
Deviations: their proxies start at N(0, 2 / C) and learn at 100 times the rate of the rest, in the first epoch together with the
embedding alone; here N(0, 1) at the rate of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ConfigError, DataError
from zoo.heads.embedding import EmbeddingHead
from zoo.registry import register_task
from zoo.tasks.base import Task, call
from zoo.tasks.metrics import named_metrics

if TYPE_CHECKING:
    from zoo.data.dataset import ImageDataset
    from zoo.host import Host

__all__ = ["MetricLearning", "ProxyAnchor", "proxy_anchor"]


def proxy_anchor(
    z: Tensor, proxies: Tensor, labels: Tensor, scale: float = 32.0, margin: float = 0.1, present: bool = True
) -> Tensor:
    """The loss above, a scalar in float32 or wider. z (B, e) and proxies (C, e) of any length, labels (B,) in 0..C-1."""
    wide = torch.promote_types(z.dtype, torch.float32)
    cosine = F.normalize(z.to(wide), dim=-1) @ F.normalize(proxies.to(wide), dim=-1).T  # (B, C)
    own = F.one_hot(labels, len(proxies)).bool()
    positive = _soft_sum(-scale * (cosine - margin), own)
    negative = _soft_sum(scale * (cosine + margin), ~own)
    count = own.any(0).sum() if present else len(proxies)
    return positive.sum() / count + negative.mean()


def _soft_sum(scores: Tensor, chosen: Tensor) -> Tensor:
    """log(1 + sum_i exp(scores_ic)) over the chosen i of each column; exactly 0 where there is none. (B, C) -> (C,)."""
    scores = scores.masked_fill(~chosen, float("-inf"))
    return torch.cat([scores, scores.new_zeros(1, scores.shape[1])]).logsumexp(dim=0)


class Points(nn.Module):
    """The proxies (C, e)."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.proxies = nn.Parameter(torch.randn(classes, width))


class MetricLearning(Task):
    """Base of tasks that train an embedding: what model and data must be, and what is measured."""

    monitor, labels = "recall@1", "classes"
    hub = "feature-extraction"
    evaluated_loss = False  # classes that are measured may have no proxies
    head_width = 0  # a model without a head: pooled features are the embedding
    classes: int = 0  # of the training data

    def check(self, model: Host, dataset: ImageDataset, what: str = "data set") -> None:
        """Raise unless the model embeds and the data have classes; those to measure on may be others."""
        head = getattr(model, "head", None)
        if model.num_classes and not isinstance(head, EmbeddingHead):
            raise ConfigError(
                f"The model's head is a classifier of {model.num_classes} outputs, and '{self.name}' trains an embedding. Load "
                "the model with num_classes=0 (its features are the embedding), and with a head of its own: "
                "model.reset_head(128, kind='embedding')."
            )
        if not model.family.pools:
            raise ConfigError(f"'{model.backbone_name}' pools nothing, so an item has no embedding.")
        if dataset.targets is not None:
            raise DataError(
                f"{dataset.where(0)}: the target is {dataset.targets[0].tolist()!r:.60}; '{self.name}' wants one class."
            )
        if what == "training data":
            labels = dataset.labels
            named = len(dataset.classes or ())
            self.classes = max(named, int(labels.max()) + 1 if labels is not None and len(labels) else 0)
            if self.classes < 2:
                raise DataError(
                    f"{dataset.name} has {self.classes} known classes; '{self.name}' tells classes apart and wants two or more. "
                    "Open the data with classes=[...]."
                )

    def check_batch(self, model: Host, dataset: ImageDataset, targets: Any) -> None:
        """Raise DataError for targets that are no classes."""
        if not isinstance(targets, Tensor) or targets.ndim != 1 or targets.is_floating_point():
            raise DataError(f"{dataset.name}: '{self.name}' wants one class for each item, a whole number.")
        if len(targets) and int(targets.min()) < 0:
            raise DataError(f"{dataset.name}: a label is {int(targets.min())}; expected a class, 0 or more.")

    def modules(self, model: Host) -> nn.Module | None:
        """What is learned beside the model; None where a model is only measured."""
        return self.proxies(model) if self.classes else None

    def proxies(self, model: Host) -> nn.Module:
        """Modules with which `of_proxies` knows the classes."""
        raise TypeError(f"{type(self).__name__} does not implement proxies.")

    def of_proxies(self, model: Host, z: Tensor, inputs: Any, labels: Tensor) -> Tensor:
        """The loss of embeddings z (B, e), while training."""
        raise TypeError(f"{type(self).__name__} does not implement of_proxies.")

    def width(self, model: Host) -> int:
        """e."""
        return int(model.num_classes or model.family.feature_dim)

    def loss(self, model: Host, inputs: Any, targets: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """(loss, embeddings (B, e) of length 1). In evaluation the loss is NaN: the classes there may have no proxies.

        Raises:
            ConfigError: smoothed labels, which have no meaning here.
        """
        if label_smoothing:
            raise ConfigError(f"label_smoothing is of classifications; '{self.name}' compares items with proxies.")
        found = call(model, inputs)
        z = F.normalize(found.to(torch.promote_types(found.dtype, torch.float32)), dim=-1)
        if not model.training:
            return z.new_full((), float("nan")), z
        assert isinstance(self.own, nn.Module)
        if targets.ndim != 1 or targets.is_floating_point():
            raise ConfigError(
                f"mixup and cutmix mix the classes of items, and '{self.name}' wants one class for each item."
            )
        if len(targets) and int(targets.max()) >= self.classes:
            raise DataError(f"a label is {int(targets.max())}, and the training data name {self.classes} classes.")
        return self.of_proxies(model, z, inputs, targets), z

    def metrics(self, model: Host) -> Mapping[str, Any]:
        """recall@1, @2, @4 and @8."""
        return named_metrics([f"recall@{k}" for k in (1, 2, 4, 8)], 0)


@register_task("proxy-anchor")
@dataclass
class ProxyAnchor(MetricLearning):
    """Metric learning by the proxy anchor loss.

    Args:
        scale: a. margin: m. present: average the first term over the classes of the batch instead of all.
    """

    scale: float = 32.0
    margin: float = 0.1
    present: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scale > 0:
            raise ConfigError(f"scale is {self.scale}; expected a number above 0.")

    def proxies(self, model: Host) -> nn.Module:
        """`Points`."""
        return Points(self.classes, self.width(model))

    def of_proxies(self, model: Host, z: Tensor, inputs: Any, labels: Tensor) -> Tensor:
        """See above."""
        own: Any = self.own
        return proxy_anchor(z, own.proxies, labels, self.scale, self.margin, self.present)
