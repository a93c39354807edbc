"""Towers that `towers` does not describe: ResNets, ConvNeXts, FastViTs and others of timm's; texts of transformers.

Their projections, convolutions and norms are found by type, with roles by usual names, and believed where a small pass has called
them, as the generic family finds them (`zoo.families.generic`). What such a tower multiplies by without calling it (the
attention by which a ResNet pools, `F.multi_head_attention_forward`) is no point, with the reason. There are no other kinds of
points: what an added key or token means depends on a tower's forward, which nobody described.

Points are named by their modules behind the name of the tower, `image.trunk.stages.0.blocks.1.mlp.fc1`; what stands behind the
network on the way to the common space has the role "proj", which "all-linear" leaves out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zoo.families.generic.discover import discover
from zoo.families.generic.watch import Pass, run, silent
from zoo.points import Point

__all__ = ["Looked", "text_of"]

PARTS = {"image": "visual", "text": "text"}
KINDS = ("linear", "norm")
BEHIND = ("head.", "proj")  # of timm's networks, of transformers'


@dataclass(eq=False)
class Looked:
    """What a pass showed of the towers of one module."""

    module: Any
    refused: dict[str, str] = field(default_factory=dict)
    passes: dict[str, Pass] = field(default_factory=dict)

    def points(self, family: Any, name: str) -> list[Point]:
        """Linear and norm points of a tower, in forward order."""
        part = PARTS[name]
        root: nn.Module = getattr(self.module, part)
        if name not in self.passes:
            first = next(root.parameters())
            inputs = _example(family, name)
            inputs = inputs.to(first.device, first.dtype if inputs.is_floating_point() else None)
            with silent(root):
                self.passes[name] = run(root, root, (inputs,), {})
            self.passes[name].forget()
        found = discover(root, self.passes[name])
        self.refused |= {f"{name}.{path}": why for path, why in found.refused.items()}
        points = [point for point in found.points if point.kind in KINDS]
        for point in points:
            if point.kind == "linear" and point.path.startswith(BEHIND):
                point.role = "proj"
            point.name, point.path, point.tower = f"{name}.{point.path}", f"{part}.{point.path}", name
        return points


def _example(family: Any, name: str) -> Tensor:
    """An image of zeros (1, C, H, W), or the ids (1, L) of a text of zeros; no random number is drawn."""
    if name == "image":
        return torch.zeros(1, *family.data_config()["input_size"])
    context, vocab = family.context_length, int(family.module.vocab_size)
    return text_of(torch.zeros(context, dtype=torch.long), context, vocab)


def text_of(words: Tensor, context: int, vocab: int) -> Tensor:
    """Ids (1, context) of a text of so many tokens, of which the first is the start and the last the end, the highest id."""
    ids = torch.zeros(1, context, dtype=torch.long)
    ids[0, : len(words)] = words
    ids[0, 0], ids[0, len(words) - 1] = vocab - 2, vocab - 1
    return ids
