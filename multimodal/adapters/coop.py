"""CoOp: learned words in front of the names of classes, read by a frozen text tower.

Idea: instead of "a photo of a", learned vectors stand in front of the name of each class in the prompt of a zero-shot
classifier. Both towers are frozen; gradients flow through the text tower into the vectors.
Points: `tokens` of the first block of the text tower (verb `words`). Head: `text` (`zoo.heads.text`).

    t_k = T([start] v_1 .. v_M [name of class k] . [end])      v (M, d): one context for all classes, or v (K, M, d)
    logits(x) = exp(a) <I(x) / |I(x)|, t_k / |t_k|> + b        a, b: the model's own scale and bias, frozen

`position`: the name at the end (above), in the middle (M // 2 vectors in front of it), or in front of all vectors. Underscores
in names are spaces. v ~ N(0, 0.02^2); or `init`: the embeddings of a text's words, whose number is then M. With the text
"a photo of a" and the name at the end the start is the zero-shot classifier; with random vectors it is nothing in particular.
Defaults: M = 16, one context, name at the end, as the authors' main setting. They train with SGD at 2e-3 for 50 to 200 epochs of
16 images for each class, batch 32, cosine, one epoch of warm-up at 1e-5, random resized crops and flips; our default rate
is for AdamW.
Counts: M d, or K M d. CLIP ViT-B/16 (d = 512), M = 16: 8,192.
Measured (benchmarks/coop.py: clip-micro, CIFAR-10, 16 images of each class, 30 epochs, batch 32, our default rate; the first
2,000 test images, mean of three seeds): zero-shot 25.1 %, 16 random vectors 42.9 % (41.3 to 43.7), from "a photo of a" 33.0 %.
Source: Zhou et al., "Learning to Prompt for Vision-Language Models", IJCV 2022; KaiyangZhou/CoOp (trainers/coop.py).

The class texts are encoded once for each step, whatever the batch (once for each part of an accumulated one), and in evaluation
once, until a parameter changes. What is saved are the names of the classes and the vectors; the words around them are made anew
from the names, so that a context can be used for other classes: `zoo.load("out/", classes=[...])`.

Deviations: the authors' weights are float16 by default, ours what the model is loaded in. They build the prompt of embedded
words; here the vectors replace words of the tokenised prompt in front of the positions, which gives the same texts. `init` counts
tokens of the text, not its words (the same for their templates), and applies to class-specific contexts too, which theirs
does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adapters.base import Adapter
from zoo.errors import AttachError
from zoo.heads.text import SLOT
from zoo.points import Points
from zoo.registry import register_adapter


class Context(nn.Module):
    """Vectors (M, d) or (K, M, d) in place of the words whose ids are negative: -1 - m is vector m of all K M."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.context = nn.Parameter(vectors)

    def forward(self, words: Tensor, ids: Tensor) -> Tensor:
        """words (n, L, d), ids (n, L) -> (n, L, d)."""
        mine = ids < 0
        vectors = F.embedding((-1 - ids).clamp(min=0), self.context.flatten(0, -2))
        return torch.where(mine.unsqueeze(-1), vectors.to(words.dtype), words)


@register_adapter("coop")
@dataclass
class CoOp(Adapter):
    """Context optimisation.

    Args:
        num_tokens: M, vectors of the context.
        init: a text whose words' embeddings they start as; M is then the number of its tokens. "": random.
        position: of the class name: "end", "middle" or "front".
        class_specific: a context of its own for each class.
    """

    num_tokens: int = 16
    init: str = ""
    position: Literal["end", "middle", "front"] = "end"
    class_specific: bool = False

    default_lr = 2e-3
    point_options = {"tower": "both"}
    head_kind = "text"
    in_template = True
    paper = "Zhou et al. 2022"
    looks_back = True
    taxonomy = "additive"
    identity = False  # "a photo of a" in place of random words is the zero-shot classifier
    merges = False
    trial = {"num_tokens": 3}
    trial_families = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.num_tokens >= 1, f"num_tokens is {self.num_tokens}; expected 1 or more.")
        self._count = self.num_tokens  # M

    def attach(self, points: Points) -> None:
        """Put the context among the words of the text tower."""
        found = [p for p in points.require("tokens", "coop") if p.embedding is not None]
        if not found:
            hidden = (
                " (tower='image' hides them: load it with tower='both')"
                if any(p.tower == "image" for p in points)
                else ""
            )
            raise AttachError(f"'coop' needs the words of a text tower, and {points.backbone} has none{hidden}.")
        # a saved adapter brings the number of classes that its contexts are for
        classes = self.plan["classes"] if self.plan else points.num_classes
        if not (classes or points.num_classes):
            raise AttachError(
                "'coop' compares images with class names: load the model with num_classes= and data that names its classes, or "
                "with classes=[...]."
            )
        point = found[0]
        if self.init:
            vectors = point.embed(self.init).clone()
            self.check(len(vectors) > 0, f"init '{self.init}' has no word.")
        else:
            vectors = torch.empty(self.num_tokens, point.dim_in).normal_(std=0.02)
        self._count = len(vectors)
        if self.class_specific:
            self.plan = {"classes": classes}
            start = vectors.expand(classes, -1, -1).clone()
            vectors = start if self.init else start.normal_(std=0.02)
        point.words(Context(vectors))

    def init_head(self, head: Any) -> None:
        """The template of the class texts: slots for the context, and the name."""
        if self.class_specific and self.plan and self.plan["classes"] != head.out_features:
            self.check(
                False,
                f"its contexts are those of {self.plan['classes']} classes, and the head has {head.out_features}; contexts that "
                "are not class_specific can be used for other classes.",
            )
        before = {"end": self._count, "middle": self._count // 2, "front": 0}[self.position]
        words = [SLOT] * before + ["{}"] + [SLOT] * (self._count - before)
        head.template, head.specific = " ".join(words) + ".", self.class_specific
