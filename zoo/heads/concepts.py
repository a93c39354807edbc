"""The head of searched concepts: images are compared with class texts that were read once and are kept, not read again.

    m_k = 1/P sum_p T(p(k)) / |T(p(k))|          templates p, class k; or, with `each`, all P of them: m_kp = T(p(k)) / |T(p(k))|
    logits(x)_k = log 1/P sum_p exp(exp(a) <I(x) / |I(x)|, m_kp / |m_kp|>) + b        one vector: the cosine itself

Alone it is the zero-shot classifier. The texts are read in the first forward pass in which the names of the classes are known,
with what is attached to the text tower then; from there on that tower is not needed any more, nor is it by a saved head that is
loaded. An adapter that stands behind the head (`cones`) moves the vectors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ConfigError
from zoo.heads.base import register_head
from zoo.heads.text import TextHead, check_slots, class_ids, cut

if TYPE_CHECKING:
    from zoo.host import Host

__all__ = ["ConceptHead", "similarities"]

TEXTS = 256  # encoded at once


def similarities(pooled: Tensor, concepts: Tensor, scale: Tensor) -> Tensor:
    """pooled (B, d), concepts (K, P, d), scale (2,) -> logits (B, K)."""
    wide = torch.promote_types(pooled.dtype, torch.float32)
    classes, vectors = concepts.shape[:2]
    weight = (scale[0] * F.normalize(concepts.to(wide), dim=-1)).flatten(0, 1).to(pooled.dtype)
    bias = scale[1].to(pooled.dtype)
    x = F.normalize(pooled, dim=-1)
    if vectors == 1:
        return F.linear(x, weight, bias.expand(classes))
    scores = F.linear(x, weight).to(wide).unflatten(1, (classes, vectors))
    return (scores.logsumexp(dim=-1) - math.log(vectors)).to(pooled.dtype) + bias


@register_head("concepts")
class ConceptHead(TextHead):
    """Logits by similarity with kept class texts; `prepare` is called by the adapter that it is made for."""

    needs = ("pooled", "text", "scale")
    kept_texts = True
    text: Tensor
    written: Tensor

    def __init__(self, in_features: int, out_features: int, **place: Any) -> None:
        super().__init__(in_features, out_features, **place)
        global _untraced
        if _untraced is _read:  # as in `zoo.heads.text`
            _untraced = torch.compiler.disable(_read)
        self.specific = True  # classes cannot join: their vectors would be missing
        self.templates: tuple[str, ...] = (self.template,)
        self.each = self.random = False
        self.register_buffer("text", torch.zeros(out_features, 1, in_features, **place))
        self.register_buffer("written", torch.zeros((), dtype=torch.bool, device=place.get("device")))
        self._ready = False

    def prepare(self, templates: Sequence[str], each: bool = False, random: bool = False) -> None:
        """Which texts are read, and whether each template has a vector of its own; `random`: directions instead of texts."""
        self.templates, self.each, self.random = tuple(templates), each, random
        vectors = len(self.templates) if each else 1
        self.text = self.text.new_zeros(self.out_features, vectors, self.in_features)
        self.written, self._ready = torch.zeros_like(self.written), False

    def forward(self, outputs: Mapping[str, Any], targets: Any = None) -> Tensor:
        """pooled (B, d), text (K, P, d), scale (2,) -> (B, K)."""
        return similarities(outputs["pooled"], outputs["text"], outputs["scale"])

    def more(self, model: Host) -> dict[str, Any]:
        """ "text" (K, P, d), read now if it was not yet.

        Raises:
            ConfigError: the names of the classes are not known, too long for the model with a template, or others than those
                from whose texts the active adapter has moved on.
        """
        check_slots(self, model)
        if not self._ready:
            if not (self.text.is_meta or bool(self.written)):
                _untraced(self, model)
            self._ready = True
        return {"text": self.text}

    def name_classes(self, classes: Sequence[str]) -> None:
        """As `Head.name_classes`.

        Raises:
            ConfigError: other names than those whose texts are kept.
        """
        known = self.classes
        if known is not None and [str(name) for name in classes] != known and bool(self.written):
            raise ConfigError(
                f"The head keeps the texts of its own classes ({', '.join(known[:3])} ...), so they cannot get other names. "
                "Add a fresh adapter for other classes."
            )
        super().name_classes(classes)


def _read(head: ConceptHead, model: Host) -> None:
    """Read the class texts and keep them."""
    moved = [n for n in model.active if getattr(model.adapters[n], "searched", False)]
    if moved:
        raise ConfigError(
            f"'{moved[0]}' has moved on from the texts of the classes that it was trained with, and the head has none of these: "
            "load it with the head that it was saved with, or add a fresh adapter for other classes."
        )
    with torch.no_grad():
        if head.random:
            found = F.normalize(torch.randn_like(head.text), dim=-1)
        else:
            if head.classes is None:
                head.ids(model)  # takes up the model's names, or says that there are none
            assert head.classes is not None
            ids = torch.stack([class_ids(model.family, head.classes, t) for t in head.templates], dim=1)
            parts = ids.flatten(0, 1).to(model.device).split(TEXTS)
            texts = torch.cat([model.outputs(texts=cut(model, part), want=("text",))["text"] for part in parts])
            found = F.normalize(texts, dim=-1).to(head.text.dtype).unflatten(0, ids.shape[:2])
            found = found if head.each else found.mean(dim=1, keepdim=True)
        head.text.copy_(found)
        head.written.fill_(True)


_untraced = _read
