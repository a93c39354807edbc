"""CoCoOp: the learned words in front of the names of classes are moved by what is seen in the image.

Idea: words that are learned for some classes (CoOp) serve others badly; a small network shifts all of them by a vector that
depends on the image, so that the prompt describes the image rather than the classes of training. Both towers are frozen.
Points: `tokens` of the first block of the text tower (verb `words`). Head: `image-text` (`zoo.heads.image_text`).

    v_m(x) = v_m + h(I(x) / |I(x)|)                h(f) = W_2 relu(W_1 f + b_1) + b_2        v (M, d), f (e,), one h for all m
    t_k(x) = T([start] v_1(x) .. v_M(x) [name of class k] . [end])
    logits(x)_k = exp(a) <I(x) / |I(x)|, t_k(x) / |t_k(x)|> + b                              a, b: the model's own, frozen

W_1: e -> e // 16 (1 at least), W_2: e // 16 -> d. Underscores in names are spaces. v begins as the embeddings of the words of
`init`, whose number is then M, or without it as N(0, 0.02^2); h as torch's own linear layers do, so it does not begin as the
template.
Defaults: "a photo of a" (M = 4 in CLIP's vocabulary), as the authors'. They train with SGD at 0.002, batch 1, 10 epochs, cosine
with one epoch at 1e-5, random resized crops and flips, 16 images of each class; our default rate is for AdamW.
Counts: M d + (e + 1)(e // 16) + (e // 16 + 1) d. CLIP ViT-B/16 (512, 512), M = 4: 2,048 + 16,416 + 16,896 = 35,360.
Source: Zhou et al., "Conditional Prompt Learning for Vision-Language Models", CVPR 2022; KaiyangZhou/CoOp (trainers/cocoop.py).

What it costs: every image has texts of its own, so a step encodes B K texts where CoOp encodes K: with K classes the text tower
runs K times as often as the image tower, in evaluation, too. In training the graphs of all B K texts are kept, which is why the
authors train image by image; `accumulate=` of `zoo.fit` gives larger batches in parts. Texts run without the context behind
their ends (`zoo.heads.text`): of a plain pass of ViT-B/32's text tower over as many whole texts a step takes 0.10 of the time
and keeps 0.09 of the bytes (`benchmarks/class_texts.py`).

Deviations: the authors encode the texts of one image after the other, here those of a batch (without gradients 512 at once) run
together: the same numbers. Their weights are float16 by default, ours what the model is loaded in. `init` counts tokens of the
text, not its words (the same for their template).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.adapters.parts.coupled import named_classes, random_vectors
from zoo.adapters.base import Adapter
from zoo.errors import AttachError
from zoo.heads.text import SLOT
from zoo.points import Points
from zoo.registry import register_adapter


class Conditioned(nn.Module):
    """Vectors (M, d) in place of the words whose ids are negative, shifted by what the network makes of an image.

    Args:
        vectors: (M, d), as they start.
        features: e, width of an image's features.
        image: where the features (B, e) of the images stand whose texts run; texts without them are not shifted.
    """

    def __init__(self, vectors: Tensor, features: int, image: Any) -> None:
        super().__init__()
        hidden = max(1, features // 16)
        self.context = nn.Parameter(vectors)
        self.down, self.up = nn.Linear(features, hidden), nn.Linear(hidden, vectors.shape[-1])
        self.image = image

    def forward(self, words: Tensor, ids: Tensor) -> Tensor:
        """words (n, L, d), ids (n, L) -> (n, L, d); the n texts are those of B images, n / B for each, image by image."""
        vectors = F.embedding((-1 - ids).clamp(min=0), self.context)
        seen = self.image.get()
        if seen is not None:
            shifts = self.up(F.relu(self.down(seen.to(self.down.weight.dtype))))
            # texts of an image behind one another; no length is read, so that a graph takes any
            each = ids.unflatten(0, (seen.shape[0], -1))
            vectors = (vectors.unflatten(0, each.shape[:2]) + shifts[:, None, None]).flatten(0, 1)
        return torch.where((ids < 0).unsqueeze(-1), vectors.to(words.dtype), words)


@register_adapter("cocoop")
@dataclass
class CoCoOp(Adapter):
    """Conditional context optimisation.

    Args:
        num_tokens: M, vectors of the context.
        init: a text whose words' embeddings they start as; M is then the number of its tokens. "": random.
    """

    num_tokens: int = 4
    init: str = "a photo of a"

    default_lr = 2e-3
    point_options = {"tower": "both"}
    head_kind = "image-text"
    in_template = True
    paper = "Zhou et al. 2022"
    looks_back = True
    taxonomy = "additive"
    identity = False  # the network shifts the template from its beginning
    merges = False
    trial = {"num_tokens": 3, "init": ""}
    trial_families = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.num_tokens >= 1, f"num_tokens is {self.num_tokens}; expected 1 or more.")
        self._count = self.num_tokens  # M
        self._image: Any = None  # where `look` leaves what it is told

    def attach(self, points: Points) -> None:
        """Put the context among the words of the text tower."""
        found = [p for p in points.require("tokens", "cocoop") if p.embedding is not None]
        if not found:
            hidden = (
                " (tower='image' hides them: load it with tower='both')"
                if any(p.tower == "image" for p in points)
                else ""
            )
            raise AttachError(f"'cocoop' needs the words of a text tower, and {points.backbone} has none{hidden}.")
        named_classes(points, self.plan, "cocoop")
        point = found[0]
        vectors = point.embed(self.init).clone() if self.init else random_vectors(self.num_tokens, point.dim_in)
        self.check(len(vectors) > 0, f"init '{self.init}' has no word.")
        self._count = len(vectors)
        self._image = points.carried("image")
        point.words(Conditioned(vectors, points.feature_dim, self._image))

    def look(self, features: Tensor) -> None:
        """The texts that run next are those of images with these features (B, e), of length 1; called by the head."""
        self._image.put(features)

    def init_head(self, head: Any) -> None:
        """The template of the class texts: slots for the context, and the name."""
        head.template, head.specific = " ".join([*[SLOT] * self._count, "{}"]) + ".", False
