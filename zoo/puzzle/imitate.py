"""Global distillation: a task in which a network learns to pass on, and to answer, what its parent does.

    loss = mean over blocks and tokens of (1 - cos(h, h')) + KL(p || p')          h, p of the parent

Without scores (no head) the second term is the cosine of the pooled features. Labels are not used.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.data.dataset import ImageDataset
from zoo.host import Host
from zoo.model import Model
from zoo.model.children import places
from zoo.puzzle.passes import distance, seen
from zoo.tasks.base import Task

__all__ = ["Imitate"]


class Imitate(Task):
    """Learn to do what `parent` does on the data of another task.

    Args:
        parent: the model to be imitated; it has the same blocks by name.
        task: what opens the data and makes inputs of them.
    """

    name = "imitate"

    def __init__(self, parent: Model, task: Task) -> None:
        self.parent, self.task = parent, task
        self.blocks = {block.name for block, _ in places(parent).values()}

    def open(
        self, model: Host, data: Any, *, train: bool, split: str | None = None, augment: str | None = None
    ) -> ImageDataset:
        """As the other task does."""
        return self.task.open(model, data, train=train, split=split, augment=augment)

    def items(self, model: Host) -> str:
        """As the other task calls them."""
        return self.task.items(model)

    def example(self, model: Host, inputs: Any, targets: Any) -> Any:
        """As in the other task."""
        return self.task.example(model, inputs, targets)

    def loss(self, model: Host, inputs: Any, targets: Any, label_smoothing: float = 0.0) -> tuple[Tensor, Any]:
        """The loss above, and the scores or final hidden states."""
        given = self.example(model, inputs, targets)
        with torch.no_grad():
            wanted = seen(self.parent, given, self.blocks)
        found = seen(model, given, self.blocks)  # type: ignore[arg-type]
        hidden = [
            1 - torch.cosine_similarity(found.blocks[n].float(), wanted.blocks[n].float(), dim=-1).mean()
            for n in sorted(self.blocks)
        ]
        loss = torch.stack(hidden).mean()
        if found.scores is None or wanted.scores is None:
            return loss + distance(found.final, wanted.final).mean(), found.final  # type: ignore[arg-type]
        return loss + divergence(found.scores, wanted.scores).mean(), found.scores


def divergence(scores: Tensor, parent: Tensor) -> Tensor:
    """KL(parent || child) of scores (B, ..., K), the mean over what is between: (B,)."""
    p, q = parent.float().log_softmax(-1), scores.float().log_softmax(-1)
    return (
        F.kl_div(q, p, reduction="none", log_target=True).sum(-1).flatten(1).mean(1)
        if scores.ndim > 2
        else F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    )
