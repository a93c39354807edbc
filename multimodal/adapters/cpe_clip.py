"""CPE-CLIP: one small set of prompts for both towers of a CLIP, made to learn classes that come in sessions.

Idea: learned vectors stand in front of the names of classes in every block of the text tower; one linear map makes of them the
prompts of every block of the image tower. So little is trained that few images of new classes suffice, and what was known is
kept by gradients that shrink as classes become more (`zoo.run(model, "cpe-clip", ...)`, `multimodal.regimes.cpe_clip`).
Points: `tokens` of the first D blocks of both towers (verbs `words`, `prompt`). Head: `text` (`zoo.heads.text`).

    text, block 0:    [start] G_0 [name of class k] . [end]                G (D, T, d_t), in front of the positions
    text, block i:    what has become of G_{i-1} is replaced by G_i
    image, block 0:   N([class | patches + positions | V_0])               V_i = G_i W^T + b, (T, d_v), one W for all blocks
    image, block i:   V_i comes in beside what has become of V_0 ... V_{i-1}: (i + 1) T prompts in all ("accumulate"),
                      or in the place of what has become of V_{i-1} ("replace")
    logits(x) = exp(a) <I(x) / |I(x)|, t_k / |t_k|> + b                    a, b: the model's own, frozen

N is the norm in front of the image tower's first block, if it has one. G is Xavier-uniform as one tensor of three dimensions:
U(-u, u), u = sqrt(6 / (T d_t + D d_t)). W, b: torch's own start of a linear layer. It does not begin as the zero-shot classifier.
Where one tower has more blocks than the other, the vectors of those that only the image tower has go there alone.
Defaults: T = 2, D = 12, "accumulate", as the authors'. How they train: the regime's page. Our default rate is for AdamW.
Counts: D T d_t + d_t d_v + d_v, whatever the number of classes and sessions. CLIP ViT-B/16 (512, 768):
12,288 + 393,216 + 768 = 406,272.
Source: D'Alessandro et al., "Multimodal Parameter-Efficient Few-Shot Class Incremental Learning", ICCV Workshops 2023;
neuraptic/cpe-clip (CoLeLib/models/clip_models.py).

The class texts are encoded once for each step, whatever the batch, and in evaluation once until a parameter changes. A step takes
1.05 to 1.06 times as long as forward and backward through both towers without prompts (processor time, clip-micro, 16 images, 100
classes).

Deviations: the authors' image prompts stand behind the patches, ours between class token and patches: without a mask the same.
Their scale is the constant 100, ours the model's own (CLIP's is 100.0). Underscores in names are spaces here. Their numbers of
heads and widths are constants. Their other ways of putting prompts into the text tower ("accumulate", "accumulate_same", the
first under a name that their command line misspells) are no part of the paper's method and left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from multimodal.adapters.coop import Context
from multimodal.adapters.parts.coupled import Coupled, Vectors, first_norm, named_classes, two_towers
from zoo.adapters.base import Adapter
from zoo.heads.text import SLOT
from zoo.points import Points
from zoo.registry import register_adapter


class OwnVectors(Vectors):
    """Vectors (T, d_t) of a block that the image tower alone has, and what the common map makes of them."""

    def __init__(self, vectors: Tensor, project: nn.Linear) -> None:
        super().__init__(vectors)
        self.shared = (project,)  # in a tuple, so that it is registered only once

    def forward(self, batch: int) -> Tensor:
        """(1, T, d_v)."""
        return self.shared[0](self.prompt).unsqueeze(0)  # type: ignore[no-any-return]


@register_adapter("cpe-clip")
@dataclass
class CPEClip(Adapter):
    """Continual parameter-efficient CLIP.

    Args:
        num_tokens: T, vectors of each block.
        depth: D, blocks of each tower that have some; at most those that it has.
        vision: how those of the image tower come in: "accumulate" or "replace".
    """

    num_tokens: int = 2
    depth: int = 12
    vision: Literal["accumulate", "replace"] = "accumulate"

    default_lr = 2e-3
    point_options = {"tower": "both"}
    head_kind = "text"
    in_template = True
    paper = "D'Alessandro et al. 2023"
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

    def attach(self, points: Points) -> None:
        """Put vectors among the words and in their place in later blocks, and what is made of them into the image tower."""
        texts, images = two_towers(points, "cpe-clip")
        named_classes(points, self.plan, "cpe-clip")
        texts, images = texts[: self.depth], images[: self.depth]
        width = texts[0].dim_in
        project = points.share("project", nn.Linear(width, images[0].dim_in))
        start = torch.empty(max(len(texts), len(images)), self.num_tokens, width)
        bound = math.sqrt(6 / (self.num_tokens * width + len(start) * width))
        vectors = [each.clone() for each in start.uniform_(-bound, bound)]
        sources: list[nn.Module] = []
        for i, text in enumerate(texts):
            if i == 0:
                sources.append(Context(vectors[i]))
                text.words(sources[i])
            else:
                sources.append(Vectors(vectors[i]))
                text.prompt(sources[i], keep=True, replace=True)
        norm = first_norm(points, images[0].tower)
        for i, image in enumerate(images):
            if i < len(sources):
                held = "prompt" if i else "context"
                module: nn.Module = Coupled(sources[i], held, project, True, None if i else norm)
            else:
                module = OwnVectors(vectors[i], project)
            image.prompt(module, keep=True, replace=self.vision == "replace" and i > 0)

    def init_head(self, head: Any) -> None:
        """The template of the class texts: slots for the vectors, and the name."""
        head.template, head.specific = " ".join([*[SLOT] * self.num_tokens, "{}"]) + ".", False
