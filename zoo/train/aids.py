"""A task's own modules in a run: trained and checkpointed beside the model's parameters, and never published."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.data.seeds import kept_generators, seed_everything
from zoo.errors import ConfigError
from zoo.tasks import Task

if TYPE_CHECKING:
    from zoo.model import Model

__all__ = ["Aids", "make_aids"]

OWNER = "task"  # their parameters are `task/<name>`


class Aids:
    """Takes part in a run as a callback does: follows the model's mode, and stands in the checkpoint."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module.train()

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, as `task/<name>`."""
        return {f"{OWNER}/{name}": p for name, p in self.module.named_parameters() if p.requires_grad}

    def eval_start(self, model: Any) -> None:
        """An evaluation begins."""
        self.module.eval()

    def eval_end(self, model: Any) -> None:
        """An evaluation is over."""
        self.module.train()

    def extra_state(self) -> dict[str, Tensor]:
        """For the checkpoint."""
        return dict(self.module.state_dict())

    def load_extra_state(self, model: Any, state: dict[str, Tensor]) -> None:
        """Back from the checkpoint."""
        self.module.load_state_dict(state)


def make_aids(task: Task, model: Model, device: torch.device, seed: int) -> Aids | None:
    """The modules of a task that has some, made anew; they are `task.own` from now on.

    Raises:
        ConfigError: an adapter has the name that stands in front of their parameters.
    """
    if type(task).modules is Task.modules:
        return None
    with kept_generators():
        seed_everything(seed, "task")
        task.own = task.modules(model)
    if task.own is None:
        return None
    if OWNER in model.adapters:
        raise ConfigError(f"an adapter is named '{OWNER}', as the parameters of the task '{task.name}' are; rename it.")
    task.own.to(device)
    return Aids(task.own)
