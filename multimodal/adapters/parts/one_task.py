"""What a VL-Adapter of several tasks has for one of them, as a VL-Adapter of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from multimodal.adapters.parts.of_task import Bare, OfTask
from multimodal.adapters.parts.vl_settings import read_by
from zoo import registry
from zoo.errors import UnknownNameError, nearest
from zoo.host import Host


def one_task(adapter: Any, model: Host, task: str, name: str | None) -> tuple[str, ...]:
    """Attach it, switched off; returns its name in the model.

    Raises:
        UnknownNameError: the adapter has nothing of this task.
    """
    if task not in adapter.tasks:
        known = nearest(task, adapter.tasks) if adapter.tasks else "It has one of everything for all tasks."
        raise UnknownNameError(f"'{adapter.method}' has nothing of a task '{task}'. {known}")
    hyper = adapter.form == "hyperformer"
    settings = {**adapter.config(), "sharing": "single", "tasks": [], "form": "adapter" if hyper else adapter.form}
    single = registry.adapter(adapter.method, **read_by(type(adapter), settings))
    values = _made(adapter, task) if hyper else _chosen(adapter, adapter.tasks.index(task))
    with model.all_or_nothing(), torch.no_grad():
        twin = model.add_adapter(single, name or (None if task == "default" else task), activate=False)
        for key, parameter in twin.named_parameters():
            parameter.copy_(values[key])
        return (next(n for n, one in model.adapters.items() if one is twin),)


def _chosen(adapter: Any, index: int) -> dict[str, Tensor]:
    """The values of a `single` by name: of each `OfTask` the task's module, or that of all tasks."""
    counts = {name: len(m.each) for name, m in adapter.named_modules() if isinstance(m, OfTask)}
    found: dict[str, Tensor] = {}
    for key, value in adapter.named_parameters():
        place, of_task, rest = key.partition(".each.")
        if not of_task:
            found[key] = value
            continue
        number, _, name = rest.partition(".")
        if counts[place] == 1 or int(number) == index:
            found[f"{place}.{name}" if adapter.form == "lora" else f"{place}.each.0.{name}"] = value
    return found


def _made(adapter: Any, task: str) -> dict[str, Tensor]:
    """What the hypernetwork makes for the task, and what was trained of the backbone."""
    network: Any = adapter.hyper
    with torch.no_grad():
        made: dict[str, Bare] = network(task)
    found: dict[str, Tensor] = {k: v for k, v in adapter.named_parameters() if not k.startswith("hyper.")}
    for point, weights in made.items():
        for side, weight, bias in (("down", *weights[:2]), ("up", *weights[2:])):
            found |= {f"{point}.{side}.each.0.weight": weight, f"{point}.{side}.each.0.bias": bias}
    return found
