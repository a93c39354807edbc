"""The library: for each sublayer its children, trained one by one to do what the parent's block does (local distillation).

    x, y: what the parent's block is given and gives on a batch              loss = |child block(x) - y|^2 / |y|^2

The child block is the parent's with one sublayer replaced; that sublayer and the norm in front of it learn, all else stays.
So the children of attention and MLP are trained apart, m + n of them in a block rather than m n. All children of a block
learn from the same passes of the parent, which end behind that block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.engine.sharded import refuse
from zoo.errors import ConfigError
from zoo.families.children import LINEAR, NONE, ROLES, Form
from zoo.model import Model
from zoo.model.children import child_of, own_tensors, places
from zoo.puzzle.importance import Channels, heads_of
from zoo.puzzle.passes import call_of
from zoo.tasks import Task
from zoo.tasks.base import call
from zoo.train.calibration import Calibration
from zoo.train.step import TrainingError

__all__ = ["Batches", "forms_of", "loss_of", "orders", "text_of", "train_block"]

EPSILON = 1e-6


class Batches:
    """What the model is called with, batch by batch, in an order that follows from the seed alone."""

    def __init__(self, model: Model, data: Any, task: Task, size: int, seed: int, device: Any, workers: Any) -> None:
        refuse(model, ConfigError, "blocks are trained by hand", "Run it in one process, without fully_shard.")
        self.model, self.task, self.size, self.seed, self.device, self.workers = (
            model,
            task,
            size,
            seed,
            device,
            workers,
        )
        self.data = task.open(model, data, train=False)
        self.epoch: int = max(1, len(self.data) // size)

    def __iter__(self) -> Iterator[Any]:
        """Without end, each pass over the data in an order of its own."""
        number = 0
        while True:
            for inputs, targets in self._pass(self.seed + number):
                yield self.task.example(self.model, inputs, targets)
            number += 1

    def first(self, items: int) -> list[Any]:
        """So many items, or as many as there are, in batches."""
        found = []
        for inputs, targets in self._pass(self.seed):
            found.append(self.task.example(self.model, inputs, targets))
            items -= self.size
            if items <= 0:
                break
        return found

    def _pass(self, seed: int) -> Iterator[tuple[Any, Any]]:
        options = {"size": self.size, "seed": seed, "workers": self.workers}
        yield from Calibration(self.model, self.data, self.task, self.device, **options)


def text_of(form: Form) -> str:
    """A form as a word."""
    return str(form)


def forms_of(
    model: Model, heads: Sequence[float], neurons: Sequence[float], linear: bool, nothing: bool
) -> dict[str, list[Form]]:
    """The forms of each sublayer, the parent's own size first; shares of it are rounded, and left out where they cannot be."""
    makes = type(model.family).children()
    found: dict[str, list[Form]] = {}
    for name, (block, role) in places(model).items():
        size = makes.size(block.name, block.module, role)
        if not size:
            continue  # a child already: it is left as it is
        counts = {max(1, round(share * size)) for share in (heads if role == "attn" else neurons)} - {size}
        if role == "attn" and makes.divides:
            counts = {n for n in counts if size % n == 0}
        forms: list[Form] = [size, *sorted(counts, reverse=True)]
        found[name] = forms + [LINEAR] * linear + [NONE] * nothing
    return found


@torch.no_grad()
def orders(model: Model, names: Sequence[str], batches: Sequence[Any]) -> dict[str, list[int]]:
    """Of each sublayer, its heads or neurons from the most important on (`zoo.puzzle.importance`); a round for each batch."""
    makes, known = type(model.family).children(), places(model)
    channels: dict[str, Channels] = {}
    heads: dict[str, Tensor] = {}
    handles = []
    for name in names:
        block, role = known[name]
        linear, width = makes.reader(block.module, role)
        if role == "mlp":
            channels[name] = Channels(linear.weight, len(batches))
        handles.append(linear.register_forward_pre_hook(_taking(name, role, linear, width, channels, heads)))
    try:
        for inputs in batches:
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    found = {name: seen.order() for name, seen in channels.items()}
    return found | {name: score.argsort(descending=True, stable=True).tolist() for name, score in heads.items()}


def _taking(
    name: str, role: str, linear: nn.Linear, width: int, channels: dict[str, Channels], heads: dict[str, Tensor]
) -> Callable[[nn.Module, Any], None]:
    def take(module: nn.Module, args: Any) -> None:
        if role == "mlp":
            channels[name].see(args[0])
        else:
            heads[name] = heads.get(name, 0) + heads_of(args[0], linear.weight, width)

    return take


def loss_of(child: Tensor, parent: Tensor) -> Tensor:
    """|child - parent|^2 / |parent|^2, means over all numbers."""
    child, parent = child.float(), parent.float()
    return (child - parent).square().mean() / (parent - EPSILON).square().mean()


def train_block(
    model: Model,
    block: str,
    forms: Mapping[str, Sequence[Form]],
    order: Mapping[str, Sequence[int]],
    batches: Batches,
    *,
    steps: int,
    lr: float,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train all children of a block.

    Returns:
        Their tensors as "attn/linear/norm1.weight", and of each child its loss on the first batch, before and after.

    Raises:
        TrainingError: a loss that is not finite.
    """
    makes, known = type(model.family).children(), places(model)
    parent = next(p.module for p, _ in known.values() if p.name == block)
    children: dict[str, nn.Module] = {}
    trained: dict[str, torch.optim.Optimizer] = {}
    for role in ROLES:
        name = f"{block}.{role}"
        for form in forms.get(name, ())[1:]:  # the first is the parent's own
            child = child_of(model, name, form, order.get(name))
            learns = [child.get_parameter(key) for key in own_tensors(child, makes, role) if _is_parameter(child, key)]
            for parameter in learns:
                parameter.requires_grad_(True)
            children[key := f"{role}/{text_of(form)}"] = child
            if learns:
                trained[key] = torch.optim.AdamW(learns, lr=lr, weight_decay=0.0)
    first = call_of(model, parent, batches.first(1)[0])

    @torch.no_grad()
    def losses() -> dict[str, float]:
        return {key: float(loss_of(first.run(child), first.output)) for key, child in children.items()}

    before = losses()
    for _, inputs in zip(range(steps if trained else 0), batches):
        seen = call_of(model, parent, inputs)
        for key, optimizer in trained.items():
            loss = loss_of(seen.run(children[key]), seen.output)
            if not bool(loss.isfinite()):
                raise TrainingError(
                    f"The loss of the child '{key}' of '{block}' is {float(loss)}. Try a smaller local_lr."
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    after = losses()
    tensors = {
        f"{key}/{name}": value.detach().cpu().contiguous().clone()
        for key, child in children.items()
        for name, value in own_tensors(child, makes, key.partition("/")[0]).items()
    }
    return tensors, {key: {"before": before[key], "after": after[key]} for key in children}


def _is_parameter(module: nn.Module, name: str) -> bool:
    path, _, last = name.rpartition(".")
    return module.get_submodule(path)._parameters.get(last) is not None
