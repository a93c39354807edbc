"""How far generated images are from real ones: the Frechet distance between their features.

Features of each set are taken for Gaussian, N(m, S):

    d^2 = |m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))

which is the squared Wasserstein-2 distance of the two (the FID of Heusel et al. 2017, whose features are those of an Inception
network; here they are those of any image model of ours, so numbers of different models cannot be compared). The trace of the
root is the sum of the roots of the eigenvalues of R S_2 R with R = S_1^(1/2): symmetric, so no complex numbers come up, and
sets with fewer images than features are no exception. The estimate is biased upwards for small sets: compare equal numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ConfigError, DataError

if TYPE_CHECKING:
    from zoo.host import Host


class Moments:
    """Mean (d,) and covariance (d, d) of features that come in batches, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self.scatter = torch.zeros(0, 0, dtype=torch.float64)  # sum of (x - mean)(x - mean)^T

    def update(self, features: Tensor) -> None:
        """Features (n, d).

        Raises:
            DataError: they are not (n, d), of another width than before, or not finite.
        """
        x = features.detach().double().cpu()
        if x.ndim != 2 or (self.count and x.shape[1] != len(self.mean)) or not bool(torch.isfinite(x).all()):
            raise DataError(
                f"features of shape {tuple(features.shape)} are not finite (n, d), d being the same for all."
            )
        if not len(x):
            return
        mean, total = x.mean(0), self.count + len(x)
        centred = x - mean
        scatter = centred.T @ centred
        if self.count:
            apart = mean - self.mean
            scatter += self.scatter + torch.outer(apart, apart) * (self.count * len(x) / total)
            mean = self.mean + apart * (len(x) / total)
        self.mean, self.scatter, self.count = mean, scatter, total

    @property
    def covariance(self) -> Tensor:
        """(d, d), with n - 1 in the denominator.

        Raises:
            DataError: fewer than two images.
        """
        if self.count < 2:
            raise DataError(f"The distance between sets of images needs two images or more in each, got {self.count}.")
        return self.scatter / (self.count - 1)


def frechet_distance(first: Moments, second: Moments) -> float:
    """d^2 of the equation above.

    Raises:
        DataError: features of different widths, or fewer than two images in a set.
    """
    if first.mean.shape != second.mean.shape:
        raise DataError(f"The two sets have features of {len(first.mean)} and {len(second.mean)} numbers.")
    one, two = first.covariance, second.covariance
    root = _root(one)
    values = torch.linalg.eigvalsh(root @ two @ root).clamp(min=0)
    apart = (first.mean - second.mean).square().sum()
    return float((apart + one.trace() + two.trace() - 2 * values.sqrt().sum()).clamp(min=0))


def _root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a symmetric matrix without negative eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


@torch.no_grad()
def image_features(model: Host, images: Tensor) -> Tensor:
    """Features (n, d) by an image model of images (n, 3, H, W) in [0, 1], resized and normalised as it takes them.

    Raises:
        ConfigError: a model without pooled features. DataError: no colour images.
    """
    if not model.family.pools:
        raise ConfigError(
            f"'{model.backbone_name}' gives no features of images; take a vision backbone such as 'vit-micro'."
        )
    if images.ndim != 4 or images.shape[1] != 3:
        raise DataError(f"images are {tuple(images.shape)}; expected (n, 3, H, W).")
    x = images.to(device=model.device, dtype=torch.float32).clamp(0, 1)
    if tuple(x.shape[-2:]) != model.image_size:
        x = F.interpolate(x, size=model.image_size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    mean, std = (torch.tensor(v, device=x.device).view(1, -1, 1, 1) for v in (model.mean, model.std))
    return model.features(((x - mean) / std).to(model.dtype))


def feature_distance(real: Tensor, generated: Tensor, model: Host, batch_size: int = 64) -> float:
    """Frechet distance between two sets of images (n, 3, H, W) in [0, 1], by the features of an image model.

    Raises:
        DataError, ConfigError: as `image_features` and `frechet_distance`.
    """
    moments = Moments(), Moments()
    training = model.training
    model.eval()
    try:
        for images, found in zip((real, generated), moments, strict=True):
            for part in images.split(batch_size):
                found.update(image_features(model, part))
    finally:
        model.train(training)
    return frechet_distance(*moments)
