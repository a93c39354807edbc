"""Heads with margins: cosines with one direction for each identity; in training the right one is made harder to reach.

    c_k = <z, w_k> / |z| |w_k|          z (B, d) pooled features, w (K, d); the logits are s c_k in evaluation
    theta = arccos c_y                  the angle to the right identity y, whose logit in training is s times

    cosface     cos theta - m                                                          m = 0.4    Wang et al. 2018
    arcface     cos(theta + m);  cos theta - m sin m where theta + m is beyond pi      m = 0.5    Deng et al. 2019
    adaface     cos(theta - m g) - (m + m g)                                           m = 0.4    Kim et al. 2022
                g = clip(h (|z| - mean) / std, -1, 1), no gradient through |z|

Images of which little can be seen have short features: adaface lets them off the angular margin and asks an additive one of the
others. mean and std of |z| move by `momentum` with each batch (of two images or more); they start at 20 and 100. w starts as
N(0, 0.01^2), s = 64, h = 1/3, momentum 0.01. `model.reset_head(30, kind="cosface", scale=32, margin=0.3)`; settings are saved
with the head. The training accuracy that zoo.fit shows is of these logits, so it is below that of the cosines.

What is known of a face is in z: after training the head is left, and faces are compared by the cosines of their z
(`zoo.evaluate(model, faces, task="identify")`).

Sources: deepinsight/insightface (`losses.py`, also in Kartik-3004/PETALface), mk-minchul/AdaFace (`head.py`). Deviations:
theirs computes the arcs of arcface where no gradient is recorded, so its gradient is that of the plain cosine; here it is
that of the function. Cosines are computed in float32, as theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.heads import Head, register_head

__all__ = ["AdaFaceHead", "ArcFaceHead", "CosFaceHead"]

EDGE = 1e-6  # cosines stay so far from -1 and 1, where the angle has no derivative


class Margin(Head):
    """What the three have in common; `harder` says how the cosine of the right identity changes."""

    sees_targets = True
    scale: Tensor
    margin: Tensor

    def __init__(
        self, in_features: int, out_features: int, *, scale: float = 64.0, margin: float = 0.4, **place: Any
    ) -> None:
        super().__init__(in_features, out_features)
        for name, value, most in (("scale", scale, 1e4), ("margin", margin, math.pi)):
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= most:
                raise ConfigError(f"{name} is {value!r}; expected a number from 0 to {most:g}.")
            if name == "scale" and not value:
                raise ConfigError("scale is 0; all logits would be 0, and nothing could learn. Expected more.")
            self.register_buffer(name, torch.tensor(float(value), **place))
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **place))
        nn.init.normal_(self.weight, std=0.01)

    def forward(self, outputs: Mapping[str, Any], targets: Any = None) -> Tensor:
        """ "pooled" (B, d), in training the identities (B,) -> logits (B, K).

        Raises:
            ConfigError: targets that are not one identity for each image (mixed images).
        """
        z: Tensor = outputs["pooled"]
        with torch.autocast(z.device.type, enabled=False):
            z = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
            cosine = F.linear(F.normalize(z, dim=-1), F.normalize(self.weight.to(z.dtype), dim=-1))
            if targets is None:
                return self.scale * cosine
            if not isinstance(targets, Tensor) or targets.dim() != 1 or targets.is_floating_point():
                raise ConfigError(
                    "a head with a margin wants one identity for each image, whole numbers (B,); images that are mixed "
                    "(mixup, cutmix) have none. Train it without mixing, or with a linear head."
                )
            hit = F.one_hot(targets, self.out_features).bool()
            return self.scale * torch.where(hit, self.harder(cosine.clamp(EDGE - 1, 1 - EDGE), z), cosine)

    def harder(self, cosine: Tensor, z: Tensor) -> Tensor:
        """What stands for the cosine of the right identity."""
        raise TypeError(f"{type(self).__name__} does not implement harder.")


@register_head("cosface")
class CosFaceHead(Margin):
    """An additive margin on the cosine."""

    def harder(self, cosine: Tensor, z: Tensor) -> Tensor:
        """cos theta - m."""
        return cosine - self.margin


@register_head("arcface")
class ArcFaceHead(Margin):
    """An additive margin on the angle."""

    def __init__(self, in_features: int, out_features: int, *, margin: float = 0.5, **more: Any) -> None:
        super().__init__(in_features, out_features, margin=margin, **more)

    def harder(self, cosine: Tensor, z: Tensor) -> Tensor:
        """cos(theta + m), falling on beyond pi."""
        turned = cosine * self.margin.cos() - (1 - cosine.square()).sqrt() * self.margin.sin()
        return torch.where(cosine > -self.margin.cos(), turned, cosine - self.margin * self.margin.sin())


@register_head("adaface")
class AdaFaceHead(Margin):
    """Margins by the length of the features, which tells how good an image is."""

    slope: Tensor
    momentum: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self, in_features: int, out_features: int, *, h: float = 1 / 3, momentum: float = 0.01, **more: Any
    ) -> None:
        super().__init__(in_features, out_features, **more)
        for name, value, most in (("h", h, 1e4), ("momentum", momentum, 1)):
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= most:
                raise ConfigError(f"{name} is {value!r}; expected a number from 0 to {most:g}.")
        for name, value in (("slope", h), ("momentum", momentum), ("mean", 20.0), ("std", 100.0)):
            self.register_buffer(name, torch.full_like(self.scale, float(value)))

    def harder(self, cosine: Tensor, z: Tensor) -> Tensor:
        """cos(theta - m g) - (m + m g)."""
        length = z.detach().norm(dim=-1, keepdim=True).clamp(0.001, 100)
        if self.training and len(z) > 1:
            self.mean.lerp_(length.mean().to(self.mean.dtype), self.momentum)
            self.std.lerp_(length.std().to(self.std.dtype), self.momentum)
        g = (self.slope * (length - self.mean) / (self.std + 1e-3)).clamp(-1, 1)
        theta = (cosine.clamp(-1 + 1e-3, 1 - 1e-3).acos() - self.margin * g).clamp(1e-3, math.pi - 1e-3)
        return theta.cos() - self.margin * (1 + g)
