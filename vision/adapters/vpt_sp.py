"""VPT-SP: the image branch of semantic proxies for metric learning: deep prompts and trained biases.

Idea: images are embedded with prompts of their own, classes with others. An image's branch is VPT-deep with BitFit. A second
pass of the training images through the same frozen blocks, with prompts of their class in front, gives what the class means in
these images: its semantic proxy. The second pass, and what makes proxies of it, belong to the training (task `semantic-proxies`,
`vision.tasks.semantic_proxies`); what is published is this adapter and the embedding head.
Points: `tokens` (verb `prompt`), all; the biases of `linear` and `norm` points.

    [x_i | _] = Block_i([x_{i-1} | P_i])        P_i (T_i, d), T_i = max(T - i step, 0), blocks counted from 0
    b <- b + db                                  every bias (`bitfit`), in both passes

In a pass with `class_prompts` (B, N, d) in the context, rows of them stand in the place of P_i: `class_prompt_counts[i]` in
block i, none in blocks behind; so the second pass sees no prompt of the image branch.

P_i ~ N(0, 2 / ((T + 1) d)), Xavier's for a tensor (1, T, d).
Defaults: T = 20, step = 0, biases trained (CUB, ViT-B/16: SGD 1e-3 with momentum, proxies 1e-2, weight decay 1e-6, 60 epochs,
batches of 64 with 2 of a class, embeddings of 512). For Stanford Online Products T = 90, step = 5.
Counts: ViT-B/16 biases 102,912 + prompts 184,320 = 287,232, with the head (LN, 768 -> 512) 682,496: all of the inference. While
training on the 100 classes of CUB, with the task's modules: see there.
Source: Ren, Chen, Wang, Hua, "Learning Semantic Proxies from Visual Prompts for Parameter-Efficient Fine-Tuning in Deep Metric
Learning", ICLR 2024; Noahsark/ParameterEfficient-DML.
Deviations: theirs stand in front of the class token, ours behind it, and are computed as keys and values alone: the same outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.adapters.base import Adapter
from zoo.adapters.bitfit import BitFit
from zoo.points import Points, TokensPoint
from zoo.registry import register_adapter

PROMPTS, COUNTS = "class_prompts", "class_prompt_counts"


class BranchPrompts(nn.Module):
    """The prompts of one block: the image branch's own, or those of the classes, if the pass brings some."""

    def __init__(self, count: int, dim: int, std: float, block: int, given: Any, counts: Any) -> None:
        super().__init__()
        self.prompt = nn.Parameter(std * torch.randn(count, dim))
        self.block, self.given, self.counts = block, given, counts

    def forward(self, batch: int) -> Tensor:
        """(1, T, d), or (B, T of the classes, d); T is 0 in blocks in which classes have none."""
        if not self.given.given:
            return self.prompt.unsqueeze(0)
        counts = self.counts.get()
        if self.block >= len(counts):
            return self.prompt.new_zeros(1, 0, self.prompt.shape[1])
        start, stop = sum(counts[: self.block]), sum(counts[: self.block + 1])
        return self.given.get()[:, start:stop].to(self.prompt.dtype)  # type: ignore[no-any-return]


@register_adapter("vpt-sp")
@dataclass
class VPTSP(Adapter):
    """The image branch of semantic proxies.

    Args:
        num_tokens: T, prompts in front of the first block.
        step: how many fewer each further block has; blocks for which none is left have none.
        biases: train the backbone's biases, too.
    """

    num_tokens: int = 20
    step: int = 0
    biases: bool = True

    default_lr = 5e-3
    paper = "Ren et al. 2024"
    taxonomy = "hybrid"
    identity = False
    merges = False
    trial = {"num_tokens": 3}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.num_tokens >= 1, f"num_tokens is {self.num_tokens}; expected 1 or more.")
        self.check(self.step >= 0, f"step is {self.step}; expected 0 or more.")

    def attach(self, points: Points) -> None:
        """Prompts at every block for which some are left; all biases."""
        tokens: list[TokensPoint] = points.require("tokens", "vpt-sp", each_tower=True)  # type: ignore[assignment]
        given = points.context(PROMPTS, required=False)
        counts = points.context(COUNTS, per="batch", required=False)
        for block, point in enumerate(tokens):
            count = self.num_tokens - block * self.step
            if count > 0:
                std = math.sqrt(2 / ((self.num_tokens + 1) * point.dim_in))
                point.prompt(BranchPrompts(count, point.dim_in, std, block, given, counts))
        if self.biases:
            for biased in BitFit().selected(points):
                biased.train("bias")

    def widths(self, points: Points) -> list[int]:
        """d of each block that has prompts, in order."""
        tokens = points.select(kind="tokens")
        return [p.dim_in for i, p in enumerate(tokens) if self.num_tokens - i * self.step > 0]  # type: ignore[attr-defined]
