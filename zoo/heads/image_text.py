"""The head of texts that depend on the image: each image is compared with class texts of its own.

    logits(x)_k = exp(a) <I(x) / |I(x)|, t_k(x) / |t_k(x)|> + b        t_k(x) = T(p(k), x);  a, b: the model's scale and bias

What a text has of the image is an adapter's, which is told of the images by `look(features)` in front of their texts. B images
and K classes are B K texts: in training all at once, since all their graphs are needed; without gradients at most `TEXTS` at
once (those of one image at least), so that memory does not grow with the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.heads.base import register_head
from zoo.heads.text import TextHead

if TYPE_CHECKING:
    from zoo.host import Host

__all__ = ["ImageTextHead"]

TEXTS = 512


@register_head("image-text")
class ImageTextHead(TextHead):
    """Logits by similarity with class texts of each image's own."""

    needs = ("pooled", "scale")

    def forward(self, outputs: Mapping[str, Any], targets: Any = None) -> Tensor:
        """pooled (B, d), text (B, K, d), scale (2,) -> (B, K)."""
        pooled, scale = outputs["pooled"], outputs["scale"]
        wide = torch.promote_types(pooled.dtype, torch.float32)
        texts = F.normalize(outputs["text"].to(wide), dim=-1)
        cosines = (texts @ F.normalize(pooled.to(wide), dim=-1).unsqueeze(-1)).squeeze(-1)
        return (scale[0] * cosines + scale[1]).to(pooled.dtype)

    def more(self, model: Host) -> dict[str, Any]:
        """Nothing: the texts wait for the images."""
        return {}

    def then(self, model: Host, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """ "text" (B, K, d) of the images whose features are `outputs["pooled"]` (B, d).

        Raises:
            ConfigError: the names of the classes are not known, or too long for the model with this template.
        """
        ids, images = self.cut(model), F.normalize(outputs["pooled"], dim=-1)
        active: list[Any] = [model.adapters[name] for name in model.active]
        looking = [adapter for adapter in active if hasattr(adapter, "look")]
        step = max(1, TEXTS // len(ids))
        # a graph takes batches of any size, so it has no loop over their parts
        whole = torch.is_grad_enabled() or torch.compiler.is_compiling()
        found = []
        for part in (images,) if whole else images.split(step):
            for adapter in looking:
                adapter.look(part)
            found.append(model.outputs(texts=ids.repeat(part.shape[0], 1), want=("text",))["text"])
        return {"text": torch.cat(found).unflatten(0, (images.shape[0], len(ids)))}
