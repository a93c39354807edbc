"""MaPLe: learned words in front of the names of classes, and prompts of the image tower that are made of them.

Idea: prompts in both towers of a CLIP, block by block up to a depth, and those of the image tower are a linear function of
those of the text tower, so that the two change together. Both towers are frozen.
Points: `tokens` of the first J blocks of both towers (verbs `words`, `prompt`). Head: `text` (`zoo.heads.text`).

    text, block 0:    [start] P_0 [rest of the template] [name of class k] . [end]     P_i (T, d_t), in front of the positions
    text, block i:    what has become of P_{i-1} is replaced by P_i                     0 < i < J
    image, block 0:   N([class | patches + positions | V_0])                            V_i = P_i W_i^T + b_i, (T, d_v)
    image, block i:   what has become of V_{i-1} is replaced by V_i
    logits(x) = exp(a) <I(x) / |I(x)|, t_k / |t_k|> + b                                a, b: the model's own, frozen

N is the norm in front of the image tower's first block, if it has one. Behind block J - 1 the tokens of both go on as all others
do. Underscores in names are spaces.
P_0 begins as the embeddings of the first T words of `init`, of a word that is several tokens as that of the first; the other
words of `init` stay in the template as words. P_i ~ N(0, 0.02^2) for i > 0, and P_0, too, without `init`. W_i, b_i: torch's own
start of a linear layer. It does not begin as the zero-shot classifier.
Defaults: T = 2, J = 9, "a photo of a", as the authors' for ViT-B/16. J is at most the number of blocks that both towers have.
They train with SGD at 0.0035, batch 4, 5 epochs, cosine with one epoch at 1e-5, random resized crops and flips, 16 images of
each class; our default rate is for AdamW.
Counts: J (T d_t + d_t d_v + d_v). CLIP ViT-B/16 (512, 768): 9 * (1,024 + 393,984) = 3,555,072.
Source: Khattak et al., "MaPLe: Multi-modal Prompt Learning", CVPR 2023; muzairkhattak/multimodal-prompt-learning
(trainers/maple.py, clip/model.py).

The class texts are encoded once for each step, whatever the batch, and in evaluation once until a parameter changes. What is
saved are the vectors and maps; the texts are made anew of the names of the classes, so a trained adapter serves other classes.
A step takes 0.97 to 1.08 times as long as forward and backward through both towers without prompts (processor time,
clip-micro, 16 images, 100 classes).

Deviations: the authors' image prompts stand behind the patches, ours between class token and patches: without a mask the same.
All W_i of i > 0 begin equal in their code (one layer is copied), ours are drawn one by one. Their weights are float16, and W_0
is even where the rest is not; ours are what the model is loaded in. Widths 512 and 768 are constants there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from multimodal.adapters.coop import Context
from multimodal.adapters.parts.coupled import Coupled, Vectors, first_norm, named_classes, random_vectors, two_towers
from zoo.adapters.base import Adapter
from zoo.heads.text import SLOT
from zoo.points import Points
from zoo.registry import register_adapter


@register_adapter("maple")
@dataclass
class MaPLe(Adapter):
    """Multi-modal prompt learning.

    Args:
        num_tokens: T, prompts of each block.
        depth: J, blocks of each tower that have prompts; at most those that both have.
        init: a template: its first T words are learned, the others stay. "": T random vectors stand in front of the name.
    """

    num_tokens: int = 2
    depth: int = 9
    init: str = "a photo of a"

    default_lr = 2e-3
    point_options = {"tower": "both"}
    head_kind = "text"
    in_template = True
    paper = "Khattak et al. 2023"
    looks_back = True
    taxonomy = "additive"
    identity = False  # random prompts in both towers
    merges = False
    trial = {"num_tokens": 1, "depth": 2}
    trial_families = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.num_tokens >= 1, f"num_tokens is {self.num_tokens}; expected 1 or more.")
        self.check(self.depth >= 1, f"depth is {self.depth}; expected 1 or more.")
        self.check(
            "{" not in self.init, f"init '{self.init}' has a brace; the name of a class comes behind it by itself."
        )
        words = len(self.init.split())
        self.check(
            not words or words >= self.num_tokens,
            f"init '{self.init}' has {words} words, and num_tokens={self.num_tokens} of them are to be learned; write a longer "
            "one, or init='' for random vectors.",
        )

    def attach(self, points: Points) -> None:
        """Put vectors among the words, prompts that replace them later, and what is made of both into the image tower."""
        texts, images = two_towers(points, "maple")
        named_classes(points, self.plan, "maple")
        norm = first_norm(points, images[0].tower)
        for i, (text, image) in enumerate(zip(texts[: self.depth], images, strict=False)):
            project = nn.Linear(text.dim_in, image.dim_in)
            source: nn.Module
            if i == 0:
                source = Context(self._first(text))
                text.words(source)
                image.prompt(Coupled(source, "context", project, norm=norm), keep=True)
            else:
                source = Vectors(random_vectors(self.num_tokens, text.dim_in))
                text.prompt(source, keep=True, replace=True)
                image.prompt(Coupled(source, "prompt", project), keep=True, replace=True)

    def _first(self, text: Any) -> Tensor:
        """The vectors of the first block (T, d)."""
        words = self.init.split()[: self.num_tokens]
        if not words:
            return random_vectors(self.num_tokens, text.dim_in)
        found = [text.embed(word) for word in words]
        for word, vectors in zip(words, found, strict=True):
            self.check(len(vectors) > 0, f"init has the word '{word}', which is no token of this model.")
        return torch.stack([vectors[0] for vectors in found])

    def init_head(self, head: Any) -> None:
        """The template of the class texts: slots for the vectors, the words that stay, and the name."""
        rest = self.init.split()[self.num_tokens :]
        head.template, head.specific = " ".join([*[SLOT] * self.num_tokens, *rest, "{}"]) + ".", False
